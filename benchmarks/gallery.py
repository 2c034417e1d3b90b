#!/usr/bin/env python
"""What every method draws out of the embedded teacher from the same seed: one picture, and a page that says how.

    python -m benchmarks.gallery

Each column is a class and starts from the same noise, under the same draws of the augmentation, in every row. Writes
docs/gallery.png and docs/gallery.md; the picture carries the configuration it was made with. On a CPU it takes minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import smi
from smi.dataset import patch_mask, pixel_mask
from smi.devices import resolve_device
from smi.files import atomic_write
from smi.pool import to_pixels
from smi.report_data import Array
from smi.strategies import STRATEGIES

DOCS = Path(__file__).parent.parent / "docs"
MODEL, PRESET, SEED = "embedded:teacher", "demo", 3
RANKINGS = ("class_attention", "received_attention", "attention_rollout", "gradient_input")  # that this teacher has
KEY = "smi-gallery"  # of the text in the picture
_CELL, _GAP, _LABEL, _HEAD = 96, 4, 190, 26  # pixels
_DIM = 0.25  # of a dropped patch, the rest is page
_COLUMNS = ("strategy", "ranking")  # of the table of rows
_PAGE, _INK = (251, 250, 247), (35, 38, 42)


def rows() -> dict[str, dict[str, Any]]:
    """Label -> what differs from the preset. Sparse inversion has a row for each signal that patches are ranked by."""
    found: dict[str, dict[str, Any]] = {}
    for name in STRATEGIES:
        if name == "sparse":
            found |= {f"sparse, {ranking}": {"strategy": name, "ranking": ranking} for ranking in RANKINGS}
        else:
            found[name] = {"strategy": name}
    return found


def config(changes: dict[str, Any]) -> smi.Config:
    return smi.preset(PRESET).replace(seed=SEED, snapshots=0, **changes).resolved()


def settings() -> dict[str, Any]:
    """What the picture depends on, as JSON holds it."""
    info = smi.SparseModel(smi.load_model(MODEL), name=MODEL, device="cpu", backend="reference").info
    made = {
        "model": MODEL,
        "weights_sha256": info.weights_sha256,
        "classes": list(info.class_names),
        "rows": {label: config(changes).to_dict() for label, changes in rows().items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain


def numbers(repeat: int, classes: int) -> list[int]:
    """Image numbers, which key noise and augmentation: the first of a class is the same whatever the method."""
    stride = math.lcm(*(config(changes).images_per_trajectory for changes in rows().values()))
    return [stride * target + part for target in range(classes) for part in range(repeat)]


def draw(changes: dict[str, Any], device: torch.device) -> smi.Result:
    """An image of every class, or as many as come out of a trajectory, class by class."""
    chosen = config(changes)
    model = smi.SparseModel(
        smi.load_model(MODEL),
        name=MODEL,
        device=device,
        ranking=chosen.model_ranking,
        merge_to=chosen.model_merge_to,
    )
    classes, repeat = model.info.num_classes, chosen.images_per_trajectory
    targets = [target for target in range(classes) for _ in range(repeat)]
    return smi.invert(model, targets, chosen, indices=numbers(repeat, classes))


def cells(result: smi.Result, info: smi.ModelInfo) -> Array:
    """(images, CELL, CELL, 3) uint8, dropped patches dimmed towards the colour of the page."""
    pixels = to_pixels(result.images, info).permute(0, 2, 3, 1).float()
    live = pixel_mask(patch_mask(result.keep, info.num_patches), info)[..., None]
    shown = torch.where(live, pixels, _DIM * pixels + (1 - _DIM) * torch.tensor(_PAGE, dtype=torch.float32))
    factor = _CELL // pixels.shape[1]
    sheet: Array = shown.round().byte().numpy().repeat(factor, 1).repeat(factor, 2)
    return sheet


def picture(sheets: dict[str, Array], classes: tuple[str, ...], text: str) -> bytes:
    """PNG: label -> (classes, CELL, CELL, 3), a row each, under the names of the classes; `text` goes into the file."""
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_LABEL + len(classes) * step, _HEAD + len(sheets) * step), _PAGE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, name in enumerate(classes):
        pen.text((_LABEL + column * step, 5), name, fill=_INK, font=font)
    for row, (label, images) in enumerate(sheets.items()):
        top = _HEAD + row * step
        pen.text((6, top + 8), label.replace(", ", "\n").replace("_", " "), fill=_INK, font=font)
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (_LABEL + column * step, top))
    note = PngImagePlugin.PngInfo()
    note.add_itxt(KEY, text, zip=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True, pnginfo=note)
    return buffer.getvalue()


def page(made: dict[str, Any]) -> str:
    """Markdown that says the exact configuration of `made`, the settings."""
    base = config({}).to_dict()
    lines = [
        "# Gallery",
        "",
        "What each method draws from the same teacher and seed; made by `python -m benchmarks.gallery`",
        "(or `make gallery`).",
        "",
        "![images of ten classes, a row for each method](gallery.png)",
        "",
        f"A column is a class of `{made['model']}` (weights {made['weights_sha256'][:12]}) and starts from the same",
        "noise in every row, with the same draws of jitter and flip; nothing was chosen by looks. Dropped patches are",
        "dimmed: dense inversion drops none. `random` keeps as many patches as `sparse`, chosen at random. A method",
        "whose trajectories give several images has a row for each, in the order in which they leave.",
        "",
        "Ten images show what a method's images look like, not which method is better: for that there is",
        "`smi compare`. The preset was chosen for sparse inversion with class attention; other methods may have better",
        "settings of their own.",
        "",
        "## Configuration",
        "",
        f"Preset `{PRESET}` with seed {SEED}, one batch of all {len(made['classes'])} classes:",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {key} | {_shown(value)} |" for key, value in base.items() if key not in _COLUMNS),
        "",
        "| row | strategy | ranking | what else differs |",
        "|---|---|---|---|",
    ]
    for label, whole in made["rows"].items():
        rest = {k: v for k, v in whole.items() if v != json.loads(json.dumps(base[k])) and k not in _COLUMNS}
        others = ", ".join(f"{key} {_shown(value)}" for key, value in rest.items()) or "nothing"
        lines.append(f"| {label} | {whole['strategy']} | {whole['ranking']} | {others} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, (list, tuple)) else f"{value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone, where the picture is still right")
    made = settings()
    if not parser.parse_args().page:
        atomic_write(DOCS / "gallery.png", drawn(made))
    atomic_write(DOCS / "gallery.md", page(made).encode())
    print(f"written to {DOCS}")


def drawn(made: dict[str, Any]) -> bytes:
    """The picture of `made`, the settings."""
    info = smi.SparseModel(smi.load_model(MODEL), name=MODEL, device="cpu", backend="reference").info
    sheets: dict[str, Array] = {}
    for label, changes in rows().items():
        repeat = config(changes).images_per_trajectory
        images = cells(draw(changes, resolve_device("auto")), info)
        for part in range(repeat):
            sheets[label if repeat == 1 else f"{label}, image {part + 1} of {repeat}"] = images[part::repeat]
        print(f"{label} done", flush=True)
    return picture(sheets, info.class_names, json.dumps(made))


if __name__ == "__main__":
    main()
