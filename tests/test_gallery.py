"""The gallery: page and picture say the script's own configuration, and rows can be compared."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import one_thread  # noqa: F401

import smi
from benchmarks import gallery
from smi.inversion import Inversion
from smi.strategies import STRATEGIES

AGAIN = "run python -m benchmarks.gallery, or with --page where the picture is still right"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = smi.preset("demo").replace(iterations=8, prune_at=(2, 4), prune_ratio=(0.5, 0.5))
    monkeypatch.setitem(smi.PRESETS, "demo", preset)


def test_the_page_has_the_scripts_configuration() -> None:
    made = gallery.settings()
    assert (gallery.DOCS / "gallery.md").read_text() == gallery.page(made), AGAIN
    assert {row["strategy"] for row in made["rows"].values()} == set(STRATEGIES)


def test_the_picture_was_made_with_it() -> None:
    file = gallery.DOCS / "gallery.png"
    with Image.open(file) as picture:
        picture.load()
        drawn, size = json.loads(picture.text[gallery.KEY]), picture.size
    made = gallery.settings()
    assert drawn["rows"].keys() == made["rows"].keys() and drawn["weights_sha256"] == made["weights_sha256"], AGAIN
    for label, config in drawn["rows"].items():  # options that came later, and change nothing, are not in it
        assert config == {key: made["rows"][label].get(key) for key in config}, AGAIN
    images = sum(gallery.config(changes).images_per_trajectory for changes in gallery.rows().values())
    assert size[1] > images * 96 and file.stat().st_size <= 600_000


def test_columns_start_from_the_same_noise() -> None:
    """A dense image and the trajectory of a rebirth image of the same class, at the start."""
    teacher = smi.SparseModel(smi.load_model("embedded:teacher"), backend="reference")
    starts = []
    for name in ("dense", "rebirth"):
        config = gallery.config({"strategy": name})
        repeat = config.images_per_trajectory
        targets = [target for target in range(10) for _ in range(repeat)]
        loop = Inversion(teacher, targets, config, indices=gallery.numbers(repeat, 10))
        starts.append((loop.images.clone(), loop.offsets[0].clone()))
    assert torch.equal(starts[0][0], starts[1][0]) and torch.equal(starts[0][1], starts[1][1])


def test_dropped_patches_are_dimmed_and_rows_are_labelled(short: None) -> None:
    result = gallery.draw({"strategy": "sparse"}, torch.device("cpu"))
    info = smi.SparseModel(smi.load_model("embedded:teacher"), backend="reference").info
    cells = gallery.cells(result, info)
    assert cells.shape == (10, 96, 96, 3)
    mean, std = (np.array(values)[:, None, None] for values in (info.mean, info.std))
    picture = np.clip(result.images[0].numpy() * std + mean, 0, 1).transpose(1, 2, 0) * 255
    kept = set(result.keep[0].tolist())
    for patch in range(64):
        y, x = divmod(patch, 8)
        found, own = cells[0, y * 12, x * 12], picture[y * 4, x * 4]
        wanted = own if patch in kept else 0.25 * own + 0.75 * np.array([251, 250, 247])
        assert np.abs(found - wanted).max() <= 1
    png = gallery.picture({"sparse": cells, "sparse, again": cells}, info.class_names, '{"a": 1}')
    sheet = Image.open(io.BytesIO(png))
    assert sheet.text["smi-gallery"] == '{"a": 1}'
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels[26 : 26 + 96, 190 : 190 + 96], cells[0])
    assert np.array_equal(pixels[126 : 126 + 96, 290 : 290 + 96], cells[1])
    assert (pixels[26 : 26 + 96, :190].min(2) < 100).any()  # a label


def test_the_page_alone_leaves_the_picture(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gallery, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gallery", "--page"])
    gallery.main()
    assert [file.name for file in tmp_path.iterdir()] == ["gallery.md"]
    assert "| iterations | 8 |" in (tmp_path / "gallery.md").read_text()
