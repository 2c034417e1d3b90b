"""What stands in front of the figures of single operators: rivals that compute the same, and a gate that shuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import BACKENDS, DEVICE
from small import tiny
from torch import Tensor

import smi
import smi_kernels
from benchmarks import operations, scaling, timing
from smi.profile import in_phase

pytestmark = pytest.mark.skipif(BACKENDS[-1] == "triton" and DEVICE == "cpu", reason="no compiled operators")


@pytest.fixture(scope="module")
def recorded() -> dict[str, smi_kernels.Operation]:
    """The first call of every operator in an iteration."""
    inversion = in_phase(smi.SparseModel(tiny().to(DEVICE)), 2, 5)
    with smi_kernels.record_operations() as found:
        inversion.step()
    return {operation.name: operation for operation in reversed(found)}


def test_every_operator_is_as_near_the_truth_as_plain_pytorch(recorded: dict[str, smi_kernels.Operation]) -> None:
    for operation in recorded.values():
        ours, plain = operations.errors(operation)
        assert ours <= 4 * plain + 1e-6 and plain < 1e-5, operation.name


def test_rivals_compute_the_same(recorded: dict[str, smi_kernels.Operation]) -> None:
    out = recorded["attention"].body()
    B, N, _, H, d = recorded["attention"].arguments["qkv"].shape
    rivals = dict(operations.rivals(recorded["attention"]))
    assert {"plain PyTorch", "SDPA math"} <= rivals.keys()
    for name, body in rivals.items():
        if name.startswith("SDPA"):
            theirs: Any = body()
            torch.testing.assert_close(theirs.transpose(1, 2).reshape(B, N, H * d), out, rtol=1e-4, atol=1e-5)
    dqkv, _ = recorded["attention_dx"].body()
    for name, body in operations.rivals(recorded["attention_dx"]):
        if name.startswith("SDPA"):
            theirs = body()
            torch.testing.assert_close(
                torch.stack([part.transpose(1, 2) for part in theirs], 2), dqkv, rtol=1e-3, atol=1e-6
            )
    product: Any = dict(operations.rivals(recorded["linear_dx"]))[operations.VENDOR]()
    torch.testing.assert_close(product, recorded["linear_dx"].body(), rtol=1e-4, atol=1e-6)


def test_a_backward_of_one_node_needs_no_engine_and_so_can_be_captured(
    recorded: dict[str, smi_kernels.Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = dict(operations.rivals(recorded["attention_dx"]))
    fused = next(name for name in ("SDPA flash", "SDPA efficient") if name in rivals)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("the engine was asked"))
    dqkv, _ = recorded["attention_dx"].body()
    for _ in range(2):  # what is saved stays
        found: Any = rivals[fused]()
        torch.testing.assert_close(torch.stack([p.transpose(1, 2) for p in found], 2), dqkv, rtol=1e-3, atol=1e-6)
        assert not any(part.requires_grad for part in found)


def test_a_wrong_result_gets_no_ratio(recorded: dict[str, smi_kernels.Operation]) -> None:
    good = recorded["linear_dx"]

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = good.function(*args, **kwargs)
        return made if smi_kernels.backends.wanted() == "reference" else made * 1.001

    wrong._schema = good.function._schema  # type: ignore[attr-defined]
    bad = smi_kernels.Operation("linear_dx", (1,), 1, good.flops, good.bytes, arguments=good.arguments, function=wrong)
    device = torch.device(DEVICE)
    rows = [operations.measure(operation, device, (1e9, 1e9), rounds=5) for operation in (good, bad)]
    assert [row["passes"] for row in rows] == [True, False]
    shown = operations.table({"rows": rows}).splitlines()
    assert operations.VENDOR in shown[1] and operations.VENDOR not in shown[2] and "FAILS: error 1.0e-03" in shown[2]


def test_what_fails_costs_nothing_else(
    recorded: dict[str, smi_kernels.Operation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def backward() -> None:
        raise TypeError("no plan\nfor this shape")  # as nodes of autograd that want other arguments

    monkeypatch.setattr(operations, "rivals", lambda _: iter([("broken", backward), ("whole", lambda: None)]))
    row = operations.measure(recorded["linear_dx"], torch.device(DEVICE), (1e9, 1e9), rounds=5)
    assert row["failed"] == {"broken": "TypeError: no plan"} and list(row["rivals"]) == ["whole"]

    def measured(operation: Any, *_: Any) -> dict[str, Any]:
        if operation.name == "attention":
            raise TypeError("out of resources")
        return {**row, "operator": operation.name}

    monkeypatch.setattr(operations, "measure", measured)
    monkeypatch.setattr("timm.create_model", lambda name: tiny())
    monkeypatch.setattr("smi_kernels.ceilings", lambda *_: (1e9, 1e9))
    monkeypatch.setattr("sys.argv", ["operations", "--batch-size", "2", "--kept", "5", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        operations.main()
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["failed"] == {"attention": "TypeError: out of resources"} and not found["left_out"]
    assert {"pixel_step", "linear_dx", "attention_dx"} <= {entry["operator"] for entry in found["rows"]}
    assert "attention FAILS: TypeError: out of resources" in capsys.readouterr().out


def test_differences_within_the_spread_are_marked() -> None:
    narrow, apart, over = ({"low": a, "high": b} for a, b in ((1.0, 1.1), (1.2, 1.3), (1.05, 2.0)))
    assert operations.clear(narrow, apart) and operations.clear(apart, narrow) and not operations.clear(narrow, over)


def test_quantiles_are_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, *(t for n in range(1, 11) for t in (100.0 * n, 100.0 * n + n))])
    next(ticks)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    found = timing.quantiles(lambda: None, torch.device("cpu"), 10, repeats=1, captured=False)
    assert found == {"median": 5.5, "low": 3.0, "high": 8.0}


def test_exponents_are_slopes_of_the_upper_half() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    assert scaling.exponent(sizes, [max(4.0, size**1.5) for size in sizes]) == pytest.approx(1.5)
    assert scaling.exponent([2, 4], [3.0, 6.0]) == pytest.approx(1.0)
    assert scaling.exponent([2], [3.0]) is None
    assert [point.size for point in scaling.points("kept", few=False)] == [224, 224, 224, 320, 384, 512]


def test_what_ends_the_benchmark_of_scaling_leaves_the_points_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(point: scaling.Point, *_: Any) -> dict[str, Any]:
        if point.kept == 196:
            raise KeyboardInterrupt
        return {"kept": point.kept, "seconds": {"median": 1.0}, "gflop": 1.0}

    monkeypatch.setattr(scaling, "measure", measured)
    monkeypatch.setattr("sys.argv", ["scaling", "--few", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        scaling.main()
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())["axes"]["kept"]
    assert [row["kept"] for row in found["rows"]] == [46, 95] and found["exponent"] is None
