"""What the kernels of priors and of the pixel step share: sums over neighbour differences, their gradient, and norms.

Nine sums describe a plane: squares of the differences to the right, lower, lower left and lower right neighbour
(0 to 3), their absolute values (4 to 7), squares of the pixels (8). Offsets within a plane of H x W pixels are 32-bit;
planes are told apart by their pointers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _difference(here, row_ptr, x, inside, COMPUTE: tl.constexpr):
    """Pixels `x` of a row less `here`; 0 where not `inside`."""
    there = tl.load(row_ptr + x, mask=inside, other=0.0).to(COMPUTE)
    return tl.where(inside, there - here, 0.0)


@triton.jit
def difference_sums(plane_ptr, rows, end, H, W, COMPUTE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sums over some rows (BLOCK_H,) of a plane, without differences to rows from `end` on; rows from H on are nothing.

    Returns squares (4,) and absolute values (4,) of the differences, and squares of the pixels.
    """
    y = rows[:, None]
    row_ptr = plane_ptr + y * W
    squares = tl.zeros((BLOCK_H, BLOCK_W, 2, 2), COMPUTE)
    magnitudes = tl.zeros((BLOCK_H, BLOCK_W, 2, 2), COMPUTE)
    pixels = tl.zeros((BLOCK_H, BLOCK_W), COMPUTE)
    for start in range(0, W, BLOCK_W):
        x = start + tl.arange(0, BLOCK_W)[None, :]
        inside = (y < H) & (x < W)
        above = (y + 1 < end) & (x < W)
        here = tl.load(row_ptr + x, mask=inside, other=0.0).to(COMPUTE)
        right = _difference(here, row_ptr, x + 1, inside & (x < W - 1), COMPUTE)
        down = _difference(here, row_ptr + W, x, above, COMPUTE)
        down_left = _difference(here, row_ptr + W, x - 1, above & (x > 0), COMPUTE)
        down_right = _difference(here, row_ptr + W, x + 1, above & (x < W - 1), COMPUTE)
        # The order of the joins makes direction k element (k // 2, k % 2).
        differences = tl.join(tl.join(right, down_left), tl.join(down, down_right))
        squares += differences * differences
        magnitudes += tl.abs(differences)
        pixels += here * here
    squares = tl.sum(tl.reshape(squares, (BLOCK_H * BLOCK_W, 4)), axis=0)
    magnitudes = tl.sum(tl.reshape(magnitudes, (BLOCK_H * BLOCK_W, 4)), axis=0)
    return squares, magnitudes, tl.sum(tl.reshape(pixels, (BLOCK_H * BLOCK_W,)))


@triton.jit
def load_row(plane_ptr, y, x, H, W, COMPUTE: tl.constexpr):
    """Pixels left of, at, and right of the columns `x` of row y; beyond its ends 0, and beyond those of the plane the
    nearest row."""
    row_ptr = plane_ptr + tl.minimum(tl.maximum(y, 0), H - 1) * W
    left = tl.load(row_ptr + x - 1, mask=(x > 0) & (x < W), other=0.0).to(COMPUTE)
    here = tl.load(row_ptr + x, mask=x < W, other=0.0).to(COMPUTE)
    right = tl.load(row_ptr + x + 1, mask=x < W - 1, other=0.0).to(COMPUTE)
    return left, here, right


@triton.jit
def load_d_sums(d_sums_ptr, COMPUTE: tl.constexpr):
    """Gradient with respect to the nine sums: of squares, doubled, in four directions and of pixels; of magnitudes."""
    d_squares = (
        2.0 * tl.load(d_sums_ptr).to(COMPUTE),
        2.0 * tl.load(d_sums_ptr + 1).to(COMPUTE),
        2.0 * tl.load(d_sums_ptr + 2).to(COMPUTE),
        2.0 * tl.load(d_sums_ptr + 3).to(COMPUTE),
        2.0 * tl.load(d_sums_ptr + 8).to(COMPUTE),
    )
    d_magnitudes = (
        tl.load(d_sums_ptr + 4).to(COMPUTE),
        tl.load(d_sums_ptr + 5).to(COMPUTE),
        tl.load(d_sums_ptr + 6).to(COMPUTE),
        tl.load(d_sums_ptr + 7).to(COMPUTE),
    )
    return d_squares, d_magnitudes


@triton.jit
def _signed(d_magnitude, difference):
    """Gradient of d_magnitude * |difference|."""
    return tl.where(difference > 0, d_magnitude, tl.where(difference < 0, -d_magnitude, 0.0))


@triton.jit
def prior_gradient(above, row, below, d_squares, d_magnitudes, y, x, H, W, COMPUTE: tl.constexpr):
    """Gradient at the columns `x` of row y, out of it and its neighbours from `load_row`, and of `load_d_sums`."""
    above_left, above_here, above_right = above
    left, here, right = row
    below_left, below_here, below_right = below
    has_above = (y > 0).to(COMPUTE)
    has_below = (y < H - 1).to(COMPUTE)
    gradient = tl.zeros_like(here)
    d_right, d_down, d_down_left, d_down_right = d_magnitudes
    if (d_right != 0) | (d_down != 0) | (d_down_left != 0) | (d_down_right != 0):  # signs cost more than the rest
        to_left = _signed(d_right, here - left)
        to_left += _signed(has_above * d_down_right, here - above_left)
        to_left += _signed(has_below * d_down_left, here - below_left)
        to_right = _signed(d_right, here - right)
        to_right += _signed(has_above * d_down_left, here - above_right)
        to_right += _signed(has_below * d_down_right, here - below_right)
        gradient += tl.where(x > 0, to_left, 0.0) + tl.where(x < W - 1, to_right, 0.0)
        gradient += _signed(d_down, here - above_here) + _signed(d_down, here - below_here)

    d_right, d_down, d_down_left, d_down_right, d_pixel = d_squares
    to_left = d_right * (here - left)
    to_left += has_above * d_down_right * (here - above_left) + has_below * d_down_left * (here - below_left)
    to_right = d_right * (here - right)
    to_right += has_above * d_down_left * (here - above_right) + has_below * d_down_right * (here - below_right)
    gradient += tl.where(x > 0, to_left, 0.0) + tl.where(x < W - 1, to_right, 0.0)
    gradient += d_down * (here - above_here) + d_down * (here - below_here)  # 0 at an end, where they are one row
    gradient += d_pixel * here
    return gradient


@triton.jit
def store_coefficients(
    sums_ptr,  # (B, C, 9)
    values_ptr,  # (3,) of group g
    coefficients_ptr,  # (G, 9)
    tv1,
    tv2,
    l2,
    g,
    group,
    B,
    C,
    H,
    W,
):
    """Norms of group g, and the gradient of their weighted sum with respect to each of the sums of its planes.

    In float64: a group's sums run over up to 10^8 pixels, and here are only a few hundred numbers to add.
    """
    column = tl.arange(0, 16)
    images = tl.minimum(B - g * group, group)
    planes = images * C
    first_plane = g.to(tl.int64) * group * C
    parts = tl.zeros((128, 16), tl.float64)
    for start in range(0, planes, 128):
        plane = start + tl.arange(0, 128)[:, None]
        inside = (plane < planes) & (column < 9)[None, :]
        parts += tl.load(sums_ptr + (first_plane + plane) * 9 + column[None, :], mask=inside, other=0.0)
    total = tl.sum(parts, axis=0)

    norm = tl.sqrt(total)
    per_plane = tl.where(column == 4, H * (W - 1), tl.where(column == 5, (H - 1) * W, (H - 1) * (W - 1)))
    count = tl.maximum(per_plane.to(tl.float64) * planes, 1.0)
    is_norm = column < 4
    is_mean = (column >= 4) & (column < 8)
    total_variation_1 = tl.sum(tl.where(is_mean, total / count, 0.0))
    total_variation_2 = tl.sum(tl.where(is_norm, norm, 0.0))
    magnitude = tl.sum(tl.where(column == 8, norm, 0.0))
    values = tl.where(column == 0, total_variation_1, tl.where(column == 1, total_variation_2, magnitude))
    tl.store(values_ptr + column, values.to(values_ptr.dtype.element_ty), mask=column < 3)

    norm_weight = tl.where(is_norm, tl.full((), tv2, tl.float64), tl.full((), l2, tl.float64))
    through_norm = tl.where(norm == 0, 0.0, norm_weight / (2 * tl.where(norm == 0, 1.0, norm)))
    coefficients = tl.where(is_mean, tl.full((), tv1, tl.float64) / count, through_norm)
    at = coefficients_ptr + g.to(tl.int64) * 9 + column
    tl.store(at, coefficients.to(coefficients_ptr.dtype.element_ty), mask=column < 9)


def row_tile(W: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns and warps of a program that walks down rows of W pixels; if they are aligned, a thread has 16 bytes."""
    BLOCK_W = triton.next_power_of_2(W)
    pixels = 16 // dtype.itemsize if W % 16 == 0 else 1
    return BLOCK_W, min(max(BLOCK_W // (32 * pixels), 1), 16)
