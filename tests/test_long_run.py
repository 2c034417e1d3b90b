"""The benchmark of memory: that it sees growth where there is some, and none where there is none."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import pytest
import torch
from small import PRUNED, one_thread, tiny  # noqa: F401

import smi
from benchmarks import long_run, page
from benchmarks.long_run import Sample, growth, look

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
CONFIG = smi.Config(**PRUNED, batch_size=2, snapshots=0)


def test_growth_is_that_of_the_time_after_the_warm_up() -> None:
    """500 MB that double in the warm-up of six minutes and then grow by 12 MB an hour."""
    samples = []
    for second in range(0, 3601, 10):
        warming = 500 + 500 * min(second, 360) / 360
        noise = (-1) ** (second // 10)
        samples.append(Sample(second, warming + 12 * second / 3600 + noise, 70 + noise, 9 + second // 1800))
    found = growth(samples)
    assert found["mb_an_hour"] == pytest.approx(12, abs=0.1) and not found["flat"]
    assert found["tensors_an_hour"] == pytest.approx(0, abs=0.1) and found["files_an_hour"] > 1
    assert found["resident_mb"] == pytest.approx(1006.6, abs=1.5) and found["samples"] == 361
    assert 40 <= len(found["curve"]["resident"]) <= 60
    assert growth([Sample(one.seconds, 800, 1, 1) for one in samples])["flat"]


def test_what_is_held_is_seen(tmp_path: Path) -> None:
    before = look(0.0)
    memory = mmap.mmap(-1, 2**26)  # 67 MB of the system's: an allocator may have as much at hand
    held = [torch.frombuffer(memory, dtype=torch.float32).fill_(1.0), torch.ones(1)]
    with open(tmp_path / "file", "w"):
        after = look(0.0)
    assert after.tensors - before.tensors >= len(held) and after.files == before.files + 1
    assert 50 < after.resident - before.resident < 150


@pytest.mark.parametrize("leak", [0, 50])
def test_a_leak_in_the_loop_shows(leak: int) -> None:
    """An objective that holds on to so many new tensors at every iteration."""
    held = []

    def leaking(context: smi.Context) -> torch.Tensor:
        held.extend(torch.ones(1) for _ in range(leak))
        return context.images.sum() * 0

    model = smi.SparseModel(tiny(), backend="reference")
    found = long_run.measure(model, CONFIG, 0.1, 0, objectives=[leaking])
    assert found["batches"] and found["images"] == 2 * found["batches"]
    assert 0 <= found["samples"] - CONFIG.iterations * found["batches"] < CONFIG.iterations, "of a batch half done"
    tensors = found["curve"]["tensors"]
    assert (tensors[-1] - tensors[0] > 500) == bool(leak)


def test_the_command_writes_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smi, "preset", lambda name: CONFIG)
    arguments = ["--minutes", "0.08", "--every", "0", "--batch-size", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["long_run", *arguments])
    threads = torch.get_num_threads()
    long_run.main()
    torch.set_num_threads(threads)
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert file.name == "long_run-embedded-teacher-cpu.json"
    assert record["images"] == 3 * record["batches"] and record["samples"] >= CONFIG.iterations * record["batches"]
    text = page.long_run(record, "here")
    assert f"| {record['images']} | {record['batches']} | {record['resident_mb']:.0f} |" in text
