"""Batches that are interrupted half done: what goes on from a state ends bit for bit as what was never interrupted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import one_thread, tiny  # noqa: F401
from test_run import assert_same, assert_same_pool

import smi
from smi.inversion import Inversion
from smi.objectives import Context, Objective
from smi.pool import Pool
from smi.run import run
from smi.state import WorkPlan

pytestmark = pytest.mark.usefixtures("one_thread")

T, CLASSES = 12, 3
BASE = smi.Config(iterations=T, prune_at=(3, 7), prune_ratio=(0.3, 0.3), snapshots=2, tv2=1e-2, l2=1e-3, seed=5)
CONFIGS = {
    "sparse": BASE,
    "official": BASE.replace(semantics="official", tv1=1e-3),
    "dense": BASE.replace(strategy="dense"),
    "random": BASE.replace(strategy="random"),
    "rebirth": BASE.replace(strategy="rebirth", division=3),
    "fusion": BASE.replace(strategy="fusion", merge_to=0.5),
    "gradient": BASE.replace(ranking="gradient_input"),
    "best": BASE.replace(best=True, best_every=5),
    "tolerance": BASE.replace(tolerance=0.9, patience=2),
}
TARGETS = [0, 0, 0, 2, 2, 2]


def bright(context: Context) -> torch.Tensor:
    return context.images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny(CLASSES)


def model_for(network: torch.nn.Module, config: smi.Config, backend: str) -> smi.SparseModel:
    return smi.SparseModel(
        network, name="tiny", backend=backend, ranking=config.model_ranking, merge_to=config.model_merge_to
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_from_every_iteration_on_the_result_is_the_same(network: torch.nn.Module, name: str, backend: str) -> None:
    config, own = CONFIGS[name], [Objective(bright, 0.1)]
    model = model_for(network, config, backend)
    whole = Inversion(model, TARGETS, config, objectives=own)
    assert whole.fused == (backend != "reference")
    states: dict[int, Any] = {}
    while not whole.done:
        state = whole.state_dict().items()
        states[whole.iteration] = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in state}
        whole.step()
    expected = whole.result()
    assert expected.history["bright"].isfinite().all()
    for t, state in states.items():
        again = Inversion(model, TARGETS, config, objectives=own)
        again.load_state_dict(state)
        assert (again.iteration, again.resumed_at) == (t, t)
        assert_same(again.run(), expected)


class At:
    """Interrupts at the so-manieth line that is run in the loop's and the kernels' own code."""

    FILES = ("smi/inversion.py", "smi_kernels/descent.py", "smi/resumption.py")

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> None:
        sys.settrace(self._called)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: Any, event: str, _: object) -> Any:
        return self._line if frame.f_code.co_filename.endswith(self.FILES) else None

    def _line(self, frame: Any, event: str, _: object) -> Any:
        if event == "line":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["sparse", "rebirth", "best"])
def test_an_interrupt_in_any_line_loses_an_iteration_at_most(
    network: torch.nn.Module, name: str, backend: str, tmp_path: Path
) -> None:
    """Or nothing goes on from it at all, where the line lies between two changes that belong together."""
    config = CONFIGS[name].replace(batch_size=len(TARGETS) // CONFIGS[name].images_per_trajectory)
    model, plan = model_for(network, config, backend), WorkPlan(tuple(TARGETS), len(TARGETS))
    run(model, plan, config, tmp_path / "whole")
    found: list[tuple[int, int]] = []
    for number, line in enumerate(range(60, 3000, 37)):
        pool, done, resumed = tmp_path / str(number), [0], [0]

        def watch(_: int, loop: Inversion, done: list[int] = done, resumed: list[int] = resumed) -> None:
            done[0], resumed[0] = loop.iteration, loop.resumed_at

        try:
            with At(line):
                run(model, plan, config, pool, on_iteration=watch)
            break  # there are no more lines
        except KeyboardInterrupt:
            reached = done[0]
        if not (pool / "manifest.json").exists():
            continue
        run(model, plan, config, pool, on_iteration=watch)
        assert_same_pool(pool, tmp_path / "whole")
        found.append((reached, resumed[0]))
    resumable = [(reached, resumed) for reached, resumed in found if reached]
    assert len(resumable) > 10
    assert all(resumed in (0, reached, reached + 1) for reached, resumed in resumable)
    assert sum(resumed > 0 for _, resumed in resumable) > 0.3 * len(resumable), (
        "of lines, which are not where time goes"
    )


def test_a_kill_loses_what_was_done_since_the_last_saving(network: torch.nn.Module, tmp_path: Path) -> None:
    class Killed(BaseException):
        """Nobody catches it, as nobody is told of a kill."""

    model, plan = model_for(network, BASE, "cpu"), WorkPlan((0, 1), 2)
    run(model, plan, BASE, tmp_path / "whole")

    def kill(_: int, loop: Inversion) -> None:
        if loop.iteration == 9:
            raise Killed

    seen: list[int] = []
    with pytest.raises(Killed):
        run(model, plan, BASE, tmp_path / "pool", save_every=0.0, on_iteration=kill)
    assert not Pool(tmp_path / "pool").batches
    run(model, plan, BASE, tmp_path / "pool", on_iteration=lambda _, loop: seen.append(loop.iteration))
    assert seen == [9, 10, 11, 12]
    assert_same_pool(tmp_path / "pool", tmp_path / "whole")


@pytest.fixture
def begun(network: torch.nn.Module, tmp_path: Path) -> Iterator[tuple[smi.SparseModel, WorkPlan, Path]]:
    """A pool with one batch, of which seven iterations are done."""
    model, plan = model_for(network, BASE, "cpu"), WorkPlan((0, 1), 2)

    def stop(_: int, loop: Inversion) -> None:
        if loop.iteration == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, BASE, tmp_path / "pool", on_iteration=stop)
    assert [file.name for file in (tmp_path / "pool" / "unfinished").iterdir()] == ["00000.safetensors"]
    yield model, plan, tmp_path / "pool"
    assert not (tmp_path / "pool" / "unfinished").exists()


def change(**parts: Any) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        tensors = load_file(file)
        from smi.shard import decode_state, encode_state

        state = decode_state(file.read_bytes())
        assert tensors.keys() <= state.keys()
        file.write_bytes(encode_state({**state, **parts}))

    return act


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"), "other numbers than were written"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: save_file({"images": torch.zeros(2)}, file), "is damaged"),
        (change(iteration=99), "iteration 99 of 12"),
        (change(keep=torch.tensor([[0, 1], [1, 1]])), "its keep is not"),
        (change(dropped_at=torch.zeros(2, 3, dtype=torch.int32)), "its dropped_at is not"),
        (change(phases=[{}]), "not of an inversion with these arguments"),
        (change(**{"pixels.sums": torch.zeros(1)}), "sums has shape"),
    ],
)
def test_a_damaged_state_is_dropped_and_the_batch_begun_anew(
    begun: tuple[smi.SparseModel, WorkPlan, Path], damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    model, plan, pool = begun
    damage(pool / "unfinished" / "00000.safetensors")
    seen: list[int] = []
    with pytest.warns(UserWarning, match=says):
        run(model, plan, BASE, pool, on_iteration=lambda _, loop: seen.append(loop.iteration))
    assert seen == list(range(1, T + 1))
    run(model, plan, BASE, tmp_path / "whole")
    assert_same_pool(pool, tmp_path / "whole")


def test_a_link_is_not_followed(begun: tuple[smi.SparseModel, WorkPlan, Path], tmp_path: Path) -> None:
    model, plan, pool = begun
    file = pool / "unfinished" / "00000.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.warns(UserWarning, match="is a link"):
        run(model, plan, BASE, pool)
    assert (tmp_path / "elsewhere.safetensors").exists()


def test_overwrite_and_finished_batches_leave_no_state(
    begun: tuple[smi.SparseModel, WorkPlan, Path], network: torch.nn.Module
) -> None:
    model, plan, pool = begun
    seen: list[int] = []
    run(model, plan, BASE, pool, overwrite=True, on_iteration=lambda _, loop: seen.append(loop.iteration))
    assert seen[0] == 1
    (pool / "unfinished").mkdir()
    (pool / "unfinished" / "00000.safetensors").write_bytes(b"of a run that was taken for dead")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(model, plan, BASE, pool).complete


def test_the_seed_of_a_second_try_is_kept(network: torch.nn.Module, tmp_path: Path) -> None:
    model, plan, seen = model_for(network, BASE, "cpu"), WorkPlan((0, 1), 2), list[tuple[int, int]]()

    def spoil(_: int, loop: Inversion) -> None:
        if loop.iteration == T and loop.config.seed == BASE.seed:
            loop.images.fill_(torch.nan)
        if loop.iteration == 5 and loop.config.seed != BASE.seed:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="not finite"), pytest.raises(KeyboardInterrupt):
        run(model, plan, BASE, tmp_path / "pool", on_iteration=spoil)
    run(
        model,
        plan,
        BASE,
        tmp_path / "pool",
        on_iteration=lambda _, loop: seen.append((loop.iteration, loop.config.seed)),
    )
    assert seen[0][0] == 6 and seen[0][1] != BASE.seed
    assert Pool(tmp_path / "pool").load(0).tries == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_loops_of_one_state_do_not_share_it(network: torch.nn.Module, backend: str) -> None:
    model = model_for(network, BASE, backend)
    first, second, whole = (Inversion(model, TARGETS, BASE) for _ in range(3))
    for _ in range(5):
        first.step()
    second.load_state_dict(first.state_dict())
    expected = whole.run()
    assert_same(first.run(), expected)
    assert_same(second.run(), expected)


def test_only_whole_iterations_of_the_same_arguments_are_taken(network: torch.nn.Module) -> None:
    model = model_for(network, BASE, "cpu")
    loop = Inversion(model, [0, 1], BASE)
    loop.step()
    state = loop.state_dict()
    with pytest.raises(smi.SmiError, match="has done 1 iterations; load a state into a new one"):
        loop.load_state_dict(state)
    for other in (Inversion(model, [0], BASE), Inversion(model, [0, 1], BASE.replace(tv1=1.0))):
        with pytest.raises(smi.SmiError, match="the state is not of an inversion with these arguments"):
            other.load_state_dict(state)
    loop._torn = True
    with pytest.raises(smi.SmiError, match="iteration 1 is half done"):
        loop.state_dict()
