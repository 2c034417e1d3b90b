"""Batches that are interrupted half done: what goes on from a state ends bit for bit as what was never interrupted."""

from __future__ import annotations

import math
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
from smi.pool import Pool, encode_png
from smi.run import run
from smi.state import WorkPlan
from smi.workers import Workers

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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_state_is_copied_from_the_loop_that_it_is_of(network: torch.nn.Module, backend: str) -> None:
    first, second = (Inversion(model_for(network, BASE, backend), [0, 1], BASE) for _ in range(2))
    first.step()
    second.load_state_dict(first.state_dict())
    before, expected = first.images.clone(), second.run()
    assert torch.equal(first.images, before)
    assert_same(first.run(), expected)


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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("watched", [{"best": True, "best_every": 4}, {"tolerance": 0.9, "patience": 4}])
def test_an_iteration_that_was_not_begun_is_not_half_done(
    network: torch.nn.Module, watched: dict[str, Any], backend: str
) -> None:
    """Nor where something follows it that belongs to it."""

    def strikes(context: Context) -> torch.Tensor:
        if context.step == 7:
            raise KeyboardInterrupt
        return bright(context)

    config = BASE.replace(**watched)
    model = model_for(network, config, backend)
    loop = Inversion(model, [0, 1], config, objectives=[Objective(strikes, 0.1, "bright")])
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    own = [Objective(bright, 0.1)]
    again = Inversion(model, [0, 1], config, objectives=own)
    again.load_state_dict(loop.state_dict())
    assert again.resumed_at == 7
    assert_same(again.run(), Inversion(model, [0, 1], config, objectives=own).run())


def test_the_host_is_one_stride_ahead_of_the_device(network: torch.nn.Module) -> None:
    """Or clocks and signals would be looked at when all is launched, and the device far behind."""
    loop, done = Inversion(model_for(network, BASE, "cpu"), [0, 1], BASE), list[Any]()

    class Event:
        recorded = None

        def record(self, stream: object) -> None:
            self.recorded = loop.iteration

        def synchronize(self) -> None:
            done.append((loop.iteration, self.recorded))

    loop._launched = Event()  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.current_stream", lambda device: device)
        loop.run()
    assert done == [(1, None), *((t, t - 1) for t in range(2, T + 1))]


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


def test_what_was_interrupted_after_its_last_iteration_is_told_of_once(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody takes the moment that is left of it for the time of a whole batch."""
    model, plan, seen = model_for(network, BASE, "cpu"), WorkPlan((0, 1, 2), 2), list[tuple[int, int, int]]()

    def stop(loop: Inversion) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "result", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, plan, BASE, tmp_path)
    run(model, plan, BASE, tmp_path, on_iteration=lambda n, loop: seen.append((n, loop.iteration, loop.resumed_at)))
    assert seen == [(0, T, T), *((1, t, 0) for t in range(1, T + 1))]


def test_an_interrupt_does_not_lose_a_batch_that_is_being_written(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, encode = model_for(network, BASE, "cpu"), WorkPlan((0, 1, 2), 2), encode_png
    struck: list[bool] = []

    def strike(picture: torch.Tensor) -> bytes:
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt
        return encode(picture)

    monkeypatch.setattr("smi.pool.encode_png", strike)
    with pytest.raises(KeyboardInterrupt):
        run(model, plan, BASE, tmp_path / "pool")
    assert Pool(tmp_path / "pool").batches == [0]
    run(model, plan, BASE, tmp_path / "pool")
    run(model, plan, BASE, tmp_path / "whole")
    assert_same_pool(tmp_path / "pool", tmp_path / "whole")


def test_joined_runs_wait_for_others_no_longer_than_the_time_that_they_have(
    network: torch.nn.Module, tmp_path: Path
) -> None:
    model, plan = model_for(network, BASE, "cpu"), WorkPlan((0, 1, 2), 2)
    with Workers(tmp_path, together=True) as other:
        assert other.take(1)
        done = run(model, plan, BASE, tmp_path, join=True, time_budget=3)
    assert (done.batches_done, done.batches_left) == (1, 1)
    assert 3 <= done.seconds < 30


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
        (change(snapshot_at=[math.inf, 7]), "not of an inversion with these arguments"),
        (change(iteration=99, tries="many"), "iteration 99 of 12"),
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


def test_a_state_of_fused_kernels_is_for_fused_kernels(
    begun: tuple[smi.SparseModel, WorkPlan, Path], network: torch.nn.Module
) -> None:
    """Elsewhere its curves would be missing."""
    _, plan, pool = begun
    with pytest.warns(UserWarning, match="batch 0 is begun anew: .* it is of fused kernels"):
        run(model_for(network, BASE, "reference"), plan, BASE, pool)
    assert all(curve.isfinite().all() for curve in Pool(pool).load(0).history.values())


def test_a_folder_that_leads_out_of_the_pool_is_refused(
    begun: tuple[smi.SparseModel, WorkPlan, Path], tmp_path: Path
) -> None:
    model, plan, pool = begun
    (pool / "unfinished").rename(tmp_path / "elsewhere")
    (pool / "unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(smi.SmiError, match="unfinished' is a link, which may lead out of the pool"):
        run(model, plan, BASE, pool)
    assert (tmp_path / "elsewhere" / "00000.safetensors").exists()
    (pool / "unfinished").unlink()


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
