"""Every random number of an inversion, drawn ahead from per-image streams of one explicit seed.

A stream is a counter-based Philox generator keyed by (seed, purpose, image number): image i gets the same noise and the
same augmentations in whatever batch, order, process or run it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from smi.config import Config

NOISE, AUGMENT, RANKING, FILL, ORDER = range(5)
_NEXT_SEED = 1_000_003  # how far the seeds lie apart that a batch is tried with


def seed_of(seed: int, tries: int) -> int:
    """The seed of a batch that took so many tries (see `smi.run.invert_batch`) in a pool of `seed`."""
    return seed + (tries - 1) * _NEXT_SEED


def stream(seed: int, purpose: int, *which: int) -> np.random.Generator:
    """The random stream of one purpose of one image, or of whatever else `which` numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(purpose, *which))))


def normal_images(seed: int, purpose: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, N(0, 1), one stream for each image."""
    return torch.from_numpy(
        np.stack([stream(seed, purpose, i).standard_normal(shape, dtype=np.float32) for i in indices])
    )


def draw_offsets(
    config: Config, indices: Sequence[int], size: tuple[int, int], patch_size: tuple[int, int], still: Iterable[int]
) -> Tensor:
    """The augmentation of every iteration, drawn before the first.

    Args:
        config: resolved.
        indices: image numbers; draws for the whole batch come from the first one's stream.
        size, patch_size: (height, width) in pixels.
        still: iterations without augmentation.

    Returns:
        (T, B, 3) int64, or (T, 1, 3) when the batch shares its draws: rows of (dy, dx, flip); dy and dx uniform over
        the allowed values within +-floor(size / 8), both ends included.
    """
    streams = [stream(config.seed, AUGMENT, i) for i in (indices if config.augment_per == "image" else indices[:1])]
    table = np.zeros((config.iterations, len(streams), 3), dtype=np.int64)
    for column, rng in enumerate(streams):
        for axis in range(2):
            unit = {"none": 0, "pixel": 1, "patch": patch_size[axis]}[str(config.jitter)]
            reach = size[axis] // 8 // unit if unit else 0
            table[:, column, axis] = unit * rng.integers(-reach, reach, size=config.iterations, endpoint=True)
        if config.flip:
            table[:, column, 2] = rng.integers(0, 2, size=config.iterations)
    table[sorted(still)] = 0
    return torch.from_numpy(table)
