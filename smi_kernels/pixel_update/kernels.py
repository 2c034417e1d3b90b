"""Triton kernels of the pixel update: everything between the gradient of the patches and the next iteration's network.

The pixel step reads images, moments and the gradient of the kept patches once, and writes images and moments once: by
`smi_kernels.pixel_update.traffic` 25.1 bytes for a pixel of 224 x 224, 4 more if it is in a kept patch, and 4 more if a
loss reads the pixels themselves. New images go to memory of their own, because the gradient of the priors needs the old
neighbours of every pixel.
"""

from __future__ import annotations

import math

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
from smi_kernels.patch_embed.addressing import load_offsets, modulo, whole_patches
from smi_kernels.pixel_update.traffic import TILE_ROWS
from smi_kernels.tiles import compute_type, wait_for_previous


@triton.jit
def _adam_clamp(x, gradient, exp_avg, exp_avg_sq, low, high, rate, scale, beta1, beta2, eps, COMPUTE: tl.constexpr):
    """New image, exp_avg and exp_avg_sq. `rate` and `scale` have the bias corrections in them; `beta1` to `eps` are
    float64 scalars, so that 1 - beta keeps its digits."""
    exp_avg += (gradient - exp_avg) * tl.full((), 1 - beta1, COMPUTE)
    exp_avg_sq = exp_avg_sq * tl.full((), beta2, COMPUTE) + gradient * gradient * tl.full((), 1 - beta2, COMPUTE)
    x -= rate * exp_avg / (tl.sqrt(exp_avg_sq) * scale + tl.full((), eps, COMPUTE))
    # A NaN stays visible, as in torch.clamp.
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL), exp_avg, exp_avg_sq


@triton.jit
def _slot_columns(x, dx, flip, W, HAS_SLOTS: tl.constexpr, PATCH_W: tl.constexpr):
    """In which columns of the table of slots, and of their patches, the image's columns x were read."""
    x = modulo(x + dx, W)
    x = tl.where(flip != 0, W - 1 - x, x)
    column = x // PATCH_W
    px = x - column * PATCH_W
    if HAS_SLOTS:
        column = tl.where(flip != 0, W // PATCH_W - 1 - column, column)
        column = modulo(column - whole_patches(dx, PATCH_W), W // PATCH_W)
    return column, px


@triton.jit
def begin_step_kernel(
    step_ptr,  # (1,)
    table_ptr,  # (T, R, 3)
    sums_ptr,  # (B, C, 9)
    offsets_ptr,  # (R, 3)
    bias_correction_ptr,  # (2,)
    values_ptr,  # (rows, G, 3): history, or one row of values that nobody reads
    coefficients_ptr,  # (G, 9)
    tv1: tl.float64,
    tv2: tl.float64,
    l2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    group,
    T,
    OFFSETS,
    HISTORY,
    B,
    C,
    H,
    W,
    values_stride_t,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    g = tl.program_id(0)
    step = tl.load(step_ptr)
    row = tl.minimum(tl.maximum(step, 0), HISTORY - 1)
    values_row = values_ptr + row * values_stride_t + g * 3
    store_coefficients(sums_ptr, values_row, coefficients_ptr, tv1, tv2, l2, g, group, B, C, H, W)
    if g == 0:
        table_row = table_ptr + tl.minimum(tl.maximum(step, 0), T - 1) * OFFSETS
        for start in range(0, OFFSETS, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(offsets_ptr + i, tl.load(table_row + i, mask=i < OFFSETS), mask=i < OFFSETS)
        # beta^n as exp(n log(beta)) in float64: in float32, 1 - 0.999 alone would lose half of its digits
        n = (step + 1).to(tl.float64)
        correction1 = 1.0 - tl.exp(n * tl.full((), log_beta1, tl.float64))
        correction2 = tl.sqrt(1.0 - tl.exp(n * tl.full((), log_beta2, tl.float64)))
        tl.store(bias_correction_ptr, correction1.to(bias_correction_ptr.dtype.element_ty))
        tl.store(bias_correction_ptr + 1, correction2.to(bias_correction_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["K"])
def pixel_step_kernel(
    images_ptr,  # (B, C, H, W)
    d_patches_ptr,  # (B, K, C * PATCH_H * PATCH_W)
    d_images_ptr,  # (B, C, H, W) or unused
    slots_ptr,  # (B, cells) or unused
    offsets_ptr,  # (B | 1, 3) or unused
    coefficients_ptr,  # (G, 9)
    bias_correction_ptr,  # (2,)
    low_ptr,  # (C,)
    high_ptr,  # (C,)
    exp_avg_ptr,  # (B, C, H, W), in and out
    exp_avg_sq_ptr,  # (B, C, H, W), in and out
    new_images_ptr,  # (B, C, H, W)
    row_sums_ptr,  # (B, C, H, 9): in a tile's first row the tile's sums, without differences to the next tile; else 0
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    group,
    C,
    H,
    W,
    K,
    offsets_stride_b,
    HAS_DIRECT: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FROZEN: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUMS_W: tl.constexpr,
):
    wait_for_previous()
    PATCH: tl.constexpr = PATCH_H * PATCH_W
    tiles = tl.cdiv(H, BLOCK_H)
    plane = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_H
    b = plane // C
    c = plane % C
    x = tl.arange(0, BLOCK_W)
    plane_at = plane.to(tl.int64) * H * W
    d_patches_ptr += (b.to(tl.int64) * K * C + c) * PATCH
    dy, dx, flip = load_offsets(offsets_ptr, b, offsets_stride_b, HAS_OFFSETS)
    low = tl.load(low_ptr + c).to(COMPUTE)
    high = tl.load(high_ptr + c).to(COMPUTE)
    rate = tl.full((), lr, COMPUTE) / tl.load(bias_correction_ptr).to(COMPUTE)
    scale = 1.0 / tl.load(bias_correction_ptr + 1).to(COMPUTE)
    d_squares, d_magnitudes = load_d_sums(coefficients_ptr + (b // group) * 9, COMPUTE)

    # `addressing.pixel_slot`, with all its divisions outside the loop over rows
    ROWS = H // PATCH_H
    COLUMNS = W // PATCH_W
    column, px = _slot_columns(x, dx, flip, W, HAS_SLOTS, PATCH_W)
    first_read = modulo(first + dy, H)
    shift = modulo(whole_patches(dy, PATCH_H), ROWS)
    slots_ptr += b.to(tl.int64) * ROWS * COLUMNS
    above = load_row(images_ptr + plane_at, first - 1, x, H, W, COMPUTE)
    row = load_row(images_ptr + plane_at, first, x, H, W, COMPUTE)
    for i in range(tl.minimum(H - first, BLOCK_H)):
        y = first + i
        at = plane_at + y * W + x
        below = load_row(images_ptr + plane_at, y + 1, x, H, W, COMPUTE)
        read = first_read + i
        read = tl.where(read < H, read, read - H)
        patch_row = read // PATCH_H
        py = read - patch_row * PATCH_H
        if HAS_SLOTS:
            patch_row = tl.where(patch_row < shift, patch_row - shift + ROWS, patch_row - shift)
            slot = tl.load(slots_ptr + patch_row * COLUMNS + column)
        else:
            slot = patch_row * COLUMNS + column
        patch_at = slot * (C * PATCH) + py * PATCH_W + px
        gradient = tl.load(d_patches_ptr + patch_at, mask=(x < W) & (slot >= 0), other=0.0).to(COMPUTE)
        live = x < W
        if FROZEN:
            live &= tl.load(slots_ptr + y // PATCH_H * COLUMNS + x // PATCH_W, mask=x < W, other=-1) >= 0
        if HAS_DIRECT:
            gradient += tl.load(d_images_ptr + at, mask=live, other=0.0).to(COMPUTE)
        exp_avg = tl.load(exp_avg_ptr + at, mask=live, other=0.0).to(COMPUTE)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=live, other=0.0).to(COMPUTE)
        gradient += prior_gradient(above, row, below, d_squares, d_magnitudes, y, x, H, W, COMPUTE)
        new, exp_avg, exp_avg_sq = _adam_clamp(
            row[1], gradient, exp_avg, exp_avg_sq, low, high, rate, scale, beta1, beta2, eps, COMPUTE
        )
        if FROZEN:
            new = tl.where(live, new, row[1])
        tl.store(new_images_ptr + at, new, mask=x < W)
        tl.store(exp_avg_ptr + at, exp_avg, mask=live)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=live)
        above = row
        row = below

    tl.debug_barrier()  # the sums read what other threads of this program wrote, and nothing of another's
    end = tl.minimum(first + BLOCK_H, H)
    squares, magnitudes, pixels = difference_sums(
        new_images_ptr + plane_at, first + tl.arange(0, BLOCK_H), end, H, W, COMPUTE, BLOCK_H, SUMS_W
    )
    direction = tl.arange(0, 4)
    row_sums_ptr += (plane.to(tl.int64) * H + first) * 9
    tl.store(row_sums_ptr + direction, squares)
    tl.store(row_sums_ptr + 4 + direction, magnitudes)
    tl.store(row_sums_ptr + 8, pixels)
    entry = tl.arange(0, BLOCK_H * 16)
    tl.store(row_sums_ptr + entry, 0.0, mask=(entry >= 9) & (entry < (end - first) * 9))


@triton.jit
def finish_prior_sums_kernel(
    images_ptr,  # (B, C, H, W)
    row_sums_ptr,  # (B, C, H, 9), of which first rows of tiles
    step_ptr,  # (1,) or unused
    sums_ptr,  # (B, C, 9)
    H,
    W,
    HAS_STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    wait_for_previous()
    plane = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(H, TILE_H)
    direction = tl.arange(0, 4)
    squares = tl.zeros((4,), COMPUTE)
    magnitudes = tl.zeros((4,), COMPUTE)
    pixels = tl.zeros((), COMPUTE)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        tile_ptr = row_sums_ptr + (plane * H + tile * TILE_H) * 9
        inside = (tile < tiles)[:, None]
        squares += tl.sum(tl.load(tile_ptr[:, None] + direction[None, :], mask=inside, other=0.0), axis=0)
        magnitudes += tl.sum(tl.load(tile_ptr[:, None] + 4 + direction[None, :], mask=inside, other=0.0), axis=0)
        pixels += tl.sum(tl.load(tile_ptr + 8, mask=tile < tiles, other=0.0))
        last_rows = tile * TILE_H + (TILE_H - 1)
        parts = difference_sums(images_ptr + plane * H * W, last_rows, H, H, W, COMPUTE, BLOCK_T, BLOCK_W)
        squares += tl.where(direction == 0, 0.0, parts[0])  # differences within a row are in the tile's sums
        magnitudes += tl.where(direction == 0, 0.0, parts[1])
    tl.store(sums_ptr + plane * 9 + direction, squares)
    tl.store(sums_ptr + plane * 9 + 4 + direction, magnitudes)
    tl.store(sums_ptr + plane * 9 + 8, pixels)
    if HAS_STEP:
        tl.store(step_ptr, tl.load(step_ptr) + 1, mask=plane == 0)


@triton.jit
def adam_clamp_kernel(
    grad_ptr,  # (B, C, H, W)
    low_ptr,  # (C,)
    high_ptr,  # (C,)
    live_ptr,  # (B, 1, H, W) or unused
    images_ptr,  # (B, C, H, W), in and out
    exp_avg_ptr,  # (B, C, H, W), in and out
    exp_avg_sq_ptr,  # (B, C, H, W), in and out
    rate: tl.float64,
    scale: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    C,
    PIXELS,
    HAS_LIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    blocks = tl.cdiv(PIXELS, BLOCK)
    plane = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = plane.to(tl.int64) * PIXELS + pixel
    inside = pixel < PIXELS
    old = tl.load(images_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    gradient = tl.load(grad_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    old_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    old_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    low = tl.load(low_ptr + plane % C).to(COMPUTE)
    high = tl.load(high_ptr + plane % C).to(COMPUTE)
    rate = tl.full((), rate, COMPUTE)
    scale = tl.full((), scale, COMPUTE)
    new, exp_avg, exp_avg_sq = _adam_clamp(
        old, gradient, old_avg, old_avg_sq, low, high, rate, scale, beta1, beta2, eps, COMPUTE
    )
    if HAS_LIVE:  # old bits are written back, because stores of single pixels would cost more than whole vectors
        live = tl.load(live_ptr + (plane // C).to(tl.int64) * PIXELS + pixel, mask=inside, other=0) != 0
        new = tl.where(live, new, old)
        exp_avg = tl.where(live, exp_avg, old_avg)
        exp_avg_sq = tl.where(live, exp_avg_sq, old_avg_sq)
    tl.store(images_ptr + at, new, mask=inside)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)


def begin_step(
    step: Tensor,
    table: Tensor,
    sums: Tensor,
    tv1: float,
    tv2: float,
    l2: float,
    group: int,
    height: int,
    width: int,
    beta1: float,
    beta2: float,
    history: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.pixel_update.reference.begin_step`."""
    B, C, _ = sums.shape
    G = triton.cdiv(B, group)
    T, R, _ = table.shape
    offsets = torch.empty(R, 3, dtype=table.dtype, device=table.device)
    bias_correction = torch.empty(2, dtype=sums.dtype, device=sums.device)
    coefficients = torch.empty(G, 9, dtype=sums.dtype, device=sums.device)
    values = torch.empty(1, G, 3, dtype=sums.dtype, device=sums.device) if history is None else history
    args = {
        "step_ptr": step,
        "table_ptr": table.contiguous(),
        "sums_ptr": sums.contiguous(),
        "offsets_ptr": offsets,
        "bias_correction_ptr": bias_correction,
        "values_ptr": values,
        "coefficients_ptr": coefficients,
        "tv1": float(tv1),
        "tv2": float(tv2),
        "l2": float(l2),
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf,
        "group": group,
        "T": T,
        "OFFSETS": R * 3,
        "HISTORY": values.shape[0],
        "B": B,
        "C": C,
        "H": height,
        "W": width,
        "values_stride_t": values.stride(0),
        "BLOCK": 128,
    }
    launch(begin_step_kernel, (G,), args)
    return offsets, bias_correction, coefficients


def pixel_step(
    images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    d_patches: Tensor,
    d_images: Tensor | None,
    keep_slots: Tensor | None,
    offsets: Tensor | None,
    coefficients: Tensor,
    group: int,
    bias_correction: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    low: Tensor,
    high: Tensor,
    frozen: bool,
    patch_height: int,
    patch_width: int,
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.pixel_update.reference.pixel_step`; see `finish_prior_sums_kernel` for the row sums."""
    B, C, H, W = images.shape
    images = images.contiguous()
    new_images = torch.empty_like(images)
    row_sums = torch.empty(B, C, H, 9, dtype=images.dtype, device=images.device)
    moments = exp_avg.contiguous(), exp_avg_sq.contiguous()
    BLOCK_W, num_warps = row_tile(W, images.dtype)
    args = {
        "images_ptr": images,
        "d_patches_ptr": d_patches.contiguous(),
        "d_images_ptr": images if d_images is None else d_images.contiguous(),
        "slots_ptr": images if keep_slots is None else keep_slots.contiguous(),
        "offsets_ptr": images if offsets is None else offsets.contiguous(),
        "coefficients_ptr": coefficients.contiguous(),
        "bias_correction_ptr": bias_correction.contiguous(),
        "low_ptr": low.contiguous(),
        "high_ptr": high.contiguous(),
        "exp_avg_ptr": moments[0],
        "exp_avg_sq_ptr": moments[1],
        "new_images_ptr": new_images,
        "row_sums_ptr": row_sums,
        "lr": float(lr),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(eps),
        "group": group,
        "C": C,
        "H": H,
        "W": W,
        "K": d_patches.shape[1],
        "offsets_stride_b": 0 if offsets is None or offsets.shape[0] == 1 else 3,
        "HAS_DIRECT": d_images is not None,
        "HAS_SLOTS": keep_slots is not None,
        "HAS_OFFSETS": offsets is not None,
        "FROZEN": frozen and keep_slots is not None,
        "PATCH_H": patch_height,
        "PATCH_W": patch_width,
        "COMPUTE": compute_type(images.dtype),
        "BLOCK_H": TILE_ROWS,
        "BLOCK_W": BLOCK_W,
        "SUMS_W": 8 * num_warps,
    }
    launch(pixel_step_kernel, (B * C * triton.cdiv(H, TILE_ROWS),), args, num_warps=num_warps)
    copy_back((exp_avg, exp_avg_sq), moments)
    return new_images, row_sums


def finish_prior_sums(images: Tensor, row_sums: Tensor, step: Tensor | None) -> Tensor:
    """As `smi_kernels.pixel_update.reference.finish_prior_sums`."""
    B, C, H, W = images.shape
    sums = torch.empty(B, C, 9, dtype=images.dtype, device=images.device)
    args = {
        "images_ptr": images.contiguous(),
        "row_sums_ptr": row_sums.contiguous(),
        "step_ptr": images if step is None else step,
        "sums_ptr": sums,
        "H": H,
        "W": W,
        "HAS_STEP": step is not None,
        "COMPUTE": compute_type(images.dtype),
        "TILE_H": TILE_ROWS,
        "BLOCK_T": 16,
        "BLOCK_W": 64,
    }
    launch(finish_prior_sums_kernel, (B * C,), args, num_warps=8)
    if step is not None and not B * C:  # nothing was launched, which would count
        step += 1
    return sums


def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    low: Tensor,
    high: Tensor,
    live: Tensor | None = None,
) -> None:
    """As `smi_kernels.pixel_update.reference.adam_clamp_`."""
    B, C, H, W = images.shape
    state = images.contiguous(), exp_avg.contiguous(), exp_avg_sq.contiguous()
    args = {
        "grad_ptr": grad.contiguous(),
        "low_ptr": low.contiguous(),
        "high_ptr": high.contiguous(),
        "live_ptr": images if live is None else live.contiguous(),
        "images_ptr": state[0],
        "exp_avg_ptr": state[1],
        "exp_avg_sq_ptr": state[2],
        "rate": lr / (1 - beta1**step),
        "scale": 1 / math.sqrt(1 - beta2**step),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(eps),
        "C": C,
        "PIXELS": H * W,
        "HAS_LIVE": live is not None,
        "COMPUTE": compute_type(images.dtype),
        "BLOCK": 1024,
    }
    launch(adam_clamp_kernel, (B * C * triton.cdiv(H * W, 1024),), args)
    copy_back((images, exp_avg, exp_avg_sq), state)


def copy_back(tensors: tuple[Tensor, ...], contiguous: tuple[Tensor, ...]) -> None:
    """Hand on what an operation wrote in place to contiguous copies of `tensors`, or to themselves."""
    for tensor, copy in zip(tensors, contiguous, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
        else:
            torch.autograd.graph.increment_version(tensor)  # or autograd would not notice that it was written to
