"""Several runs on one pool: who may work, that work is shared and the dead's taken over, that all bits are the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CLASSES, one_thread, tiny  # noqa: F401
from typer.testing import CliRunner

import smi
from smi.cli import app
from smi.devices import resolve_device
from smi.pool import Pool
from smi.run import run
from smi.time_left import TimeLeft
from smi.workers import Told, Workers

CONFIG = smi.Config(iterations=6, prune_at=(2,), prune_ratio=(0.5,), batch_size=2, snapshots=0)
PLAN = smi.WorkPlan(tuple(i % CLASSES for i in range(18)), 2)


# Plain forks would copy locks that threads of earlier tests hold. What is loaded beforehand lets processes start fast.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "timm", "pytest", "smi.run"])


@pytest.fixture(scope="module")
def model() -> smi.SparseModel:
    return smi.SparseModel(tiny(), name="tiny", backend="reference")


def work(out: Path, made: Path, pause: float, options: dict[str, Any]) -> None:
    """Run the plan, and write the batches that were made, a line each, to `made`."""

    def note(batch: int, *_: object) -> None:
        with made.open("a") as file:
            file.write(f"{batch}\n")

    torch.set_num_threads(1)
    smi.workers._LOOK_AGAIN = 0.05  # type: ignore[attr-defined]
    model = smi.SparseModel(tiny(), name="tiny", backend="reference")
    run(model, PLAN, CONFIG, out, on_iteration=lambda *_: time.sleep(pause), on_batch=note, **options)


def start(out: Path, made: Path, pause: float = 0.02, **options: Any) -> multiprocessing.process.BaseProcess:
    """A process of its own that does `work`."""
    child = PROCESSES.Process(target=work, args=(out, made, pause, options))
    child.start()
    return child


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def bits(pool: Path) -> dict[int, bytes]:
    """The images of every shard; seconds of phases differ from run to run."""
    opened = Pool(pool)
    return {batch: opened.load(batch).images.numpy().tobytes() for batch in opened.batches}


@pytest.fixture(scope="module")
def alone(model: smi.SparseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """What one undisturbed run makes."""
    path = tmp_path_factory.mktemp("alone") / "pool"
    run(model, PLAN, CONFIG, path)
    assert not (path / "workers").exists()
    return bits(path)


# --- whole runs ---


@pytest.mark.parametrize("kills", range(4))
def test_workers_that_come_and_are_killed_make_the_pool_of_one_run(
    alone: dict[int, bytes], tmp_path: Path, kills: int
) -> None:
    """As many are killed, each with a batch in hand, as others join; the last one finds nothing left undone."""
    pool, made = tmp_path / "pool", tmp_path / "made"
    doomed = [start(pool, made, pause=600, join=True) for _ in range(kills)]
    wait_for(lambda: len(list((pool / "workers").glob("*.claim"))) >= kills)
    others = [start(pool, made, join=True) for _ in range(2)]
    wait_for(lambda: made.exists())
    for child in doomed:
        child.kill()
        child.join()
    for child in others:
        child.join()
        assert child.exitcode == 0
    assert bits(pool) == alone
    assert sorted(map(int, made.read_text().split())) == list(range(PLAN.num_batches)), "each is made once"
    assert not (pool / "workers").exists()


def test_a_second_run_is_refused_while_the_first_lives_and_welcome_when_it_was_killed(
    model: smi.SparseModel, alone: dict[int, bytes], tmp_path: Path
) -> None:
    pool = tmp_path / "pool"
    first = start(pool, tmp_path / "made", pause=0.2)
    wait_for(lambda: list((pool / "workers").glob("*.claim")))
    for join in (False, True):
        with pytest.raises(smi.SmiError, match=rf"another run is at work on .*process {first.pid} on"):
            run(model, PLAN, CONFIG, pool, join=join)
    first.kill()
    first.join()
    assert run(model, PLAN, CONFIG, pool).complete
    assert bits(pool) == alone and not (pool / "workers").exists()


def test_shards_of_a_plan_are_its_parts(model: smi.SparseModel, alone: dict[int, bytes], tmp_path: Path) -> None:
    found: dict[int, bytes] = {}
    for part, expected in ((0, [0, 4, 8]), (1, [1, 5]), (2, [2, 6]), (3, [3, 7])):
        done = run(model, PLAN, CONFIG, tmp_path / str(part), shard=(part, 4))
        assert done.complete and done.batches_done == len(expected) and done.images_left == 0
        assert Pool(tmp_path / str(part)).batches == expected
        found |= bits(tmp_path / str(part))
    assert found == alone
    with pytest.raises(smi.SmiError, match="shard is 4/4; expected 0/4 to 3/4"):
        run(model, PLAN, CONFIG, tmp_path / "x", shard=(4, 4))


def test_the_command_takes_parts_and_partners(tmp_path: Path) -> None:
    args = ["invert", "embedded:teacher", "--iterations", "1", "--set", "prune_at=[]", "--set", "prune_ratio=[]", "-b", "1", "-n", "3", "--device", "cpu"]  # fmt: skip  # noqa: E501
    for more, batches in ((["--shard", "1/2"], [1]), (["--join"], [0, 1, 2])):
        shown = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "pool"), *more])
        assert shown.exit_code == 0, shown.output
        assert Pool(tmp_path / "pool").batches == batches
    wrong = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "x"), "--shard", "2/2"])
    assert wrong.exit_code == 2 and "expected I/N with I from 0 to N - 1" in wrong.output.replace("\n", " ")


def test_join_and_overwrite_exclude_each_other(model: smi.SparseModel, tmp_path: Path) -> None:
    with pytest.raises(smi.SmiError, match="join and overwrite exclude each other"):
        run(model, PLAN, CONFIG, tmp_path, join=True, overwrite=True)


# --- claims ---


def test_of_many_that_want_a_batch_one_gets_it(tmp_path: Path) -> None:
    """The dead's claims among them, which all see and one may take over."""
    (tmp_path / "workers").mkdir()
    for batch in range(0, 40, 2):
        (tmp_path / "workers" / f"{batch:05d}.claim").write_text("deadbeef")
    runs = [Workers(tmp_path, together=True).__enter__() for _ in range(8)]
    taken: list[tuple[str, int]] = []
    go = threading.Barrier(8)

    def grab(worker: Workers) -> None:
        for batch in range(40):
            go.wait()
            if worker.take(batch):
                taken.append((worker.name, batch))

    threads = [threading.Thread(target=grab, args=(worker,)) for worker in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = Counter(batch for name, batch in taken if runs[[r.name for r in runs].index(name)].holds(batch))
    assert holders == Counter(range(40))
    for worker in runs:
        worker.__exit__(None, None, None)
    assert not (tmp_path / "workers").exists()


@pytest.mark.parametrize("links", [True, False])
def test_who_takes_over_from_the_dead_takes_nothing_from_the_living(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of its looks and deeds one is held up, while another is through with all of them."""
    if not links:
        monkeypatch.setattr(os, "link", refused)
    for moment in itertools.count(1):
        path = tmp_path / str(moment)
        with Workers(path, together=True) as slow, Workers(path, together=True) as fast:
            (path / "workers" / "00003.claim").write_text("0123abcd")
            with monkeypatch.context() as patch:
                took = at_call(moment, lambda fast=fast: fast.take(3), patch)
                mine = slow.take(3)
            if not took:
                assert moment > 6 and mine
                break
            assert [slow.holds(3), fast.holds(3)] == [mine, took[0]] and mine is not took[0], moment
        assert not (path / "workers").exists()


def at_call(moment: int, deed: Callable[[], object], patch: pytest.MonkeyPatch) -> list[object]:
    """Do it before the call of that number to the file system; what came of it, as soon as it was done."""
    calls, done = itertools.count(1), []

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if next(calls) == moment:
                done.append(deed())
            return call(*args)

        return counted

    for place, name in ((os, "link"), (os, "replace"), (os, "unlink"), (smi.workers, "read_bytes")):
        patch.setattr(place, name, counting(getattr(place, name)))
    return done


def refused(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_run_elsewhere_is_dead_when_it_shows_no_life(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    other = tmp_path / "workers" / "0badcafe.json"
    told = {"name": "0badcafe", "host": "elsewhere", "process": "1@1", "together": True, "since": 0.0}
    other.write_text(json.dumps(told))
    (tmp_path / "workers" / "00003.claim").write_text("0badcafe")
    with Workers(tmp_path, together=True, patience=30) as mine:
        assert [worker.name for worker in mine.others()] == ["0badcafe"] and not mine.take(3)
        os.utime(other, (time.time() - 40, time.time() - 40))
        assert mine.others() == [] and mine.take(3) and mine.holds(3)
    other.parent.mkdir(exist_ok=True)
    other.write_text(json.dumps(told))
    with pytest.raises(smi.SmiError, match=r"another run is at work .* on elsewhere"):
        Workers(tmp_path).__enter__()
    assert [file.name for file in (tmp_path / "workers").glob("*.json")] == ["0badcafe.json"]
    os.utime(other, (time.time() - 90, time.time() - 90))
    with Workers(tmp_path):
        assert not other.exists(), "the dead leave nothing behind"


def test_a_run_that_was_taken_for_dead_announces_itself_again(tmp_path: Path) -> None:
    with Workers(tmp_path, together=True) as mine:
        assert mine.take(0)
        (tmp_path / "workers" / f"{mine.name}.json").unlink()
        elsewhere = {"name": "0badcafe", "host": "elsewhere", "process": "1@1", "together": True, "since": 0.0}
        (tmp_path / "workers" / "0badcafe.json").write_text(json.dumps(elsewhere))
        assert [worker.name for worker in mine.others()] == ["0badcafe"] and mine.holds(0)
        with Workers(tmp_path, together=True) as third:
            assert {worker.name for worker in third.others()} == {mine.name, "0badcafe"} and not third.take(0)


def test_a_process_of_the_same_number_that_began_later_is_another(tmp_path: Path) -> None:
    with Workers(tmp_path, together=True) as first:
        file = tmp_path / "workers" / f"{first.name}.json"
        with Workers(tmp_path, together=True) as second:
            assert [worker.name for worker in second.others()] == [first.name]
            told = json.loads(file.read_text())
            file.write_text(json.dumps({**told, "process": f"{os.getpid()}@1"}))
            assert second.others() == []


def test_a_run_that_lost_its_claim_writes_nothing(model: smi.SparseModel, tmp_path: Path) -> None:
    """It slept so long that another took over what it had in hand."""
    plan = smi.WorkPlan((0, 1), 1)

    def lose(batch: int, loop: smi.Inversion) -> None:
        if batch == 0:
            claim = tmp_path / "workers" / "00000.claim"
            claim.unlink()
            claim.write_text("another!")

    told: list[int] = []
    done = run(model, plan, CONFIG, tmp_path, on_iteration=lose, on_batch=lambda batch, *_: told.append(batch))
    assert Pool(tmp_path).batches == [1] and not done.complete
    assert told == [1] and (done.batches_done, done.images_done) == (1, 1), "nor does it say that it did"


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert resolve_device("auto") == torch.device("cuda:2")


# --- how fast each is ---


def test_runs_know_each_others_pace(tmp_path: Path) -> None:
    with Workers(tmp_path, together=True) as first, Workers(tmp_path, together=True) as second:
        assert second.told() == [None]
        first.tell(Told(3, 10.0, 4.0))
        (heard,) = second.told()
        assert heard is not None and (heard.batch, heard.each) == (3, 10.0) and 0 < heard.free <= 4
        file = tmp_path / "workers" / f"{first.name}.told"
        os.utime(file, (time.time() - 3, time.time() - 3))
        assert second.told()[0] == (3, 10.0, pytest.approx(1, abs=0.5)), "seconds pass"
        for damage in ("", "[1, 2]", "[1, 0, 0]", "[1, 1e999, 0]", '["a", "b", "c"]', "[" * 2000):
            file.write_text(damage)
            assert second.told() == [None], damage
    assert not (tmp_path / "workers").exists()


@pytest.mark.parametrize("order", list(itertools.permutations((".json", ".name", ".told"))))
def test_what_the_dead_told_goes_with_them(
    order: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def glob(folder: Path, pattern: str) -> list[Path]:  # a file system gives them in any order
        return sorted(found(folder, pattern), key=lambda file: order.index(file.suffix))

    found = Path.glob
    monkeypatch.setattr(Path, "glob", glob)
    with Workers(tmp_path, together=True) as first:
        child = os.fork()
        if not child:
            dead = Workers(tmp_path, together=True)
            dead.__enter__()
            dead.tell(Told(0, 1.0, 1.0))
            os._exit(0)
        os.waitpid(child, 0)
        assert len(list((tmp_path / "workers").glob("*.told"))) == 1
        assert first.told() == []
    assert not (tmp_path / "workers").exists()


def test_a_joined_run_tells_of_itself_and_knows_when_nothing_is_left(model: smi.SparseModel, tmp_path: Path) -> None:
    left, seen = TimeLeft(PLAN, CONFIG, model.info.num_patches), []

    def watch(batch: int, loop: smi.Inversion) -> None:
        left.iteration(batch, loop.iteration, len(loop.indices))
        seen.append((left.seconds, list((tmp_path / "pool" / "workers").glob("*.told"))))

    def done(batch: int, _: smi.Result, seconds: float) -> None:
        left.batch(batch, seconds)

    options: dict[str, Any] = {"join": True, "time_left": left, "on_iteration": watch, "on_batch": done}
    run(model, PLAN, CONFIG, tmp_path / "pool", **options)
    told, files = seen[-1]
    assert told is not None and 0 <= told < 1 and len(files) == 1
    assert left.seconds == 0


# --- many runs ---


def test_free_batches_come_before_those_of_the_dead_and_made_ones_never(tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    with Workers(tmp_path, together=True) as ours:
        (folder / "00003.claim").write_text("0123abcd")  # of a run that is no more
        assert ours.pick([3], {3}.__contains__) is None and not (folder / "00003.claim").exists()
        (folder / "00003.claim").write_text("0123abcd")
        made = {5}
        picked = {ours.pick([b for b in (2, 3, 4, 5) if not ours.holds(b)], made.__contains__) for _ in range(2)}
        assert picked == {2, 4}
        assert ours.pick([3, 5], made.__contains__) == 3
        with Workers(tmp_path, together=True) as theirs:
            assert theirs.pick([2, 3, 4], made.__contains__) is None


def test_what_a_pick_asks_of_the_file_system_does_not_grow_with_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Workers, "take", lambda self, batch: calls.append(batch) or False)
    with Workers(tmp_path, together=True) as ours:
        for batch in range(500):
            (tmp_path / "workers" / f"{batch:05d}.claim").write_text("0123abcd")
        assert ours.pick(range(500), lambda _: False) is None
        assert len(calls) <= 8
        assert 1 < ours.wait() < 3
        monkeypatch.setattr(ours, "_names", lambda: [f"{run:08x}.json" for run in range(1000)])
        assert 20 < ours.wait() < 40


def test_those_that_begin_together_spread(tmp_path: Path) -> None:
    """Ten at once want one of a thousand batches; nearly as many tries as runs get one."""
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Workers(tmp_path, together=True)) for _ in range(10)]
        picked = [run.pick(range(1000), lambda _: False) for run in runs]
        assert len(set(picked)) == 10 and None not in picked
        # and the pool fills from its start: the last run draws among 20 free ones, behind at most 9 that are taken
        assert max(batch for batch in picked if batch is not None) < 20 + 9
