"""docs/scale.md: the page is that of its files, and its arithmetic can be done by hand."""

from __future__ import annotations

import json

import pytest
import timm

import smi
from benchmarks import scale
from smi.flops import count_flops

COUNTED = {
    "preset": "paper-quant",
    "flops_per_image": {scale.MODELS[0]: {"dense": 40e12, "sparse": 10e12}},
    "bytes_per_image": {"pool, shards": 600e3, "pool, pictures": 100e3},
}


def test_the_page_is_that_of_its_files() -> None:
    assert scale.PAGE.read_text() == scale.written(), "run python -m benchmarks.scale"


def test_operations_are_those_of_the_model_and_preset() -> None:
    record = json.loads((scale.RESULTS / "scale-cpu.json").read_text())
    model = smi.SparseModel(timm.create_model(scale.MODELS[0]).eval(), backend="reference")
    preset = smi.preset(record["preset"])
    found = record["flops_per_image"][scale.MODELS[0]]
    assert found["dense"] == preset.iterations * count_flops(model, 196)
    kept, steps = [196, 137, 95, 66, 46], [0, *preset.prune_at, preset.iterations]
    spent = sum((b - a) * count_flops(model, k) for k, a, b in zip(kept, steps, steps[1:], strict=False))
    assert found["sparse"] == spent


def test_prices_follow_from_operations_and_the_assumption() -> None:
    shown = scale.page(COUNTED, None, None)
    rate = scale.ASSUMED * scale.PEAK
    hours = 10e12 / rate * 1e6 / 3600
    assert f"| sparse | 10.0 | 4.00x | {hours:,.0f} | {rate / 10e12:.2f} |" in shown
    assert "| pool, shards | 600.0 | 600 |" in shown and f"{700e3 * rate / 10e12 / 1e6:.1f} MB/s a GPU" in shown
    assert "Not run: `python -m benchmarks.simulate`." in shown


def test_what_is_told_is_held_against_what_was_measured() -> None:
    rows = {"dense": {"gflop_per_image": 200.0}, "sparse strict": {"gflop_per_image": 100.0}}
    cost = {"dense": {"seconds_per_image": 2.0}, "sparse strict": {"seconds_per_image": 1.25}}
    shown = scale.page(COUNTED, None, {"model": "m", "rows": rows, "cost": cost})
    assert "| sparse strict | 1.00 | 1.25 | -20 % |" in shown and "| dense | 2.00 | 2.00 | +0 % |" in shown


@pytest.mark.parametrize("images", [2])
def test_bytes_are_weighed_on_disk(images: int) -> None:
    pytest.importorskip("pyarrow")
    found = scale.weigh(images)
    assert found["pool, shards"] > 3 * 224 * 224 * 4 and all(size > 0 for size in found.values())
