"""The networks inside the package: what their cards say is true of the files, and the demo does what it promises."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smi
from smi.embedded import load_judge, load_teacher
from smi.report_data import Tally

LIMITS = {"teacher": (6_000_000, load_teacher), "judge": (2_000_000, load_judge)}


def card(name: str) -> dict[str, Any]:
    return json.loads((files("smi") / "assets" / f"{name}_cifar10.json").read_text())


@pytest.mark.parametrize("name", LIMITS)
def test_the_card_belongs_to_the_weights(name: str) -> None:
    limit, load = LIMITS[name]
    weights = Path(str(files("smi") / "assets" / f"{name}_cifar10.safetensors")).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == card(name)["sha256"]
    assert len(weights) == card(name)["bytes"] <= limit
    assert sum(p.numel() for p in load().parameters()) == card(name)["parameters"]
    assert card(name)["test_images"] == 10_000
    assert card(name)["test_top1"] >= 0.65


@pytest.mark.parametrize("name", LIMITS)
def test_the_page_for_people_says_what_the_card_says(name: str) -> None:
    page = (files("smi") / "assets" / "MODEL_CARD.md").read_text()
    assert f"**Test top-1: {card(name)['test_top1']:.2%}**" in page
    assert card(name)["sha256"] in page


@pytest.mark.parametrize("load", [load_teacher, load_judge])
def test_both_see_ten_classes_and_train_no_more(load: Any) -> None:
    network: nn.Module = load()
    assert not network.training
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_demo_convinces_the_teacher_and_not_only_it() -> None:
    """Sparse images of the demo preset: the teacher agrees on 95 % at least, the judge far above its chance of 10 %."""
    model = smi.SparseModel(load_teacher())
    config = smi.preset("demo").replace(seed=7)
    result = smi.invert(model, [i % 10 for i in range(20)], config)
    assert result.keep.shape == (20, 16)
    tally = Tally(model.info, config.resolved(), judge=load_judge())
    tally.add(result)
    found = tally.summary()
    assert found["teacher_agreement"] >= 0.95
    assert found["judge_agreement"]["as-is"] >= 0.5
    assert model.info.label(0) == "airplane"
