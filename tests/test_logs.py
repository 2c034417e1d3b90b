"""Logs of a run: what they say against the results themselves, and that kills, resumption and company do no harm."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CLASSES, PRUNED, one_thread, tiny  # noqa: F401
from typer.testing import CliRunner

import smi
from smi.cli import app
from smi.logs import JsonLines, Log, peak_memory, read_log
from smi.run import run
from smi.time_left import TimeLeft

CONFIG = smi.Config(**PRUNED, batch_size=2, snapshots=0)
PLAN = smi.WorkPlan(tuple(i % CLASSES for i in range(6)), 2)
T = CONFIG.iterations


@pytest.fixture(scope="module", params=["auto", "reference"])
def model(request: pytest.FixtureRequest) -> smi.SparseModel:
    """On fused kernels and on timm's modules."""
    return smi.SparseModel(tiny(), name="tiny", backend=request.param)


def logged(model: smi.SparseModel, out: Path, file: Path, **options: Any) -> list[dict[str, Any]]:
    left = TimeLeft(PLAN, CONFIG, model.info.num_patches)
    hooks = {"time_left": left}
    with Log(file, every=3, seconds=0, left=left) as log:
        hooks |= {"on_open": log.open, "on_iteration": log.iteration, "on_batch": log.batch}
        run(model, PLAN, CONFIG, out, **hooks, **options)  # type: ignore[arg-type]
    return read_log(file)


def test_events_say_what_the_results_hold(model: smi.SparseModel, tmp_path: Path) -> None:
    events = logged(model, tmp_path / "pool", tmp_path / "logs" / "run.jsonl")
    pool = smi.Pool(tmp_path / "pool")
    assert events[0]["event"] == "start" and events[0]["batches"] == 3
    assert {event["worker"] for event in events} == {events[0]["worker"]}
    per_batch = [*range(3, T, 3), T]
    found = [(event["batch"], event["iteration"]) for event in events if event["event"] == "iteration"]
    assert found == [(batch, t) for batch in range(3) for t in per_batch]
    for event in events[1:]:
        result = pool.load(event["batch"])
        assert event["step"] == event["batch"] * T + event["iteration"]
        assert event["seconds_left"] is None or event["seconds_left"] >= 0
        assert 1e6 < event["peak_memory_bytes"] < 1e11
        if event["event"] == "iteration":
            index = event["iteration"] - 1
            expected = {name: values[index].item() for name, values in result.history.items()}
            (phase,) = (p for p in result.phases if p.start <= index < p.stop)
            assert event["kept"] == phase.kept
        else:
            expected = {name: values.mean().item() for name, values in result.losses.items()}
            agreed = sum(row.argmax() == target for row, target in zip(result.logits, result.targets, strict=True))
            assert event["teacher_agreement"] == agreed / 2
            assert (event["kept"], event["images"], event["tries"]) == (result.keep.shape[1], 2, 1)
        assert event["losses"] == pytest.approx(expected, rel=1e-6)
    assert events[-1]["seconds_left"] == 0


def test_a_resumed_run_goes_on_with_its_steps(model: smi.SparseModel, tmp_path: Path) -> None:
    once = logged(model, tmp_path / "once", tmp_path / "once.jsonl")
    for budget in (1e-9, 1e-9, None):  # an iteration each, then the rest
        events = logged(model, tmp_path / "thrice", tmp_path / "thrice.jsonl", time_budget=budget)
    assert [event["batches"] for event in events if event["event"] == "start"] == [3, 3, 3]

    def told(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(e["event"], e["step"], e["losses"]) for e in events if e["event"] != "start"]

    assert told(events) == told(once)
    steps = [step for _, step, _ in told(events)]
    assert steps == sorted(steps)


def test_losses_are_read_as_seldom_as_wanted(model: smi.SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    losses = smi.Inversion.losses
    monkeypatch.setattr(smi.Inversion, "losses", lambda self, start=0: asked.append(start) or losses(self, start))
    events: list[dict[str, Any]] = []
    log = Log("never written", every=1, seconds=1e9)
    monkeypatch.setattr(log, "_write", events.extend)
    result = smi.invert(model, [0, 1], CONFIG, progress=log)
    assert asked == [0, 1], "after the first iteration, and when all are done"
    assert [event["iteration"] for event in events] == list(range(1, T + 1)), "and no iteration is missing"
    assert [event["losses"]["total"] for event in events] == pytest.approx(result.history["total"].tolist())
    nothing = Log()
    smi.invert(model, [0], CONFIG, progress=nothing)
    assert len(asked) == 2


def test_each_inversion_is_a_batch_of_its_own(model: smi.SparseModel, tmp_path: Path) -> None:
    loops = []

    def progress(loop: smi.Inversion) -> None:
        loops.append(weakref.ref(loop))
        log(loop)

    log = Log(tmp_path / "log", every=T)
    for target in range(3):
        smi.invert(model, [target], CONFIG, progress=progress)
    log.close()
    events = read_log(tmp_path / "log")
    assert [(event["batch"], event["step"]) for event in events] == [(n, (n + 1) * T) for n in range(3)]
    assert events[-1]["seconds_left"] == 0 and events[-1]["images_per_second"] > 0
    gc.collect()
    assert len(loops) >= 3 and not any(loop() for loop in loops), "a log holds no batch that is done"


def test_an_inversion_that_goes_on_tells_of_what_it_does(model: smi.SparseModel, tmp_path: Path) -> None:
    first, second = (smi.Inversion(model, [0], CONFIG) for _ in range(2))
    first.step()
    first.step()
    second.load_state_dict(first.state_dict())
    with Log(tmp_path / "log", every=1) as log:
        second.run(log)
    assert [event["iteration"] for event in read_log(tmp_path / "log")] == list(range(3, T + 1))


# --- files ---


def test_the_last_iteration_of_a_batch_that_converges_has_an_event(model: smi.SparseModel, tmp_path: Path) -> None:
    config = smi.Config(strategy="dense", iterations=400, tolerance=0.9, patience=3)
    with Log(tmp_path / "log", every=20) as log:
        made = smi.invert(model, [0, 1], config, progress=log)
    done = len(made.history["total"])
    assert done < 20
    (event,) = read_log(tmp_path / "log")
    assert (event["event"], event["iteration"]) == ("iteration", done)
    assert event["losses"]["total"] == pytest.approx(made.history["total"][-1].item())


def test_an_unfinished_line_is_passed_over_and_mended(tmp_path: Path) -> None:
    file = tmp_path / "log"
    whole = '{"event": "start", "batches": 1}\n'
    for cut in range(len(whole)):
        for before in ("", whole):
            file.write_text(before + whole[:cut])
            assert len(read_log(file)) == bool(before)
            sink = JsonLines(file)
            sink.write([{"event": "batch"}])
            sink.close()
            assert [event["event"] for event in read_log(file)] == ["start"] * bool(before) + ["batch"], cut
            assert [json.loads(line) for line in file.read_text().splitlines() if line.strip()] == read_log(file)


def test_mending_harms_no_line_that_another_adds_meanwhile(tmp_path: Path) -> None:
    file, over = tmp_path / "log", threading.Event()
    file.write_text('{"event": "sta')
    sink = JsonLines(file)

    def write() -> None:
        for number in range(2000):
            sink.write([{"event": "batch", "number": number}])
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not over.is_set():
        JsonLines(file).close()
    thread.join()
    sink.close()
    assert [event["number"] for event in read_log(file)] == list(range(2000))


@pytest.mark.parametrize("content", [b"PNG\0\0", b"{}\n", b'{"even": 1}\n', b"[" * 3_000_000])
def test_a_file_that_is_no_log_is_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_bytes(content)
    with pytest.raises(smi.SmiError, match="is not a log; choose another file"):
        JsonLines(file)
    assert file.read_bytes() == content


def test_errors_name_the_file_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(smi.SmiError, match="is not a plain file; choose another"):
        JsonLines(tmp_path)
    with pytest.raises(smi.SmiError, match=r"cannot read the log .*No such file"):
        read_log(tmp_path / "none")
    with pytest.raises(smi.SmiError, match=r"every is 0; expected a number of iterations from 1"):
        Log(tmp_path / "log", every=0)
    for damage in (b"{]\n", b"\xff\n", b"3\n", b'{"event": 3}\n', b"[" * 10000 + b"\n"):
        (tmp_path / "log").write_bytes(b'{"event": "start"}\n' + damage + b'{"event": "start"}\n')
        with pytest.raises(smi.SmiError, match="is damaged: line 2 is no event; remove that line"):
            read_log(tmp_path / "log")


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    config = CONFIG.replace(learning_rate=1e30, tv2=1e30)
    with Log(tmp_path / "log", every=1) as log:
        smi.invert(smi.SparseModel(tiny().double(), backend="reference"), [0], config, progress=log)
    losses = [event["losses"]["total"] for event in read_log(tmp_path / "log")]
    assert len(losses) == T and "NaN" not in (tmp_path / "log").read_text()


def test_peak_memory_counts_what_was_allocated() -> None:
    before = peak_memory()
    assert before is not None
    held = torch.ones(before // 4 + 2**24)  # 4 bytes each: more than there ever was
    after = peak_memory()
    assert after is not None and after > 4 * len(held)


# --- the command line ---

COMMAND = ["invert", "embedded:teacher", "-b", "1", "-n", "2", "--device", "cpu", "-t", "40", "--set", "prune_at=10"]
COMMAND += ["--set", "prune_ratio=0.5"]


def test_invert_logs_stops_at_sigterm_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    arguments = [*COMMAND, "-t", "4000", "--out", str(tmp_path / "pool"), "--log", str(file), "--log-every", "1"]
    process = subprocess.Popen([sys.executable, "-m", "smi.cli", *arguments], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not file.exists() or len(file.read_bytes()) < 2000:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143 and told.splitlines()[-1] == "stopped; run the same command again to go on"
    assert file.read_bytes().endswith(b"}\n")
    first = read_log(file)
    assert [event["event"] for event in first][:2] == ["start", "iteration"]
    assert str(process.pid) in first[0]["worker"]


def test_invert_logs_every_so_many_iterations(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    arguments = [*COMMAND, "--out", str(tmp_path / "pool"), "--log", str(file), "--log-every", "16"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    kinds = [(event["event"], event.get("step")) for event in read_log(file)]
    each = [("iteration", 16), ("iteration", 32), ("iteration", 40), ("batch", 40)]
    assert kinds == [("start", None), *each, *((kind, step + 40) for kind, step in each)]


def test_options_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options, message in (
        (["--log", "x", "--log-every", "0"], "error: --log-every is 0; expected at least 1.\n"),
        (
            ["--tensorboard", "x"],
            "error: TensorBoard is not installed: pip install 'sparse-model-inversion[logs]', or log JSON lines (--log "
            "FILE).\n",
        ),
    ):
        result = CliRunner().invoke(app, [*COMMAND, *options])
        assert (result.exit_code, result.stderr) == (2, message)


# --- TensorBoard ---


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(s.step, s.value) for s in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_json_lines_say(model: smi.SparseModel, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    left = TimeLeft(PLAN, CONFIG, model.info.num_patches)
    for part in range(2):  # resumed: a file more in the same folder
        with Log(tmp_path / "log", tmp_path / "board", every=2, left=left) as log:
            hooks = {"on_open": log.open, "on_iteration": log.iteration, "on_batch": log.batch, "time_left": left}
            run(model, PLAN, CONFIG, tmp_path / "pool", time_budget=None if part else 1e-9, **hooks)  # type: ignore[arg-type]
    found, events = scalars(tmp_path / "board"), read_log(tmp_path / "log")
    for kind, prefix in (("iteration", "loss"), ("batch", "batch/loss")):
        for name in next(e for e in events if e["event"] == kind)["losses"]:
            steps = [(event["step"], event["losses"][name]) for event in events if event["event"] == kind]
            assert [step for step, _ in found[f"{prefix}/{name}"]] == [step for step, _ in steps]
            assert [v for _, v in found[f"{prefix}/{name}"]] == pytest.approx([v for _, v in steps], rel=1e-6)
    assert [value for _, value in found["batch/teacher_agreement"]] == [
        event["teacher_agreement"] for event in events if event["event"] == "batch"
    ]
    kept = [event["kept"] for event in events if event["event"] == "iteration"]
    assert [value for _, value in found["run/kept"]] == kept
    assert found["run/peak_memory_bytes"] and found["run/seconds_left"]


def test_joined_runs_have_a_folder_each(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    arguments = [*COMMAND, "--out", str(tmp_path / "pool"), "--join", "--tensorboard", str(tmp_path / "board")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (folder,) = (tmp_path / "board").iterdir()
    assert str(os.getpid()) in folder.name and len(scalars(folder)["loss/total"]) == 2 * 2
