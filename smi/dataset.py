"""Synthetic images for training: a map-style dataset over a pool in which every image brings its patch mask along."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

import smi_kernels
from smi.augment import FILL, normal_images
from smi.errors import SmiError, did_you_mean
from smi.packed import PackedPool, open_pool
from smi.pool import Pool
from smi.state import ModelInfo, Result

Fill = Literal["black", "mean", "noise", "as-is"]
_MAPPED = 16384  # shards at a time; Linux lets a process map 65530 files unless told otherwise


class SyntheticDataset(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """The images present in a pool, in the order of their numbers.

    An item is (image (C, H, W) float32 normalised, patch mask (N,) bool, target () int64, teacher logits (classes,)
    float32). The mask is True for kept patches, in grid order.

    Args:
        pool: a pool or its folder.
        fill: what dropped patches show, see `fill_dropped`; applied before `transform`.
        transform: any ``torchvision.transforms.v2`` callable; it gets the image and its mask as ``tv_tensors.Image``
            and ``tv_tensors.Mask`` (1, H, W), so that the mask moves with the image. Afterwards a patch counts as kept
            when more than half of its pixels are.

    Raises:
        SmiError: the pool is empty or unusable, `fill` is unknown; on access, the transform does not return an
            (image, mask) pair whose size is a multiple of the patch size.
    """

    def __init__(
        self, pool: Pool | str | Path, *, fill: Fill = "as-is", transform: Callable[..., Any] | None = None
    ) -> None:
        self.pool = open_filled(pool, fill)
        self.fill: Fill = fill
        self.transform = transform
        # Of a folder of shards, which are memory-mapped: what it holds is address space.
        self._open: dict[int, Result] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        result, row = self._locate(item % len(self))
        return make_item(result, row, self.pool, self.fill, self.transform)

    def _locate(self, item: int) -> tuple[Result, int]:
        if isinstance(self.pool, PackedPool):
            return self.pool.load_row(item), 0
        at = bisect_right(self.pool.ends, item)
        batch = self.pool.batches[at]
        if batch not in self._open:
            while len(self._open) >= _MAPPED:
                del self._open[next(iter(self._open))]
            self._open[batch] = self.pool.load(batch)
        return self._open[batch], item - (self.pool.ends[at - 1] if at else 0)


def make_item(
    result: Result, row: int, pool: Pool, fill: Fill, transform: Callable[..., Any] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image `row` of `result` as an item of a `SyntheticDataset`, with no memory of the pool's."""
    one = slice(row, row + 1)
    info, keep = pool.info, result.keep[one]
    filled = fill_dropped(result.images[one], keep, result.indices[one], info, pool.config.seed, fill)
    image, mask = filled[0], patch_mask(keep, info.num_patches)
    if transform is not None:
        image, mask = _transformed(image, pixel_mask(mask, info), info, transform)
    return image, mask.flatten(), result.targets[row].clone(), result.logits[row].clone()


def _transformed(image: Tensor, mask: Tensor, info: ModelInfo, transform: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """(C, H, W), (1, H, W) bool -> (C, H', W'), (N',) bool."""
    from torchvision import tv_tensors

    pair = transform(tv_tensors.Image(image), tv_tensors.Mask(mask.to(torch.uint8)))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        raise SmiError("the transform does not return an (image, mask) pair; use one of torchvision.transforms.v2.")
    image, mask = (x.as_subclass(Tensor) for x in pair)
    height, width = info.patch_size
    size = tuple(image.shape[-2:])
    if size != tuple(mask.shape[-2:]) or size[0] % height or size[1] % width:
        raise SmiError(
            f"the transform returns an image of {size} and a mask of {tuple(mask.shape[-2:])} pixels; expected the "
            f"same multiple of the patch size {(height, width)} for both."
        )
    return image, torch.nn.functional.avg_pool2d(mask.float(), (height, width)) > 0.5


def open_filled(pool: Pool | str | Path, fill: str) -> Pool:
    """The pool, opened and with at least one image. Raises `SmiError` if it is empty or `fill` is unknown."""
    check_fill(fill)
    pool = pool if isinstance(pool, Pool) else open_pool(pool)
    if not len(pool):
        raise SmiError(f"the pool {str(pool.path)!r} holds no finished batch yet; run its inversion first.")
    return pool


def check_fill(fill: str) -> None:
    if fill not in get_args(Fill):
        raise SmiError(f"fill is {fill!r}.{did_you_mean(str(fill), get_args(Fill))}")


def patch_mask(keep: Tensor, num_patches: int) -> Tensor:
    """(B, K) int64 patch indices -> (B, N) bool, True for kept patches."""
    return torch.zeros(len(keep), num_patches, dtype=torch.bool).scatter_(1, keep, True)


def pixel_mask(patches: Tensor, info: ModelInfo) -> Tensor:
    """(B, N) patch mask -> (B, H, W) pixel mask."""
    return smi_kernels.patch_mask(patches, info.grid, info.patch_size)[:, 0]


def fill_dropped(images: Tensor, keep: Tensor, indices: Tensor, info: ModelInfo, seed: int, fill: Fill) -> Tensor:
    """A copy of `images` in which the pixels of dropped patches are replaced.

    ``black`` is pixel value 0 of the picture, ``mean`` the mean of the training data (0 in normalised space),
    ``noise`` N(0, 1) in normalised space, the same whenever image and seed are; ``as-is`` replaces nothing.

    Args:
        images: (B, C, H, W) float32, normalised.
        keep: (B, K) int64.
        indices: (B,) int64 image numbers.
    """
    if fill == "as-is":
        return images.clone()
    if fill == "noise":
        value = normal_images(seed, FILL, indices.tolist(), info.input_size)
    else:
        black = -torch.tensor(info.mean, dtype=torch.float32) / torch.tensor(info.std, dtype=torch.float32)
        value = (black if fill == "black" else torch.zeros_like(black))[:, None, None]
    return torch.where(pixel_mask(patch_mask(keep, info.num_patches), info)[:, None], images, value)
