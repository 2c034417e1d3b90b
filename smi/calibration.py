"""Images to calibrate a quantization on: a pool, of sparse images only the kept patches; a folder; or noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi.augment import NOISE, normal_images
from smi.dataset import Fill, fill_dropped, open_filled
from smi.errors import SmiError
from smi.pool import Pool
from smi.state import ModelInfo

MINIMUM = 8  # images; fewer leave a range to chance
Batch = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Calibration:
    """Images for the ranges, and others to compare a finished network on.

    Attributes:
        source: where they come from, for the record.
        images: how many calibrate.
        read: makes an iterator of (images (B, C, H, W) float32 normalised, cells (B, K) int64 or None); patches that
            are not among the cells are not fed. Either all batches have cells or none.
        held_out: (M, C, H, W) float32, images that do not calibrate, all patches.
        sparse: whether batches have cells.
        weights_sha256: of the model that the images were made for, where they were made for one.
    """

    source: dict[str, Any]
    images: int
    read: Callable[[], Iterator[Batch]]
    held_out: Tensor
    sparse: bool = False
    weights_sha256: str | None = None


def from_pool(
    pool: Pool | str | Path,
    *,
    images: int | None = None,
    batch_size: int = 32,
    fill: Fill | None = None,
) -> Calibration:
    """The first images of a pool.

    Args:
        images: how many calibrate; default all but about a tenth, at least one and at most 64, which are held out.
            Those are of other trajectories than the ones that calibrate, with which they would share pixels.
        fill: None feeds the kept patches alone; else all are fed, with dropped ones replaced, see
            `smi.dataset.fill_dropped`.

    Raises:
        SmiError: empty or damaged pool, too few images.
    """
    pool = open_filled(pool, fill or "as-is")
    repeat = pool.config.images_per_trajectory
    count, held = _split(f"the pool {str(pool.path)!r}", len(pool), images, repeat)
    first_held = _whole(count, repeat)
    sparse = fill is None and pool.load(pool.batches[0]).keep.shape[1] < pool.info.num_patches

    def rows(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `start` to `stop` of those present, by batch."""
        at = 0
        for result in pool:
            part = slice(max(start - at, 0), max(stop - at, 0))
            at += len(result.images)
            kept = result.keep[part]
            if len(kept):
                shown = result.images[part]
                if fill is not None:
                    shown = fill_dropped(shown, kept, result.indices[part], pool.info, pool.config.seed, fill)
                yield shown, kept
            if at >= stop:
                return

    def read() -> Iterator[Batch]:
        for shown, kept in rows(0, count):
            for one, cells in zip(shown.split(batch_size), kept.split(batch_size), strict=True):
                yield one.clone(), cells.clone() if sparse else None

    source = {"kind": "pool", "path": str(pool.path), "fed": "kept patches" if sparse else fill or "all patches"}
    return Calibration(
        source | {"strategy": pool.config.strategy, "seed": pool.config.seed},
        count,
        read,
        torch.cat([shown for shown, _ in rows(first_held, first_held + held)]).clone(),
        sparse,
        pool.info.weights_sha256,
    )


def from_folder(
    folder: str | Path, transform: Callable[[Any], Tensor], *, images: int | None = None, batch_size: int = 32
) -> Calibration:
    """Real pictures, at any depth below `folder`, spread evenly over it; the last ones are held out.

    Raises:
        SmiError: no such folder, too few pictures, one that cannot be read.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

    folder = Path(folder)
    if not folder.is_dir():
        raise SmiError(f"there is no folder {str(folder)!r}; expected one with pictures to calibrate on.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    count, held = _split(f"the folder {str(folder)!r}", len(files), images)
    chosen = [files[place * len(files) // (count + held)] for place in range(count + held)]
    chosen = [file for i, file in enumerate(chosen) if not _is_held(i, count, held)] + [
        file for i, file in enumerate(chosen) if _is_held(i, count, held)
    ]

    def load(part: list[Path]) -> Tensor:
        try:
            return torch.stack([transform(default_loader(str(file))) for file in part])
        except OSError as error:
            raise SmiError(f"a picture cannot be read: {error}. Remove it from {str(folder)!r}.") from None

    def read() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            yield load(chosen[start : min(start + batch_size, count)]), None

    return Calibration({"kind": "folder", "path": str(folder)}, count, read, load(chosen[count:]))


def _is_held(place: int, count: int, held: int) -> bool:
    """Spreads `held` over all places, so that both parts see all classes of a sorted folder."""
    total = count + held
    return (place + 1) * held // total > place * held // total


def from_noise(info: ModelInfo, *, images: int = 32, seed: int = 0, batch_size: int = 32) -> Calibration:
    """Gaussian noise, N(0, 1) in the model's normalised space: the control.

    Raises:
        SmiError: too few images.
    """
    if images < MINIMUM:
        raise SmiError(f"{images} images of noise are to calibrate; expected at least {MINIMUM}.")

    def read() -> Iterator[Batch]:
        for start in range(0, images, batch_size):
            yield normal_images(seed, NOISE, range(start, min(start + batch_size, images)), info.input_size), None

    held_out = normal_images(seed, NOISE, range(images, images + 32), info.input_size)
    return Calibration({"kind": "noise", "seed": seed}, images, read, held_out)


def needed(images: int = MINIMUM, repeat: int = 1) -> int:
    """Images that a source must have to calibrate on so many, where `repeat` at a time are of one trajectory."""
    return _whole(images, repeat) + 1


def _whole(images: int, repeat: int) -> int:
    """Images of the trajectories that the first `images` are of."""
    return -(-images // repeat) * repeat


def _split(what: str, total: int, images: int | None, repeat: int = 1) -> tuple[int, int]:
    """How many images calibrate, and how many are held out. Raises `SmiError` where they are too few."""
    if images is not None and images < MINIMUM:
        raise SmiError(f"{images} images are to calibrate; expected at least {MINIMUM}.")
    wanted = needed(images or MINIMUM, repeat)
    if total < wanted:
        other = "one" if repeat == 1 else "one of another trajectory"
        raise SmiError(
            f"{what} has {total} images; expected at least {wanted}: {wanted - 1} to calibrate and {other} to compare "
            f"on. Make more, or name another source."
        )
    held = max(1, min(64, total // 10))
    count = max((total - held) // repeat * repeat, MINIMUM) if images is None else images
    return count, min(held, total - _whole(count, repeat))
