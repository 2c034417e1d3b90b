"""Choosing tiles by time: what is tried, what wins, and that the table found is the table used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import tiny

import smi_kernels
from benchmarks import tune
from smi_kernels import tuning
from smi_kernels.launch import count_launches

QUICK = tuning.Tile(64, 64, 64, 4, 2)


def test_the_fastest_wins_and_a_tie_leaves_the_first() -> None:
    def row(tile: int, low: float, high: float) -> dict[str, Any]:
        return {"tile": [tile], "low": low, "median": (low + high) / 2, "high": high}

    rows = [row(1, 2.0, 3.0), row(2, 1.5, 2.1), {"tile": [3], "failed": "registers"}, row(4, 1.0, 1.9)]
    assert tune.best(rows) == [4]
    assert tune.best(rows[:3]) == [1]
    assert tune.best(rows[2:3]) is None


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("fetch", [False, True])
def test_what_is_tried_fits_into_shared_memory_and_has_the_vendor(itemsize: int, fetch: bool) -> None:
    found = tune.tiles([QUICK], itemsize, few=False, fetch=fetch)
    assert found[0] == QUICK and len(set(found)) == len(found) > 20
    fetched = [tile for tile in found if tile.by == "tma"]
    assert bool(fetched) is (fetch and itemsize == 2) and {tile.k for tile in fetched} <= {64}
    few = tune.tiles([QUICK], itemsize, few=True, fetch=fetch)
    assert few == found[: len(few)] and [tile.by for tile in few][:3] == ["pointers", "vendor", "vendor"]
    assert few[3:] == ([QUICK._replace(by="tma")] if fetched else [])
    assert sum(tile.by == "vendor" for tile in found) == 2
    for tile in found:
        assert tile.stages * (tile.m + tile.n) * tile.k * itemsize <= 227 * 1024
        assert tile.n % 64 == 0  # chunks of row statistics are whole
        assert tile.registers * tile.warps * 32 * tile.programs <= 65536


@pytest.mark.skipif(not torch.cuda.is_available() and not smi_kernels.backends.interpreted(), reason="no kernels")
def test_the_table_that_was_found_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.timm, "create_model", lambda name: tiny())
    monkeypatch.setattr(tune, "MATRIX", {"linear_dx"})
    table = tmp_path / "table.json"
    args = ["--table", table, "--models", "tiny", "--batch-sizes", 2, "--kept", 5, "--precision", "fp32", "--few"]
    monkeypatch.setattr(sys, "argv", ["tune", *map(str, args), "--rounds", "5", "--out", str(tmp_path)])
    tune.main()
    (record,) = [json.loads(file.read_text()) for file in tmp_path.glob("tuning-fp32-*.json")]
    found = json.loads(table.read_text())
    assert set(found["shapes"]) == set(record["shapes"]) != set()
    for rows in record["shapes"].values():
        assert all(row["median"] > 0 for row in rows) and rows[-1]["tile"][5] == "vendor"

    monkeypatch.setenv(tuning.USER_TABLE, str(table))
    tuning.shapes.cache_clear()
    shape = next(iter(found["shapes"]))
    M, N, K = map(int, shape.split()[2].split("x"))
    dy, weight = torch.randn(M, K), torch.randn(K, N)
    for tile, kernels in ((tuning.VENDOR, 0), (QUICK, 1)):
        found["shapes"][shape] = list(tile)
        table.write_text(json.dumps(found))
        tuning.shapes.cache_clear()
        with smi_kernels.use_backend("triton"), count_launches() as launches:
            torch.ops.smi.linear_dx(dy, weight, torch.float32, "ieee")
        assert len(launches) == kernels
    monkeypatch.delenv(tuning.USER_TABLE)
    tuning.shapes.cache_clear()
