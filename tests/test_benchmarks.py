"""The measuring tools, and that the README says what the result files hold. No test here depends on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import PRUNED, tiny

import smi
import smi_kernels
from benchmarks import int8, page, readme, sparse_vs_dense, timing
from smi.embedded import load_teacher
from smi.flops import count_flops

ROOT = Path(__file__).parent.parent


def test_the_readme_holds_the_figures_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python -m benchmarks.readme"
    made = page.page(readme.results, readme.where)
    assert (ROOT / "docs" / "benchmarks.md").read_text() == made, "run python -m benchmarks.readme"
    assert readme.results("sparse_vs_dense")
    assert readme.results("agreement")


def test_candidates_take_turns() -> None:
    order: list[str] = []
    times = timing.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device=torch.device("cpu")
    )
    assert order == ["a", "b"] * 3
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) <= row["median"] for row in times.values())


def test_what_cannot_be_captured_says_that_its_launches_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "launches" not in timing.quantiles(lambda: None, torch.device("cpu"), 5)

    def spoilt(*_: object) -> None:
        raise RuntimeError("the capture was spoilt")

    monkeypatch.setattr(smi_kernels, "timed", spoilt)
    found = timing.quantiles(lambda: None, torch.device("cpu"), 5)
    assert found["launches"] == 1 and found["low"] <= found["median"] <= found["high"]


def test_the_final_phase_of_the_demo_saves_three_quarters_of_the_operations() -> None:
    model = smi.SparseModel(load_teacher())
    assert count_flops(model, 64) / count_flops(model, 16) > 4


def test_both_measurements_run_and_report_counts() -> None:
    model = smi.SparseModel(load_teacher())
    config = smi.preset("demo").replace(iterations=9, prune_at=(2, 4, 6, 8))
    phases = sparse_vs_dense.final_phase(model, [0, 1], config, steps=1, rounds=1)
    assert (phases["dense"]["kept"], phases["sparse"]["kept"]) == (64, 16)
    whole = sparse_vs_dense.whole_schedule(model, [0, 1], config, rounds=1)
    counted = sum(count_flops(model, kept) * n for kept, n in ((64, 2), (44, 2), (30, 2), (21, 2), (16, 1)))
    assert whole["sparse"]["gflop_per_image"] == pytest.approx(counted / 1e9)
    ratio = sparse_vs_dense.ratios(whole, "seconds")["flop_ratio"]
    assert ratio == pytest.approx(9 * count_flops(model, 64) / counted)


def test_on_a_gpu_the_final_phase_is_timed_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class OnGpu(smi_kernels.PixelDescent):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.in_graphs = True

        def _iterate(self, iterations: int) -> None:
            ran.append("graph" if iterations == 8 else "host")
            super()._iterate(iterations)

    class Graph:
        def __init__(self, body: Any, device: torch.device) -> None:
            self.replay = body

    monkeypatch.setattr(smi_kernels, "PixelDescent", OnGpu)
    monkeypatch.setattr("smi_kernels.descent.Graph", Graph)
    taken = {"model": smi.SparseModel(tiny()), "targets": [0, 1], "config": smi.Config(**PRUNED)}
    monkeypatch.setattr(sparse_vs_dense, "interleaved", lambda *args, **options: ran.clear() or timed(*args, **options))
    timed = timing.interleaved
    sparse_vs_dense.final_phase(**taken, steps=8, rounds=2)
    assert ran == ["graph"] * 4


def test_the_page_says_what_is_not_measured_and_shows_what_is() -> None:
    nothing = page.page(lambda _: [], readme.where)
    assert "at least 2.2x over C16 | not measured" in nothing
    shown_by = ("end_to_end", "operations", "scaling", "table_of_truth", "int8", "hallucination", "rankings")
    for module in (*shown_by, "when_to_prune"):
        assert f"Not measured: `python -m benchmarks.{module}`." in nothing

    times = {"median": 2e-6, "low": 1e-6, "high": 3e-6}
    slower = {"median": 8e-6, "low": 7e-6, "high": 9e-6}
    row = {"operator": "attention", "shape": [2, 3], "calls": 12, "bytes": 4000, "flops": 8000, "passes": True}
    row |= {"warm": times, "cold": slower, "rivals": {"plain PyTorch": slower, "SDPA math": times}}
    where = {"gpu": None, "cpu": "a CPU", "cpu_threads": 2, "torch": "2", "commit": "abc"}
    about = {"model": "deit", "kept": 46, "batch_size": 8, "precision": "fp32", "backend": "cpu", "rounds": 5}
    record = {**about, "environment": where, "ceilings": {"copy": 1e9, "matmul": 2e9}, "rows": [row]}
    line = page.operations(record, "here").splitlines()[-1]
    assert line == "| `attention` | 2x3 | 12 | 2.0 (1.0-3.0) | 8.0 | 2.0 | 4.0 | SDPA math ~1.00x |  |"
    by_host = {**row, "rivals": {"SDPA flash": {**times, "launches": 1.0}}}
    assert "SDPA flash ~1.00x with launches |" in page.operations({**record, "rows": [by_host]}, "here")
    failed = page.operations({**record, "rows": [{**row, "passes": False}]}, "here").splitlines()[-1]
    assert "gate failed" in failed and "1.00x" not in failed

    axis = {"rows": [{"kept": k, "seconds": {"median": m}} for k, m in ((46, 0.01), (95, 0.000237))], "exponent": None}
    grown = page.scaling({"precision": "fp32", "environment": where, "axes": {"kept": axis}}, "here")
    assert "| kept | not fitted | 46: 10.0, 95: 0.237 |" in grown and "results/scaling-fp32-cpu.png" in grown

    cells = {"W4A4 mse": [{"top1": 0.5}, {"top1": 0.6}], "linear probe": [{"top1": 0.7}, {"top1": 0.7}]}
    rows = {"real images": {"images": 40, "gflop_per_image": 0.0, "cells": cells}}
    rows["dense"] = {"images": 40, "gflop_per_image": 2.0, "cells": cells}
    table = {"rows": rows, "seeds": [1, 2], "limit": 2000, "model": "m", "teacher_top1": 0.8, "preset": "demo"}
    table |= {"images": 40, "calibrating": 32, "environment": where}
    cost = {"dense": {"seconds_per_image": 1.5, "peak_bytes": None, "spread": 0.1}}
    shown = page.truth({**table, "cost": cost}, "here")
    assert "| dense | 55.0 +- 7.1 |" in shown and "| real images | 70.0 +- 0.0 |" in shown
    assert "| dense | 40 | 0.1 | 60 | not measured |" in shown and "| real images | 40 | 0 | 0 | 0 |" in shown
    assert "| dense | 40 | 0.1 | not measured | not measured |" in page.truth({**table, "cost": {}}, "here")

    sides = {"float32": {"median": 0.2, "spread": 0.1}, "int8": {"median": 0.1, "spread": 0.1}}
    bits = {"seconds": sides, "bytes": {"float32": 4e6, "int8": 1e6}, "speed_up": 2.0, "passed": True, "rounds": 3}
    bits |= {"model": "m", "random_weights": True, "batch_size": 4, "errors": {"quantized": 0.1, "compiled": 0.01}}
    assert "| W8A8 | 100.0 | 2.00x | 1.0 |" in page.int8(bits, "here")
    sides["int8"]["spread"] = 1.5
    assert "| ~2.00x |" in page.int8(bits, "here") and "gate failed" in page.int8({**bits, "passed": False}, "here")

    told = {"random": {"model": [0.75], "judge": [0.25]}, "x, last": {"model": [0.5], "judge": [0.125]}}
    real = {"images": 9, "told": {choice: {"model": by["model"]} for choice, by in told.items()}}
    ranked = {"model": "m", "patches": 64, "kept": [16], "draws": 3}
    shown = page.rankings({**ranked, "sets": {"real": real, "dense": {"images": 7, "told": told}}}, "here")
    assert "| kept | real: 16 | dense: 16 |" in shown and "| x, last | 50 | 12 |" in shown

    waited = {"model": "m", "preset": "demo", "images": 9, "seeds": [1, 2]}
    waited["config"] = {"iterations": 400, "prune_at": [40, 80]}
    waited["cells"] = {
        "sparse": {"40": [{"judge": 0.5, "gflop_per_image": 2.0}, {"judge": 0.6, "gflop_per_image": 2.0}]},
        "random": {"40": [{"judge": 0.25, "gflop_per_image": 2.0}, {"judge": 0.25, "gflop_per_image": 2.0}]},
    }
    shown = page.when_to_prune(waited, "here")
    assert "| first pruning | sparse | random | GFLOP an image |" in shown
    assert "| 40 | 55.0 +- 7.1 | 25.0 +- 0.0 | 2 |" in shown

    tests = {"matched": 0.9, "shifted": 0.5, "conflicting": 0.1, "attention_outside": 0.8, "gradient_outside": 0.7}
    drawn = {"seeds": [1], "matched": 0.9, "images": 10, "teacher": tests, "environment": {"gpu": None}}
    drawn["reader"] = dict.fromkeys(("shape", "ground", "shape in a quarter", "ground in a quarter"), 0.5)
    drawn["rows"] = {"dense": [tests | {"shape": 0.6, "ground": 0.2}]}
    shown = page.hallucination(drawn, "here")
    assert "| dense | 60.0 | 20.0 | 90.0 | 50.0 | 10.0 | 0.80 | 0.70 |" in shown
    assert "| the teacher itself |  |  | 90.0 |" in shown and "hallucination-cpu.png" in shown


def test_integers_are_timed_against_float_only_where_compiling_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(int8, "compiled", lambda network, *_: network)  # inductor takes a minute
    found = int8.measure(load_teacher(), "teacher", 4, 1)
    assert found["errors"]["compiled"] == 0 < found["errors"]["quantized"] < 0.5 and found["speed_up"] > 0
    assert 2.6e6 < found["bytes"]["int8"] < 0.4 * found["bytes"]["float32"]
    monkeypatch.setattr(int8, "compiled", lambda network, *_: lambda images: -network(images))
    assert int8.measure(load_teacher(), "teacher", 4, 1)["speed_up"] is None
