"""Kills at every moment of writing, full disks, clocks that jump, processes that sleep: nothing lost or doubled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Counted, in_process, kill, killed_everywhere, no_space
from pools import CONFIG, INFO, PLAN, assert_same, fill_pool, make_result, open_writer
from safetensors.torch import load_file
from small import one_thread, tiny  # noqa: F401
from torch import nn

import smi
from smi.config import Config
from smi.errors import SmiError
from smi.export import export_pool
from smi.files import atomic_write, put_folder, temp_folder
from smi.pool import Pool
from smi.pool_tools import merge, verify
from smi.quantization import Quantized
from smi.report import write_report
from smi.report_data import collect
from smi.report_page import render
from smi.transfer import TransferConfig, teach
from smi.workers import Workers


def work(path: Path, together: bool = True) -> None:
    """What `smi.run.run` does with a pool, but for the inversion."""
    with Workers(path, together=together) as workers:
        writer = open_writer(path, alone=not workers.others())
        for batch in writer.missing:
            if workers.take(batch):
                if workers.holds(batch) and batch not in writer.present:
                    writer.write(batch, make_result(batch))
                workers.release(batch)


def temps(path: Path) -> list[str]:
    return [str(file) for file in path.rglob("*") if ".smi-" in file.name]


def assert_whole(path: Path) -> None:
    found = verify(path)
    assert (found.problems, found.missing, found.images) == ([], 0, len(PLAN.targets))
    for batch, result in enumerate(Pool(path)):
        assert_same(result, make_result(batch))
    for file in (path / "workers").glob("*"):  # what was left by kills of a moment ago stays for a while
        os.utime(file, (time.time() - 120, time.time() - 120))
    with Workers(path):
        pass
    assert temps(path) == [] and not (path / "workers").exists()


def assert_no_half(path: Path) -> None:
    """What is there is whole; pictures come before their batch."""
    if (path / "manifest.json").exists():
        assert verify(path).problems == []


# --- kills ---


def test_a_writer_killed_at_any_call_leaves_a_pool_that_is_whole_and_goes_on(tmp_path: Path) -> None:
    path, kills = tmp_path / "pool", 0
    for _ in killed_everywhere(path, lambda: work(path)):
        assert_no_half(path)
        kills += 1
        if kills % 20 == 0:
            work(path)
            assert_whole(path)
            (path / "shards" / "00001.safetensors").unlink()
    work(path)
    assert_whole(path)
    assert kills > 40


def test_a_pool_killed_from_nothing_at_each_call_is_finished_by_the_next(tmp_path: Path) -> None:
    kills = 0
    for after in range(0, 2000, 5):
        path = tmp_path / str(after)
        code = in_process(lambda path=path: work(path), lambda: Counted(path, after, kill))  # noqa: B023
        work(path)
        assert_whole(path)
        if code == 0:
            break
        kills += 1
    assert kills > 10


def test_two_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    """Two that share a pool, killed after some hundredths of a second each; batches taken out, so that work is left."""
    draw, path, kills = random.Random(0), tmp_path / "pool", 0
    for turn in range(100):
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    while True:
                        work(path)
                        (path / "shards" / f"{random.randrange(3):05d}.safetensors").unlink(missing_ok=True)
                finally:
                    os._exit(1)
            children.append(child)
        time.sleep(draw.uniform(0, 0.04))
        for child in children:
            os.kill(child, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if turn % 10 == 0:
            assert_no_half(path)
    work(path)
    assert_whole(path)
    assert kills > 100


def student() -> nn.Module:
    return tiny(num_classes=4, depth=1, img_size=8)


SHORT = TransferConfig(epochs=2, batch_size=4, holdout=0.3, tokens="all")


def test_a_student_killed_at_any_call_is_the_one_of_an_undisturbed_run(tmp_path: Path) -> None:
    pool = fill_pool(tmp_path / "pool")
    whole = teach(student(), pool, tmp_path / "whole", SHORT, device="cpu")
    out, kills = tmp_path / "out", 0
    for _ in killed_everywhere(out, lambda: teach(student(), pool, out, SHORT, device="cpu"), step=5):
        kills += 1
    again = teach(student(), pool, out, SHORT, device="cpu")
    assert again.curve == whole.curve and kills > 3
    assert not [file.name for file in out.iterdir() if ".smi-" in file.name]
    for name in ("student.safetensors", "last.safetensors"):
        mine, theirs = load_file(out / name), load_file(tmp_path / "whole" / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (out / "transfer.json").read_bytes() == (tmp_path / "whole" / "transfer.json").read_bytes()


def test_an_export_killed_at_any_call_is_there_or_not(tmp_path: Path) -> None:
    pool, out = fill_pool(tmp_path / "pool"), tmp_path / "out"
    expected = export_pool(pool, tmp_path / "whole", "npy")
    for _ in killed_everywhere(tmp_path, lambda: export_pool(pool, out, "npy", overwrite=True), step=2):
        if out.exists():
            assert (out / "images.npy").read_bytes() == (expected / "images.npy").read_bytes()
            assert (out / "targets.npy").read_bytes() == (expected / "targets.npy").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "pool", "whole"]


def test_a_folder_replaced_is_the_old_or_the_new_one_at_any_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def replace(text: str) -> None:
        with temp_folder(out) as temp:
            atomic_write(temp / "file", text.encode())
            put_folder(temp, out)

    replace("old")
    for _ in killed_everywhere(tmp_path, lambda: replace("new")):
        there = [folder / "file" for folder in tmp_path.iterdir() if "tmp" not in folder.name]
        assert {file.read_text() for file in there if file.exists()} <= {"old", "new"} and there
    assert (out / "file").read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_of_two_runs_that_fill_one_folder_neither_destroys_what_the_other_made(tmp_path: Path) -> None:
    pool, out = fill_pool(tmp_path / "pool"), tmp_path / "out"
    with temp_folder(out) as temp:
        atomic_write(temp / "file", b"slow")
        export_pool(pool, out, "npy")
        assert (temp / "file").read_bytes() == b"slow", "no run is dead that holds its folder"
        with pytest.raises(smi.SmiError, match=r"out' was made by another run meanwhile"):
            put_folder(temp, out, replace=False)
    assert {"images.npy", "targets.npy"} <= set(os.listdir(out)) and "file" not in os.listdir(out)
    assert sorted(os.listdir(tmp_path)) == ["out", "pool"]


def test_a_merge_killed_at_any_call_goes_on(tmp_path: Path) -> None:
    part, out = fill_pool(tmp_path / "part"), tmp_path / "out"
    for _ in killed_everywhere(out, lambda: merge([part], out), step=6):
        assert_no_half(out)
    assert_whole(out)


# --- full disks ---

_WRITES = ("fsync", "mkdir", "link")


def full_everywhere(folder: Path, act: Callable[[], Any]) -> Iterator[str]:
    """What each process says that finds the disk full one write later."""
    for after in range(500):
        said = folder.parent / "said"
        said.unlink(missing_ok=True)
        write = said.write_text

        def told(after: int = after, write: Callable[[str], int] = write) -> None:
            opened = open
            counted = Counted(folder, after, no_space, _WRITES)
            try:
                act()
            except SmiError as error:
                import builtins

                builtins.open = opened
                counted.left = -1
                write(str(error))

        assert in_process(told) == 0
        if not said.exists():
            return
        yield said.read_text()
    raise AssertionError("never enough room")


def assert_tells_of_room(message: str, folder: Path) -> None:
    assert "\n" not in message and str(folder) in message
    assert "is full" in message and "free some space and run the same command again" in message


@pytest.mark.parametrize("what", ["pool", "merge", "export", "transfer", "config", "report"])
def test_a_full_disk_is_said_and_after_room_is_made_it_goes_on(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fill_pool(tmp_path / "pool")
    if what == "report":
        rendered(monkeypatch, pool)
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "out"
    acts: dict[str, Callable[[], Any]] = {
        "pool": lambda: work(out),
        "merge": lambda: merge([pool], out),
        "export": lambda: export_pool(pool, out, "imagefolder", overwrite=True),
        "transfer": lambda: teach(student(), pool, out, SHORT, device="cpu"),
        "config": lambda: CONFIG.save(out),
        "report": lambda: write_report(pool, out),
    }
    messages = []
    for message in full_everywhere(disk, acts[what]):
        assert_tells_of_room(message, out)
        messages.append(message)
        if what in ("pool", "merge"):
            assert_no_half(out)
    assert messages and (
        what in ("config", "merge") or any("MB are wanted" in m and "MB are free" in m for m in messages)
    )
    assert temps(disk) == []
    if what in ("pool", "merge"):
        assert_whole(out)
    if what == "config":
        assert Config.load(out) == CONFIG


def rendered(monkeypatch: pytest.MonkeyPatch, pool: Path) -> bytes:
    """The report of `pool`, drawn once: drawing takes a second, and is not what is at risk."""
    opened = Pool(pool)
    drawn = render(collect(opened, opened.info, opened.config), opened.manifest, planned=18)
    monkeypatch.setattr("smi.report_page.render", lambda *_, **__: drawn)
    return drawn[0].encode()


def test_a_report_killed_at_any_call_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, out = fill_pool(tmp_path / "pool"), tmp_path / "out" / "page.html"
    new = rendered(monkeypatch, pool)
    out.parent.mkdir()
    atomic_write(out, b"old")
    for _ in killed_everywhere(out.parent, lambda: write_report(pool, out)):
        assert out.read_bytes() in (b"old", new)
    assert out.read_bytes() == new


def test_a_full_disk_leaves_the_older_quantization_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing alone: what is written stands for a program and its record."""

    def write(_: Any, folder: Path, onnx: bool) -> dict[str, Any]:
        for name in ("model.pt2", "quantization.json"):
            with open(folder / name, "w") as file:
                file.write("new")
        return {}

    monkeypatch.setattr(Quantized, "_write", write)
    disk = tmp_path / "disk"
    out = disk / "out"
    out.mkdir(parents=True)
    for name in ("model.pt2", "quantization.json"):
        (out / name).write_text("old")
    parts: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Quantized))
    quantized = Quantized(**{**parts, "float_bytes": 1000})
    messages = []
    for message in full_everywhere(disk, lambda: quantized.save(out, overwrite=True)):
        assert_tells_of_room(message, out)
        assert {file.read_text() for file in out.iterdir()} == {"old"} and os.listdir(disk) == ["out"]
        messages.append(message)
    assert messages and {file.read_text() for file in out.iterdir()} == {"new"}

    link = disk / "link"
    link.symlink_to(out)
    with pytest.raises(smi.SmiError, match=r"link' is a link, which is not replaced; name the folder"):
        quantized.save(link, overwrite=True)
    assert sorted(os.listdir(disk)) == ["link", "out"] and link.is_symlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    ballast, path = small_disk / "ballast", small_disk / "pool"
    work(path)
    (path / "shards" / "00002.safetensors").unlink()
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(SmiError) as told:
        work(path)
    assert_tells_of_room(str(told.value), path)
    assert verify(path).problems == [] and verify(path).missing == 1
    ballast.unlink()
    work(path)
    assert_whole(path)


# --- clocks and sleep ---


def elsewhere(path: Path, touched: float) -> Path:
    file = path / "workers" / "0badcafe.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"name": "0badcafe", "host": "elsewhere", "process": "1@1", "together": True, "since": 1.0}
    file.write_text(json.dumps(told))
    os.utime(file, (touched, touched))
    return file


def test_after_the_clock_was_set_back_the_dead_are_told_by_their_silence(tmp_path: Path) -> None:
    file = elsewhere(tmp_path, time.time() + 3600)
    (tmp_path / "workers" / "00000.claim").write_text("0badcafe")
    with Workers(tmp_path, together=True, patience=0.4) as mine:
        assert not mine.take(0)
        time.sleep(0.2)
        os.utime(file, (time.time() + 3700, time.time() + 3700))  # a sign of life
        time.sleep(0.3)
        assert not mine.take(0)
        time.sleep(0.5)
        assert mine.take(0) and mine.holds(0)


def test_a_clock_set_forward_takes_work_over_and_doubles_nothing(tmp_path: Path) -> None:
    """The one that lives elsewhere and looks dead loses its claim, and finds that out before it writes."""
    path = tmp_path / "pool"
    with Workers(path, together=True, patience=30) as first:
        open_writer(path)
        assert first.take(0)
        told = path / "workers" / f"{first.name}.json"
        told.write_text(told.read_text().replace('"host": "', '"host": "not '))
        os.utime(told, (time.time() - 3600, time.time() - 3600))
        with Workers(path, together=True, patience=30) as second:
            assert second.take(0) and second.holds(0) and not first.holds(0)
            first.release(0)
            assert second.holds(0), "what is no longer one's own is not released"
            assert first.take(1), "it announces itself again"


def test_turns_do_not_depend_on_the_clock(tmp_path: Path) -> None:
    """A run of an hour to come is there; one that begins now is later all the same, and refused."""
    with Workers(tmp_path) as first:
        told = tmp_path / "workers" / f"{first.name}.json"
        told.write_text(json.dumps({**json.loads(told.read_text()), "since": time.time() + 3600}))
        with pytest.raises(SmiError, match="another run is at work"):
            Workers(tmp_path).__enter__()


def test_of_runs_that_begin_together_one_at_a_time_works(tmp_path: Path) -> None:
    path, inside = tmp_path / "pool", tmp_path / "inside"
    for _ in range(6):
        children = []
        for _ in range(4):
            child = os.fork()
            if not child:
                code = 2
                try:
                    with Workers(path):
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                        time.sleep(0.1)
                        inside.unlink()
                        code = 0
                except SmiError:
                    code = 1
                finally:
                    os._exit(code)
            children.append(child)
        codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        assert {0} <= codes <= {0, 1}


def test_a_killed_run_that_nobody_buries_is_dead(tmp_path: Path) -> None:
    """Its process stays in the table until its parent asks for it: in a container without init, for ever."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        worker = Workers(tmp_path).__enter__()
        assert worker.take(0)
        os.write(told, b"!")
        signal.pause()
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        with Workers(tmp_path) as mine:
            assert mine.take(0)
    finally:
        os.waitpid(child, 0)


def test_a_run_that_sleeps_keeps_its_claim_on_the_same_host(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with Workers(path, together=True) as worker:
            writer = open_writer(path)
            assert worker.take(0)
            os.write(told, b"!")
            time.sleep(0.1)
            if worker.holds(0):
                writer.write(0, make_result(0))
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.1)
    work(path)
    assert Pool(path).batches == [1, 2], "what the sleeper has in hand is left to it"
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert_whole(path)
    assert not (path / "workers").exists()


def test_an_empty_claim_of_long_ago_is_nobodys(tmp_path: Path) -> None:
    """File systems without links have it for a moment; a kill in that moment leaves it."""
    with Workers(tmp_path, together=True, patience=30) as mine:
        claim = tmp_path / "workers" / "00000.claim"
        claim.touch()
        assert not mine.take(0)
        os.utime(claim, (time.time() - 60, time.time() - 60))
        assert mine.take(0)


def test_without_links_claims_are_made_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Workers(tmp_path, together=True) as mine, Workers(tmp_path, together=True) as other:
        assert mine.take(0) and not other.take(0) and mine.holds(0)


def test_a_second_lesson_in_one_folder_is_refused(tmp_path: Path) -> None:
    pool = fill_pool(tmp_path / "pool")
    with Workers(tmp_path / "out"), pytest.raises(smi.SmiError, match="another run is at work"):
        teach(student(), pool, tmp_path / "out", SHORT, device="cpu")
    assert INFO.num_classes == 4
