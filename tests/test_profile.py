"""Profiles: what is counted is what another counter counts, and measuring leaves no trace. No test needs a clock."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import BACKENDS, DEVICE
from small import tiny
from typer.testing import CliRunner

import smi
import smi_kernels
from benchmarks import timing
from smi.cli import app
from smi.flops import count_flops
from smi.profile import profile

needs_operators = pytest.mark.skipif(BACKENDS[-1] == "triton" and DEVICE == "cpu", reason="no compiled operators")


@needs_operators
@pytest.mark.parametrize("kept", [16, 5])
def test_operations_counted_are_those_of_torchs_counter(kept: int) -> None:
    """A model that reads the mean of all patches, so that the fused network leaves nothing out."""
    model = smi.SparseModel(tiny(global_pool="avg", fc_norm=True).to(DEVICE), ranking="class_attention")
    found = profile(model, batch_size=3, kept=kept, repeats=1)
    flops = sum(row.flops_per_second * row.seconds for row in found.rows)
    assert flops == pytest.approx(3 * count_flops(model, kept), rel=1e-6)
    assert sum(row.share for row in found.rows) == pytest.approx(1)


@needs_operators
def test_calls_are_those_of_one_iteration_and_leave_no_trace() -> None:
    model = smi.SparseModel(tiny(depth=3).to(DEVICE))
    inversion = smi.Inversion(model, [0, 1], smi.Config(iterations=9, prune_at=(), prune_ratio=()))
    inversion.step()
    before = [inversion.images.clone(), inversion._descent.exp_avg.clone()]  # type: ignore[union-attr]
    with smi_kernels.record_operations() as operations, smi_kernels.use_backend(model.backend):
        inversion._descent.rank(4)  # type: ignore[union-attr]
    calls: dict[str, int] = {}
    for operation in operations:
        calls[operation.name] = calls.get(operation.name, 0) + operation.calls
    # 3 blocks: qkv of two, key-value and query of the last, the head; no backward.
    assert calls == {
        "embed_tokens": 1, "norm_linear": 5, "attention": 2, "class_attention": 1, "linear_residual": 6,
        "norm_linear_gelu": 3, "rank_tokens": 1,
    }  # fmt: skip
    with smi_kernels.record_operations() as operations:
        inversion.step()
    after = [inversion.images.clone(), inversion._descent.exp_avg.clone()]  # type: ignore[union-attr]
    with smi_kernels.use_backend(model.backend):
        for operation in operations:
            operation.measure(model.device, repeats=2, rounds=1)
            assert operation.seconds > 0 and operation.bytes > 0
    assert not torch.equal(before[0], after[0])
    assert torch.equal(inversion.images, after[0])
    assert torch.equal(inversion._descent.exp_avg, after[1])  # type: ignore[union-attr]


def test_bytes_are_operands_once_and_what_is_changed_twice() -> None:
    images, state = torch.randn(2, 3, 8, 8), [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)]
    bounds = {"low": torch.zeros(3), "high": torch.ones(3)}
    with smi_kernels.record_operations() as operations:
        smi_kernels.adam_clamp_(images, images.clone(), *state, step=1, lr=0.1, beta1=0.5, beta2=0.9, eps=0, **bounds)
    assert [operation.name for operation in operations] == ["adam_clamp_"]
    assert operations[0].bytes == 4 * (384 * 7 + 6)  # three read and written, the gradient read; two bounds of 3
    assert operations[0].flops == 0


@needs_operators
def test_calls_with_other_options_are_other_operations() -> None:
    dy, weight, scores = torch.randn(4, 8), torch.randn(8, 6), torch.randn(2, 5)
    keep, stats, row = torch.arange(5).repeat(2, 1), torch.zeros(4, 1, 2), torch.zeros(8)
    images, bounds = torch.randn(2, 1, 4, 4), {"low": torch.zeros(1), "high": torch.ones(1)}
    with smi_kernels.use_backend("reference"), smi_kernels.record_operations() as operations:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.ops.smi.linear_dx(dy, weight, dtype, "ieee")
        for count in (2, 3):
            smi_kernels.select_tokens(scores, keep, count)
        for kind, eps in (("erf", 0.1), ("tanh", 0.1), ("erf", 0.2)):
            torch.ops.smi.norm_linear_gelu(dy[:, :6], stats, weight, row, row, eps, "ieee", kind)
        for step in (1, 2):
            rates = {"lr": 0.1 / step, "beta1": 0.5, "beta2": 0.9, "eps": 0.0}
            smi_kernels.adam_clamp_(images, images, images.clone(), images.clone(), step=step, **rates, **bounds)
    assert [(operation.name, operation.calls) for operation in operations] == [
        ("linear_dx", 2), ("linear_dx", 1), ("select_tokens", 1), ("select_tokens", 1),
        ("norm_linear_gelu", 2), ("norm_linear_gelu", 1), ("adam_clamp_", 2),
    ]  # fmt: skip
    assert operations[0].bytes + 4 * 6 * 4 == operations[1].bytes  # whose result is twice as wide


def test_the_command_prints_a_table_or_json_and_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "one.json"
    args = ["profile", "--batch-size", "2", "--kept", "16", "--trace", str(path), "--device", DEVICE]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert "2 images, 16 patches" in shown.output and "iteration" in shown.output and "ceilings" in shown.output
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"block 0 forward", "block 3 backward", "pixel step"} <= names
    found: dict[str, Any] = json.loads(CliRunner().invoke(app, [*args[:5], "--json", "--device", DEVICE]).output)
    assert found["kept"] == 16 and found["trace"] is None
    assert {"attention", "pixel_step", "norm_linear_gelu"} <= {row["name"] for row in found["rows"]}
    for row in found["rows"]:  # whole, in a narrow terminal too
        assert re.search(
            rf"(?m)^{row['name']} +{'x'.join(map(str, row['shape'])) if DEVICE == 'cpu' else ''}", shown.output
        )


def test_what_cannot_be_profiled_is_said() -> None:
    with pytest.raises(smi.SmiError, match=r"runs on timm's own modules here.*the reference was asked for"):
        profile(smi.SparseModel(tiny(), backend="reference"))
    wrong = CliRunner().invoke(app, ["profile", "--tool", "vtune"])
    assert wrong.exit_code == 2 and "--tool is 'vtune'; expected proton or ncu" in wrong.output


@needs_operators
def test_a_trace_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smi_kernels, "record_operations", lambda: pytest.fail("measured"))
    model, file = smi.SparseModel(tiny().to(DEVICE)), tmp_path / "file"
    file.write_text("")
    for path in (file / "trace.json", tmp_path):
        with pytest.raises(smi.SmiError, match=f"cannot write to '{path}'"):
            profile(model, batch_size=1, trace=path)
    assert list(tmp_path.iterdir()) == [file]


@needs_operators
def test_the_number_of_patches_is_checked() -> None:
    with pytest.raises(smi.SmiError, match="kept is 17; expected 1 to 16"):
        profile(smi.SparseModel(tiny().to(DEVICE)), kept=17)


class Simulated:
    """A host and a device with a clock each, in microseconds: what is launched begins when both are ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = self.worked = 0.0
        self.current: list[torch.device] = []
        self.recorded_on: list[torch.device] = []
        clocks = self

        @contextlib.contextmanager
        def current(device: torch.device) -> Iterator[None]:
            clocks.current.append(device)
            yield
            clocks.current.pop()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                clocks.recorded_on += clocks.current[-1:]
                clocks.launch(1.0, 0.0)
                self.at = clocks.device

            def synchronize(self) -> None:
                clocks.host = max(clocks.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) / 1e3  # milliseconds

        class Graph:
            def __init__(self, body: Any, device: torch.device) -> None:
                clocks.worked = 0.0
                body()
                self.takes = clocks.worked  # captured, the device alone counts

            def replay(self) -> None:
                clocks.launch(12.0, self.takes)

        monkeypatch.setattr(torch.cuda, "device", current)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr("smi_kernels.graphs.Graph", Graph)

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device
        self.worked += device


def test_on_a_gpu_no_launch_of_the_host_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, cuda = Simulated(monkeypatch), torch.device("cuda", 1)

    def body() -> None:
        clocks.launch(90.0, 3.0)

    assert smi_kernels.timed(body, cuda, repeats=10, rounds=3) == pytest.approx([3e-6] * 3)
    assert clocks.recorded_on == [cuda] * 6  # of whatever other is the current one

    class Evicted:
        def add_(self, _: int) -> None:
            clocks.launch(5.0, 2 * 2**28 / 3.35e6)  # bytes a microsecond of an H100

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Evicted())
    body_of_several = [lambda: clocks.launch(90.0, 3.0), lambda: (clocks.launch(120.0, 2.0), clocks.launch(120.0, 2.0))]
    found = [timing._cold(each, cuda, rounds=2) for each in body_of_several]
    assert found == [pytest.approx([3e-6] * 2), pytest.approx([4e-6] * 2)]
