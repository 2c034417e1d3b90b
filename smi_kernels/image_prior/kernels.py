"""Triton kernels of the image priors: nine sums of each plane, their gradient, and norms and weights made of them.

Bytes moved, for float32: 4 a pixel for the sums, 8 a pixel for the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.image_prior.stencil import (
    difference_sums,
    load_d_sums,
    load_row,
    prior_gradient,
    row_tile,
    store_coefficients,
)
from smi_kernels.launch import launch
from smi_kernels.tiles import compute_type, wait_for_previous

_ROWS = 16  # of a tile


@triton.jit
def prior_sums_kernel(
    images_ptr,  # (B, C, H, W)
    sums_ptr,  # (B, C, 9)
    H,
    W,
    COMPUTE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    wait_for_previous()
    plane = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((4,), COMPUTE)
    magnitudes = tl.zeros((4,), COMPUTE)
    pixels = tl.zeros((), COMPUTE)
    for first in range(0, H, BLOCK_H):
        rows = first + tl.arange(0, BLOCK_H)
        parts = difference_sums(images_ptr + plane * H * W, rows, H, H, W, COMPUTE, BLOCK_H, BLOCK_W)
        squares += parts[0]
        magnitudes += parts[1]
        pixels += parts[2]
    direction = tl.arange(0, 4)
    tl.store(sums_ptr + plane * 9 + direction, squares)
    tl.store(sums_ptr + plane * 9 + 4 + direction, magnitudes)
    tl.store(sums_ptr + plane * 9 + 8, pixels)


@triton.jit
def prior_sums_dx_kernel(
    images_ptr,  # (B, C, H, W)
    d_sums_ptr,  # (B, C, 9)
    d_images_ptr,  # (B, C, H, W)
    H,
    W,
    COMPUTE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    wait_for_previous()
    tiles = tl.cdiv(H, BLOCK_H)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_H
    x = tl.arange(0, BLOCK_W)
    plane_ptr = images_ptr + plane * H * W
    d_squares, d_magnitudes = load_d_sums(d_sums_ptr + plane * 9, COMPUTE)
    above = load_row(plane_ptr, first - 1, x, H, W, COMPUTE)
    row = load_row(plane_ptr, first, x, H, W, COMPUTE)
    for i in range(tl.minimum(H - first, BLOCK_H)):
        y = first + i
        below = load_row(plane_ptr, y + 1, x, H, W, COMPUTE)
        gradient = prior_gradient(above, row, below, d_squares, d_magnitudes, y, x, H, W, COMPUTE)
        tl.store(d_images_ptr + plane * H * W + y * W + x, gradient, mask=x < W)
        above = row
        row = below


@triton.jit
def prior_coefficients_kernel(
    sums_ptr,  # (B, C, 9)
    values_ptr,  # (G, 3)
    coefficients_ptr,  # (G, 9)
    tv1: tl.float64,
    tv2: tl.float64,
    l2: tl.float64,
    group,
    B,
    C,
    H,
    W,
):
    wait_for_previous()
    g = tl.program_id(0)
    store_coefficients(sums_ptr, values_ptr + g * 3, coefficients_ptr, tv1, tv2, l2, g, group, B, C, H, W)


def prior_sums(images: Tensor) -> Tensor:
    """As `smi_kernels.image_prior.reference.prior_sums`."""
    B, C, H, W = images.shape
    sums = torch.empty(B, C, 9, dtype=images.dtype, device=images.device)
    args = {
        "images_ptr": images.contiguous(),
        "sums_ptr": sums,
        "H": H,
        "W": W,
        "COMPUTE": compute_type(images.dtype),
        "BLOCK_H": _ROWS,
        "BLOCK_W": 64,
    }
    launch(prior_sums_kernel, (B * C,), args, num_warps=8)
    return sums


def prior_sums_dx(images: Tensor, d_sums: Tensor) -> Tensor:
    """As `smi_kernels.image_prior.reference.prior_sums_dx`."""
    B, C, H, W = images.shape
    images = images.contiguous()
    d_images = torch.empty_like(images)
    BLOCK_W, num_warps = row_tile(W, images.dtype)
    args = {
        "images_ptr": images,
        "d_sums_ptr": d_sums.contiguous(),
        "d_images_ptr": d_images,
        "H": H,
        "W": W,
        "COMPUTE": compute_type(images.dtype),
        "BLOCK_H": _ROWS,
        "BLOCK_W": BLOCK_W,
    }
    launch(prior_sums_dx_kernel, (B * C * triton.cdiv(H, _ROWS),), args, num_warps=num_warps)
    return d_images


def prior_coefficients(
    sums: Tensor, tv1: float, tv2: float, l2: float, group: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.image_prior.reference.prior_coefficients`."""
    B, C, _ = sums.shape
    G = triton.cdiv(B, group)
    values = torch.empty(G, 3, dtype=sums.dtype, device=sums.device)
    coefficients = torch.empty(G, 9, dtype=sums.dtype, device=sums.device)
    args = {
        "sums_ptr": sums.contiguous(),
        "values_ptr": values,
        "coefficients_ptr": coefficients,
        "tv1": float(tv1),
        "tv2": float(tv2),
        "l2": float(l2),
        "group": group,
        "B": B,
        "C": C,
        "H": height,
        "W": width,
    }
    launch(prior_coefficients_kernel, (G,), args)
    return values, coefficients
