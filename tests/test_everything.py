"""The script for one GPU, and the comparison of revisions: parts, times, failures, gates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import smi
from benchmarks import compare, everything, timing
from smi.cli import app

CPU = torch.device("cpu")
PYTHON = [sys.executable, "-c"]
SUITE = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what failed so far")
"""


# --- everything ---


def test_what_fails_or_takes_too_long_stops_nothing(tmp_path: Path) -> None:
    hello, asleep = (("HELLO", "world"),), ["sleep", f"60.{os.getpid()}"]
    parts = [
        everything.Part("good", 0.3, [*PYTHON, "print('one')"]),
        everything.Part("fails", 0.3, [*PYTHON, "import sys; print('two'); sys.exit(3)"]),
        # Its child outlives it unless the whole session is ended.
        everything.Part(
            "endless", 0.05, [*PYTHON, "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]
        ),
        everything.Part("interrupted", 0.05, [*PYTHON, SUITE]),
        everything.Part("absent", 0.1, ["no-such-program"], needs="no-such-program"),
        everything.Part("last", 0.3, [*PYTHON, "import os; print('four', os.environ['HELLO'])"], variables=hello),
    ]
    began = time.monotonic()
    found = everything.run_all(parts, 40.0, tmp_path, CPU)
    assert time.monotonic() - began < 40
    statuses = [entry["status"] for entry in found]
    assert statuses[:2] == ["ok", "failed with exit code 3"] and statuses[2:4] == ["took too long"] * 2
    assert statuses[4:] == ["left out: there is no no-such-program here", "ok"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"] == found and summary["environment"]["gpu"] is None
    assert summary["backends"]["reference"].startswith("live: PyTorch")
    log = (tmp_path / "log.txt").read_text()
    assert "one" in log and "two" in log and "four world" in log and "===== endless" in log
    assert "what failed so far" in log
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert " ".join(asleep) not in left.splitlines()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_suite_that_is_cut_off_has_told_what_failed(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everything.os, "cpu_count", lambda: 4)
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import time\ndef test_wrong(): assert 1 + 1 == 3\ndef test_right(): pass\n"
        "def test_endless(): time.sleep(60)\ndef test_other(): pass\n"
    )
    command = everything._tests(workers, str(suite))
    assert ("-n" in command) is (workers == 2)
    (found,) = everything.run_all([everything.Part("suite", 1.0, command)], 10.0, tmp_path / "out", CPU)
    assert found["status"] == "took too long"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "FAILED" in log and "::test_wrong" in log and "assert (1 + 1) == 3" in log


def test_a_tool_beside_the_compiler_of_cuda_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "a-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho it looked\n")
    tool.chmod(0o755)
    parts = [everything.Part("looks", 1.0, [tool.name], needs=tool.name)]
    (found,) = everything.run_all(parts, 10.0, tmp_path / "out", CPU)
    assert found["status"] == "ok" and "it looked" in (tmp_path / "out" / "log.txt").read_text()


def test_no_part_begins_after_the_time_is_over(tmp_path: Path) -> None:
    parts = [everything.Part(name, 0.5, [*PYTHON, "import time; time.sleep(90)"]) for name in ("a", "b", "c")]
    found = everything.run_all(parts, 2.2, tmp_path, CPU)
    assert [entry["status"] for entry in found][-1] == "left out: no time left"
    assert sum(entry["seconds"] for entry in found) < 90


def test_the_parts_fit_into_the_time_and_say_what_their_programs_understand(tmp_path: Path) -> None:
    said: dict[tuple[str, ...], set[str]] = {}
    for on_gpu in (True, False):
        for quick in (True, False):
            parts = everything.parts(tmp_path, on_gpu, 522.0, quick)
            assert sum(part.share for part in parts) <= 1
            names = [part.name for part in parts]
            assert len(set(names)) == len(names) and ("ahead" in names) is on_gpu
            if on_gpu:
                assert names.pop(0) == "ahead"  # what all others would wait for
            assert names[0] == "correctness"
            assert ("kernels" in names) is not quick
            alone = [part.name for part in parts if ("OMP_NUM_THREADS", "1") in part.variables]
            assert alone == names[: 1 if quick else 2]  # what is timed has all cores
            assert ("racecheck" in names) is not quick
            for part in parts:
                command = part.command[part.command.index("-m") + 1 :]
                program = tuple(command[:2]) if command[0] == "smi.cli" else (command[0],)
                said.setdefault(program, set()).update(word for word in command if word.startswith("--"))
                files = [word.split("::")[0] for word in command if word.startswith("tests/")]
                assert all((everything.ROOT / file).exists() for file in files)
    assert len(said) == 8
    for program, options in said.items():
        if program[0] == "smi.cli":
            text = CliRunner().invoke(app, [program[1], "--help"], env={"COLUMNS": "250"}).output
        elif program[0] != "pytest":
            command = [sys.executable, "-m", program[0], "--help"]
            text = subprocess.run(command, cwd=everything.ROOT, capture_output=True, text=True, check=True).stdout
        else:
            continue
        assert not [option for option in options if option not in text], program


def test_what_is_left_out_of_the_suites_is_there(tmp_path: Path) -> None:
    (kernels,) = [p.command for p in everything.parts(tmp_path, True, 522.0, quick=False) if p.name == "kernels"]
    collected = [*PYTHON[:1], "-m", "pytest", "--collect-only", "-q", *everything.COMPILING]
    listed = subprocess.run(collected, cwd=everything.ROOT, capture_output=True, text=True).stdout.splitlines()
    for test in everything.COMPILING:
        assert kernels[kernels.index(test) - 1] == "--deselect"
        assert any(line.startswith(test) for line in listed)


def test_results_are_written_whole_and_named_after_the_gpu(tmp_path: Path) -> None:
    record = {"benchmark": "x", "environment": {"gpu": {"name": "NVIDIA H200"}}}
    path = timing.write_result(tmp_path / "new", "x-embedded:teacher", record)
    assert path.name == "x-embedded-teacher-nvidia-h200.json" and json.loads(path.read_text()) == record
    assert timing.write_result(tmp_path, "y", {"environment": {"gpu": None}}).name == "y-cpu.json"
    assert [file.name for file in (tmp_path / "new").iterdir()] == [path.name]


def test_a_machine_without_git_or_nvidia_smi_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000, uuid="0-1")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    where = timing.environment(torch.device("cuda"))
    assert where["commit"] == "not a git checkout"
    assert where["gpu"] == {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    assert timing.write_result(tmp_path, "x", {"environment": where}).name == "x-nvidia-h100-80gb-hbm3.json"


def test_what_compiles_for_minutes_takes_no_time_from_others(tmp_path: Path) -> None:
    parts = {part.name: part.command for part in everything.parts(tmp_path, True, 522.0, quick=False)}
    assert {"SMI", "E32d", "E32s", "A16+graph"} <= set(parts["end_to_end"])
    assert not [name for name, command in parts.items() if "C16" in command]


@pytest.mark.parametrize("reasons", [[], ["there is no nvcc"]])
def test_sanitizers_see_the_cuda_operators_where_there_are_any(
    reasons: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everything.backends, "reasons_against", lambda name: reasons)
    (memcheck,) = [p for p in everything.parts(tmp_path, True, 522.0, quick=True) if p.name == "memcheck"]
    assert memcheck.command[-1] == ("auto" if reasons else "cuda")
    parts = {part.name: part.command for part in everything.parts(tmp_path, True, 522.0, quick=False)}
    quiet = [name for name, command in parts.items() if "--report-api-errors" in command]
    assert quiet == ["memcheck"]  # the others know no such option


# --- compare ---


def test_a_ratio_needs_the_same_result_and_a_difference_beyond_the_spread() -> None:
    slow, fast = [2.0, 2.1, 2.2, 2.1, 2.0], [1.0, 1.1, 1.0, 1.05, 1.0]
    found = compare.verdict({"here": slow, "there": fast}, same=True, difference=1e-4)
    assert found["ratio"] == pytest.approx(2.1) and found["clear"]
    level = compare.verdict({"here": fast, "there": [1.02, 1.0, 1.1, 0.9, 1.0]}, same=True, difference=0.0)
    assert level["ratio"] == pytest.approx(1.0) and not level["clear"]
    assert (
        compare.fails(found, above=2.0) and not compare.fails(found, above=2.2) and not compare.fails(level, above=0.5)
    )
    row = {"what": "deit", "same_patches": True, "difference": 0.0}
    assert "~1.000" in compare.line({**row, **level}) and "~" not in compare.line({**row, **found})
    for same, difference, why in ((False, 0.0, "other patches are kept"), (True, 0.5, "pixels differ by 5.0e-01")):
        failed = compare.verdict({"here": slow, "there": fast}, same, difference)
        assert failed["ratio"] is None and compare.fails(failed, above=9.0)
        assert f"no ratio: {why}" in compare.line({**row, **failed, "same_patches": same, "difference": difference})


def test_both_sides_compute_and_take_turns() -> None:
    """This tree against itself, each in a process of its own."""
    sides = {"here": compare.Side(compare.ROOT), "there": compare.Side(compare.ROOT)}
    try:
        row = compare.compared(sides, "teacher", images=1, steps=1, rounds=5)
    finally:
        for side in sides.values():
            side.end()
    assert row["passed"] and row["same_patches"] and row["difference"] == 0 and row["ratio"] > 0


def test_a_side_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "smi.py").write_text("raise RuntimeError('broken')")
    side = compare.Side(tmp_path)
    with pytest.raises(smi.SmiError, match="cannot run 'teacher'"):
        side.ask(do="make", what="teacher", images=1, file="x")
    side.end()


def test_an_unknown_revision_is_refused_and_leaves_nothing() -> None:
    def trees() -> str:
        command = ["git", "worktree", "list"]
        return subprocess.run(command, cwd=compare.ROOT, capture_output=True, text=True, check=True).stdout

    before = trees()
    refused = pytest.raises(smi.SmiError, match="'no-such-revision' is no revision here")
    with refused, compare.checked_out("no-such-revision"):
        pytest.fail("it was checked out")
    assert trees() == before
