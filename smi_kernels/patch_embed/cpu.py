"""The augmented patch read on compiled operators; signatures and meanings as in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.patch_embed import reference


def embed_tokens(
    images: Tensor,
    keep: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor,
    position: Tensor,
    prefix: Tensor,
    patch_height: int,
    patch_width: int,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.patch_embed.reference.embed_tokens`."""
    if not native.takes(images.dtype, weight.dtype, position.dtype, prefix.dtype):
        return reference.embed_tokens(
            images, keep, offsets, weight, position, prefix, patch_height, patch_width, precision
        )
    B, C, H, W = images.shape
    (D, features), P = weight.shape, prefix.shape[0]
    _grid(H, W, patch_height, patch_width)
    native.expect(
        weight=(weight, (D, C * patch_height * patch_width)),
        position=(position, ((H // patch_height) * (W // patch_width), D)),
        prefix=(prefix, (P, D)),
    )
    patches, cells = read_patches(images, keep, offsets, patch_height, patch_width)
    K = cells.shape[1]
    x, stats = images.new_empty(B, P + K, D), images.new_empty(B * (P + K), -(-D // 64), 2)
    native.call(
        "embed", images.dtype, patches, cells, weight.contiguous(), position.contiguous(), prefix.contiguous(), x,
        stats, B, K, P, D, features,
    )  # fmt: skip
    return x, images.new_empty(0), stats


def embed_tokens_dx(
    dx_low: Tensor, weight: Tensor, prefix_tokens: int, scale: Tensor | None, precision: str = "ieee"
) -> Tensor:
    """As `smi_kernels.patch_embed.reference.embed_tokens_dx`."""
    if not native.takes(dx_low.dtype, weight.dtype, *([] if scale is None else [scale.dtype])):
        return reference.embed_tokens_dx(dx_low, weight, prefix_tokens, scale, precision)
    (B, N, D), features = dx_low.shape, weight.shape[1]
    native.expect(weight=(weight, (D, features)), scale=(scale, (B,)))
    if not 0 <= prefix_tokens <= N:
        raise ValueError(f"prefix_tokens is {prefix_tokens}; expected 0 to {N}, the number of tokens.")
    d_patches = dx_low.new_empty(B, N - prefix_tokens, features)
    native.call(
        "embed_dx", dx_low.dtype, dx_low.contiguous(), weight.contiguous(),
        native.dense(scale), d_patches, B, N - prefix_tokens, prefix_tokens, D, features,
    )  # fmt: skip
    return d_patches


def patches_to_pixels(
    d_patches: Tensor,
    keep: Tensor | None,
    offsets: Tensor | None,
    height: int,
    width: int,
    patch_height: int,
    patch_width: int,
) -> Tensor:
    """As `smi_kernels.patch_embed.reference.patches_to_pixels`."""
    if not native.takes(d_patches.dtype):
        return reference.patches_to_pixels(d_patches, keep, offsets, height, width, patch_height, patch_width)
    grid = _grid(height, width, patch_height, patch_width)
    cells = _cells(keep, offsets, d_patches.shape[0], grid)
    return _scatter(d_patches, cells, offsets, grid)


def read_patches(
    images: Tensor, keep: Tensor | None, offsets: Tensor | None, patch_height: int, patch_width: int
) -> tuple[Tensor, Tensor]:
    """The pixels that `embed_tokens` embeds, (B, K, C * patch_height * patch_width), and the cells they are read at."""
    B, C, H, W = images.shape
    grid = _grid(H, W, patch_height, patch_width)
    cells = _cells(keep, offsets, B, grid)
    patches = images.new_empty(B, cells.shape[1], C * patch_height * patch_width)
    native.call(
        "gather_patches", images.dtype, images.contiguous(), cells, *_augmentation(offsets), patches, B, C,
        cells.shape[1], grid,
    )  # fmt: skip
    return patches, cells


def _grid(H: int, W: int, height: int, width: int) -> tuple[int, int, int, int]:
    if height < 1 or width < 1 or H % height or W % width:
        raise ValueError(f"images are {H} x {W}; expected multiples of the patch size {height} x {width}.")
    return H, W, height, width


def _cells(keep: Tensor | None, offsets: Tensor | None, images: int, grid: tuple[int, int, int, int]) -> Tensor:
    """As `smi_kernels.patch_embed.reference.fed_cells`."""
    H, W, height, width = grid
    cells = (H // height) * (W // width)
    native.expect_offsets(offsets, images)
    if keep is not None:
        native.expect(keep=(keep, (images, keep.shape[-1])))
        native.expect_indices("keep", keep, cells)
    K = cells if keep is None else keep.shape[1]
    found = torch.empty(images, K, dtype=torch.int64, device="cpu")
    native.call_untyped("map_cells", native.dense(keep), *_augmentation(offsets), found, images, K, grid)
    return found


def _augmentation(offsets: Tensor | None) -> tuple[Tensor | None, bool]:
    return (None, False) if offsets is None else (offsets.contiguous(), offsets.shape[0] == 1)


def _scatter(d_patches: Tensor, cells: Tensor, offsets: Tensor | None, grid: tuple[int, int, int, int]) -> Tensor:
    (B, K, features), (H, W, height, width) = d_patches.shape, grid
    C = features // (height * width)
    native.expect(d_patches=(d_patches, (B, cells.shape[1], C * height * width)))
    d_images = d_patches.new_empty(B, C, H, W)
    native.call(
        "scatter_patches", d_patches.dtype, d_patches.contiguous(), cells, *_augmentation(offsets), d_images, B, C, K,
        grid,
    )  # fmt: skip
    return d_images
