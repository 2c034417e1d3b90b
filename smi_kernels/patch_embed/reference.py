"""Reference of the augmented patch read: roll and flip are index arithmetic, so only pixels of fed patches are touched.

Offsets are in pixels, cells and kept indices in patches. An augmentation is a row (dy, dx, flip) and means
``flip(roll(images, (dy, dx)))`` over height and width; flip (0 or 1) reverses the width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import dtypes
from smi_kernels.dtypes import low
from smi_kernels.linear.reference import row_statistics


def map_cells(keep: Tensor, offsets: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The grid cell at which each kept patch lies once its image was augmented.

    The grid is rolled by the offset in whole patches, rounded half up, then flipped: exact for multiples of the patch
    size, otherwise true to within half a patch. Source: the published behaviour of Hu et al., ICML 2024.

    Args:
        keep: (B, K) int64 patch indices.
        offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip).
        grid: (rows, columns) of the patch grid.
        patch_size: (height, width) in pixels.

    Returns:
        (B, K) int64 cells, in the order of `keep` (not sorted).
    """
    _check_offsets(offsets, keep.shape[0])
    rows, columns = grid
    dy, dx, flip = offsets[:, 0:1], offsets[:, 1:2], offsets[:, 2:3]
    row = (keep // columns + _whole_patches(dy, patch_size[0])) % rows
    column = (keep % columns + _whole_patches(dx, patch_size[1])) % columns
    column = torch.where(flip.bool(), columns - 1 - column, column)
    return row * columns + column


def _whole_patches(offset: Tensor, patch: int) -> Tensor:
    whole = torch.div(offset, patch, rounding_mode="floor")
    return whole + (2 * (offset - whole * patch) >= patch).to(offset.dtype)


def gather_patches(images: Tensor, cells: Tensor, offsets: Tensor | None, patch_size: tuple[int, int]) -> Tensor:
    """The pixels of some cells of the augmented images, each patch flattened as (C, height, width).

    Differentiable in `images`: a pixel's gradient is the sum over the cells that read it.

    Args:
        images: (B, C, H, W) floating, any dtype; H and W divisible by the patch size.
        cells: (B, K) int64 in [0, rows * columns), any order.
        offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip), or None for no augmentation.
        patch_size: (height, width) in pixels.

    Returns:
        (B, K, C * height * width), dtype of `images`.

    Raises:
        ValueError: image size not divisible by the patch size, or shapes that do not belong together.
    """
    B, C, H, W = images.shape
    height, width = patch_size
    if H % height or W % width:
        raise ValueError(f"images are {H} x {W}; expected multiples of the patch size {height} x {width}.")
    if cells.ndim != 2 or cells.shape[0] != B:
        raise ValueError(f"cells has shape {tuple(cells.shape)}; expected ({B}, K) for {B} images.")
    K = cells.shape[1]
    source = _patch_sources(cells, offsets, H, W, patch_size).flatten(1)[:, None].expand(-1, C, -1)
    pixels = images.flatten(2).gather(2, source).view(B, C, K, height * width)
    return pixels.transpose(1, 2).reshape(B, K, C * height * width)


def _patch_sources(cells: Tensor, offsets: Tensor | None, H: int, W: int, patch_size: tuple[int, int]) -> Tensor:
    """(B, K, height * width) int64, where in the flattened image the pixels of each cell come from."""
    height, width = patch_size
    columns = W // width
    y = (cells // columns)[:, :, None] * height + torch.arange(height, device=cells.device)
    x = (cells % columns)[:, :, None] * width + torch.arange(width, device=cells.device)
    y, x = _source_pixels(y, x, offsets, H, W)
    return (y[..., :, None] * W + x[..., None, :]).flatten(2)


def augment(images: Tensor, offsets: Tensor) -> Tensor:
    """``flip(roll(images, (dy, dx)))`` with one row of offsets for all images or one for each. Differentiable.

    Args:
        images: (B, C, H, W).
        offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip).

    Returns:
        (B, C, H, W), dtype of `images`.
    """
    B, C, H, W = images.shape
    _check_offsets(offsets, B)
    y = torch.arange(H, device=images.device).expand(offsets.shape[0], 1, H)
    x = torch.arange(W, device=images.device).expand(offsets.shape[0], 1, W)
    y, x = _source_pixels(y, x, offsets, H, W)
    if offsets.shape[0] == 1:
        return images.index_select(2, y.flatten()).index_select(3, x.flatten())
    source = (y[..., :, None] * W + x[..., None, :]).reshape(B, 1, H * W).expand(-1, C, -1)
    return images.flatten(2).gather(2, source).view(B, C, H, W)


def _source_pixels(y: Tensor, x: Tensor, offsets: Tensor | None, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Where the augmented pixels (y, x) come from; both (rows of offsets or more, K, n)."""
    if offsets is None:
        return y, x
    _check_offsets(offsets, y.shape[0])
    dy, dx, flip = (offsets[:, i].view(-1, 1, 1) for i in range(3))
    x = torch.where(flip.bool(), W - 1 - x, x)
    return (y - dy) % H, (x - dx) % W


def _check_offsets(offsets: Tensor, B: int) -> None:
    if offsets.ndim != 2 or offsets.shape[1] != 3 or offsets.shape[0] not in (1, B):
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; expected ({B}, 3) or (1, 3), rows of (dy, dx, flip)."
        )


def embed_patches(images: Tensor, cells: Tensor, offsets: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Patch embedding of some cells of the augmented images; no other patch is embedded.

    Equals ``conv2d(augment(images, offsets), weight, bias, stride=patch_size)`` at the given cells.

    Args:
        images, cells, offsets: as `gather_patches`.
        weight: (D, C, height, width), whose dtype the matrix product runs in.
        bias: (D,) or None.

    Returns:
        (B, K, D), dtype of `weight`.
    """
    patches = gather_patches(images, cells, offsets, (weight.shape[2], weight.shape[3]))
    return F.linear(patches.to(weight.dtype), weight.flatten(1), bias)


def fed_cells(
    keep: Tensor | None, offsets: Tensor | None, images: int, grid: tuple[int, int], patch_size: tuple[int, int]
) -> Tensor:
    """(B, K) int64, the cell that each token is read at: of kept patches where they lie, else every cell in order."""
    if keep is None:
        return torch.arange(grid[0] * grid[1], device=None if offsets is None else offsets.device).repeat(images, 1)
    return keep if offsets is None else map_cells(keep, offsets, grid, patch_size)


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
    """Tokens of the kept patches of augmented images, behind prefix tokens, and what the first norm needs of them.

    Args:
        images: (B, C, H, W) float32.
        keep: (B, K) int64 patches of the un-augmented images, or None for all. A kept patch is read at, and takes the
            position embedding of, the cell that `map_cells` gives.
        offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip), or None for no augmentation.
        weight: (D, C * patch_height * patch_width), in whose dtype operands of the product are.
        position: (cells, D) float32, position embedding plus bias of the patch embedding.
        prefix: (P, D) float32.
        precision: of the kernels' products of float32 numbers, ``ieee`` or ``tf32``.

    Returns:
        x: (B, P + K, D) float32.
        x_low: the same in the dtype of `weight`; empty if that is the dtype of `x`.
        stats: (B (P + K), ceil(D / 64), 2) float32, `row_statistics`.
    """
    B, _, H, W = images.shape
    size = (patch_height, patch_width)
    cells = fed_cells(keep, offsets, B, (H // patch_height, W // patch_width), size).to(images.device)
    patches = gather_patches(images, cells, offsets, size).to(weight.dtype)
    tokens = patches.to(images.dtype) @ weight.to(images.dtype).T + position[cells]
    x = torch.cat((prefix.expand(B, -1, -1), tokens), dim=1)
    return x, low(x, weight.dtype), row_statistics(x.flatten(0, 1))


def embed_tokens_dx(
    dx_low: Tensor, weight: Tensor, prefix_tokens: int, scale: Tensor | None, precision: str = "ieee"
) -> Tensor:
    """Gradient of the pixels of the fed patches.

    Args:
        dx_low: (B, P + K, D) in the dtype of `weight`.
        weight: (D, C * patch_height * patch_width).
        prefix_tokens: P, rows that no pixel feeds.
        scale: (B,) factor of each image, or None.

    Returns:
        (B, K, C * patch_height * patch_width) float32.
    """
    wide = dtypes.wide(dx_low.dtype)
    d_patches = dx_low[:, prefix_tokens:].to(wide) @ weight.to(wide)
    return d_patches if scale is None else d_patches * scale.view(-1, 1, 1)


def slot_table(keep: Tensor, cells: int) -> Tensor:
    """(B, cells) int32: which entry of `keep` (B, K) each patch of the un-augmented grid is, -1 if none."""
    table = torch.full((keep.shape[0], cells), -1, dtype=torch.int32, device=keep.device)
    entries = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device).expand_as(keep)
    return table.scatter(1, keep, entries)


def patches_to_pixels(
    d_patches: Tensor,
    keep: Tensor | None,
    offsets: Tensor | None,
    height: int,
    width: int,
    patch_height: int,
    patch_width: int,
) -> Tensor:
    """Gradient of the images out of that of the patches they were read as; zero where no patch was read.

    Args:
        d_patches: (B, K, C * patch_height * patch_width).
        keep, offsets: as for `embed_tokens`.
        height, width: of the images.

    Returns:
        (B, C, height, width), dtype of `d_patches`.
    """
    B, K = d_patches.shape[:2]
    size = (patch_height, patch_width)
    cells = fed_cells(keep, offsets, B, (height // patch_height, width // patch_width), size).to(d_patches.device)
    C = d_patches.shape[2] // (patch_height * patch_width)
    pixels = d_patches.view(B, K, C, patch_height * patch_width).transpose(1, 2).flatten(2)
    source = _patch_sources(cells, offsets, height, width, size).flatten(1)[:, None].expand_as(pixels)
    d_images = pixels.new_zeros(B, C, height * width).scatter(2, source, pixels)
    return d_images.view(B, C, height, width)
