"""The measuring tools, and that the README says what the result files hold. No test here depends on the clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smi
from benchmarks import readme, sparse_vs_dense, timing
from smi.embedded import load_teacher
from smi.flops import count_flops

ROOT = Path(__file__).parent.parent


def test_the_readme_holds_the_figures_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python -m benchmarks.readme"
    assert readme.results("sparse_vs_dense")
    assert readme.results("agreement")


def test_candidates_take_turns() -> None:
    order: list[str] = []
    times = timing.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device=torch.device("cpu")
    )
    assert order == ["a", "b"] * 3
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) <= row["median"] for row in times.values())


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
