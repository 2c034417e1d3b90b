"""The experiment about when to prune: steps are moved together, cells are what the judge says, and are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import one_thread  # noqa: F401

import smi
from benchmarks import when_to_prune
from smi.dataset import patch_mask, pixel_mask
from smi.embedded import load_judge

SHORT = smi.Config(iterations=8, prune_at=(2, 4), prune_ratio=(0.5, 0.5), batch_size=10, snapshots=0)


def test_all_steps_move_and_stay_within_the_run() -> None:
    assert when_to_prune.moved(SHORT, 5).prune_at == (5, 7)
    assert when_to_prune.moved(SHORT, 1).prune_at == (1, 3)
    for start in (0, 6):
        with pytest.raises(SystemExit, match="use 1 to 5"):
            when_to_prune.moved(SHORT, start)


def test_cells_are_what_the_judge_says_of_kept_patches_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(smi.PRESETS, "demo", SHORT)
    command = ["when_to_prune", "--work", str(tmp_path), "--starts", "2", "5", "--images", "10", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--out", str(tmp_path / "out")])
    when_to_prune.main()

    def record() -> dict[str, Any]:
        (file,) = (tmp_path / "out").glob("when_to_prune-*.json")
        return dict(json.loads(file.read_text()))

    first = record()
    cost = {start: found["gflop_per_image"] for start, (found,) in first["cells"]["sparse"].items()}
    assert cost["2"] < cost["5"]

    model = smi.SparseModel(smi.load_model("embedded:teacher"))
    config = SHORT.replace(prune_at=(5, 7), seed=3).resolved()
    result = smi.invert(model, range(10), config)
    live = pixel_mask(patch_mask(result.keep, 64), model.info)[:, None]
    judged = load_judge()(torch.where(live, result.images, torch.zeros(()))).argmax(1)  # zero is the mean
    (found,) = first["cells"]["sparse"]["5"]
    assert found["judge"] == pytest.approx(float((judged == result.targets).double().mean()))

    monkeypatch.setattr(when_to_prune, "measure", lambda *_: pytest.fail("a finished cell was made again"))
    when_to_prune.main()
    assert record()["cells"] == first["cells"]
    monkeypatch.setitem(smi.PRESETS, "demo", SHORT.replace(learning_rate=0.2))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        when_to_prune.main()
