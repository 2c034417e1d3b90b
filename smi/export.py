"""A pool in the forms other programs read: an image folder, NumPy arrays, calibration data for onnxruntime."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smi._version import __version__
from smi.augment import seed_of
from smi.config import Config
from smi.dataset import Fill, check_fill, fill_dropped, open_filled, patch_mask
from smi.errors import SmiError, did_you_mean
from smi.files import put_folder, temp_folder, writing
from smi.pool import Pool, encode_png, slug, to_pixels
from smi.state import ModelInfo, Result

FORMATS = ("imagefolder", "npy")
_OWN_FILE = re.compile(r"README\.md|metadata\.jsonl|(images|targets|keep|logits)\.npy|[a-z0-9-]+/\d{6,}\.png")
_OWN_FOLDER = re.compile(r"[a-z0-9-]+")


def export_pool(
    pool: Pool | str | Path, out: str | Path, format: str, *, fill: Fill = "as-is", overwrite: bool = False
) -> Path:
    """Write the images present in `pool` to the new folder `out`, which appears only when all of it is there.

    ``imagefolder``: ``out/<class label>/<image number>.png`` and ``out/metadata.jsonl``, one line for each image with
    file_name (relative), label, target, kept (number of patches), keep (their indices), confidence (the teacher's
    softmax of the target), logits (the teacher's), losses (of the finished image, unweighted) and seed. ``npy``:
    ``out/images.npy`` (N, C, H, W) float32 in the model's normalised space, ``targets.npy`` (N,) int64, ``keep.npy``
    (N, patches) bool and ``logits.npy`` (N, classes) float32. With both ``out/README.md``, which says what the images
    are. Memory is bounded by one batch.

    Args:
        fill: what dropped patches show, see `smi.dataset.fill_dropped`.
        overwrite: replace an earlier export; a folder that holds anything else is never touched.

    Returns:
        `out`, absolute.

    Raises:
        SmiError: unknown format or fill, empty or damaged pool, `out` exists, full disk, read-only folder.
    """
    if format not in FORMATS:
        raise SmiError(f"unknown export format {format!r}.{did_you_mean(str(format), FORMATS)}")
    pool = open_filled(pool, fill)
    made = _Made(pool.info, pool.config, len(pool), pool.manifest["created"][:10])
    return _export(made, pool, out, format, fill, overwrite)


def save_result(result: Result, out: str | Path, *, fill: Fill = "as-is", overwrite: bool = False) -> Path:
    """The ``imagefolder`` of `export_pool` out of what `smi.invert` returned; see `smi.Result.save`."""
    check_fill(fill)
    if result.info is None or result.config is None:
        raise SmiError("this result was read from a pool; export the pool, with smi.export.export_pool(pool, ...).")
    made = _Made(result.info, result.config, len(result.images), f"{datetime.date.today()}")
    return _export(made, [result], out, "imagefolder", fill, overwrite)


@dataclass(frozen=True)
class _Made:
    """What all images of an export have in common."""

    info: ModelInfo
    config: Config
    images: int
    day: str


def _export(made: _Made, results: Iterable[Result], out: str | Path, format: str, fill: Fill, overwrite: bool) -> Path:
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        if not overwrite:
            raise SmiError(f"{str(out)!r} already exists; choose another folder, or replace it with overwrite.")
        if not _is_export(out):
            raise SmiError(
                f"{str(out)!r} holds more than an earlier export and is not replaced; choose another folder."
            )
    info = made.info
    # Eight-bit pictures are packed, of which the raw size is a bound; what is told beside them is about that.
    told = 20 * info.num_classes + 8 * info.num_patches
    room = made.images * (math.prod(info.input_size) * (1 if format == "imagefolder" else 4) + told)
    with writing(out, room), temp_folder(out) as temp:
        filled = _filled(results, info, made.config.seed, fill)
        (_write_imagefolder if format == "imagefolder" else _write_npy)(made, filled, temp)
        (temp / "README.md").write_text(_card(made, format, fill), encoding="utf-8")
        put_folder(temp, out, replace=overwrite)
    return out


class CalibrationReader:
    """Feeds a pool to ``onnxruntime.quantization`` as a ``CalibrationDataReader``, which is recognised by `get_next`.

    Args:
        pool: a pool or its folder.
        input_name: name of the ONNX model's image input, which takes images normalised as the pool's model does.
        batch_size: images for each call; the last may have fewer.
        fill: what dropped patches show, see `smi.dataset.fill_dropped`.

    Raises:
        SmiError: empty or unusable pool, unknown fill, `batch_size` below 1; a damaged shard when it is reached.
    """

    def __init__(self, pool: Pool | str | Path, input_name: str, batch_size: int = 1, fill: Fill = "as-is") -> None:
        if batch_size < 1:
            raise SmiError(f"batch_size is {batch_size}; expected at least 1.")
        self.pool, self.input_name, self.batch_size = open_filled(pool, fill), input_name, batch_size
        self.fill: Fill = fill
        self.rewind()

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """{input_name: (batch, C, H, W) float32}, or None after the last image."""
        images = next(self._batches, None)
        return None if images is None else {self.input_name: images.numpy()}

    def rewind(self) -> None:
        """Start again with the first image."""
        self._batches = self._rebatched()

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        return iter(self.get_next, None)

    def _rebatched(self) -> Iterator[Tensor]:
        waiting = torch.empty(0, *self.pool.info.input_size)
        for images, _ in _filled(self.pool, self.pool.info, self.pool.config.seed, self.fill):
            waiting = torch.cat([waiting, images])
            while len(waiting) >= self.batch_size:
                yield waiting[: self.batch_size]
                waiting = waiting[self.batch_size :]
        if len(waiting):
            yield waiting


def _filled(results: Iterable[Result], info: ModelInfo, seed: int, fill: Fill) -> Iterator[tuple[Tensor, Result]]:
    """All batches, each with its images (B, C, H, W) float32 filled."""
    for result in results:
        yield fill_dropped(result.images, result.keep, result.indices, info, seed, fill), result


def _write_imagefolder(made: _Made, filled: Iterator[tuple[Tensor, Result]], folder: Path) -> None:
    info = made.info
    names = _class_folders(info)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for images, result in filled:
            pictures = to_pixels(images, info)
            confidence = result.logits.softmax(1).gather(1, result.targets[:, None])[:, 0].tolist()
            for i, (index, target) in enumerate(zip(result.indices.tolist(), result.targets.tolist(), strict=True)):
                file_name = f"{names[target]}/{index:06d}.png"
                os.makedirs(folder / names[target], exist_ok=True)
                (folder / file_name).write_bytes(encode_png(pictures[i]))
                keep = result.keep[i].tolist()
                line = {
                    "file_name": file_name,
                    "label": info.label(target),
                    "target": target,
                    "kept": len(keep),
                    "keep": keep,
                    "confidence": confidence[i],
                    "logits": [round(logit, 5) for logit in result.logits[i].tolist()],
                    "losses": {name: values[i].item() for name, values in result.losses.items()},
                    "seed": seed_of(made.config.seed, result.tries),
                }
                metadata.write(json.dumps(line, ensure_ascii=False) + "\n")


def _class_folders(info: ModelInfo) -> list[str]:
    """A folder name for each class: its label as a slug, with the class index behind it unless slugs tell all apart."""
    slugs = [slug(info.label(target)) for target in range(info.num_classes)]
    if all(slugs) and len(set(slugs)) == len(slugs):
        return slugs
    return [f"{name}-{target}".lstrip("-") for target, name in enumerate(slugs)]


def _write_npy(made: _Made, filled: Iterator[tuple[Tensor, Result]], folder: Path) -> None:
    info = made.info
    rows: dict[str, tuple[str, tuple[int, ...]]] = {
        "images": ("<f4", info.input_size),
        "targets": ("<i8", ()),
        "keep": ("|b1", (info.num_patches,)),
        "logits": ("<f4", (info.num_classes,)),
    }
    with contextlib.ExitStack() as stack:
        # Written, not memory-mapped: on a full disk a write raises, touching a mapped page kills the process.
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in rows}
        for name, (descr, shape) in rows.items():
            header = {"descr": descr, "fortran_order": False, "shape": (made.images, *shape)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for images, result in filled:
            keep = patch_mask(result.keep, info.num_patches)
            for name, values in zip(rows, (images, result.targets, keep, result.logits), strict=True):
                files[name].write(values.numpy().astype(rows[name][0], copy=False).tobytes())


def _card(made: _Made, format: str, fill: Fill) -> str:
    """What the images are, for whoever finds the folder."""
    info, config = made.info, made.config
    held = {
        "imagefolder": """`metadata.jsonl` has a line for each picture: its label, the patches that were inverted, the
model's logits, losses.""",
        "npy": f"""`images.npy` holds what the model is fed: pixels in 0 to 1, less the mean {list(info.mean)}, divided
by the standard deviation {list(info.std)}. `targets.npy`, `keep.npy` (patches that were inverted) and `logits.npy`
(the model's) have a row for each of them.""",
    }
    return f"""# {made.images} synthetic images

Made by Sparse Model Inversion (smi {__version__}) out of the model `{info.name}` alone, each optimised towards one of
its classes. None is a photograph. They can carry traits of the data that the model was trained on.

- model: `{info.name}`, weights with SHA-256 {info.weights_sha256}
- method: {config.strategy}, {config.semantics}, {config.iterations} iterations, seed {config.seed}
- made: {made.day}
- dropped patches: {fill}
- terms: those of the model; read its licence before you pass the images on

{held[format]}
"""


def _is_export(out: Path) -> bool:
    """True for a folder that is empty or holds nothing but what an export writes."""
    if out.is_symlink() or not out.is_dir():
        return False
    paths = [(path, path.relative_to(out).as_posix()) for path in out.rglob("*")]
    own = all((_OWN_FOLDER if path.is_dir() else _OWN_FILE).fullmatch(name) for path, name in paths)
    return own and (not paths or any(name in ("metadata.jsonl", "images.npy") for _, name in paths))
