"""Triton kernels of the patch embedding: kept patches straight from the pixels, and their gradients straight back.

No augmented image and no patch is materialised: roll, flip and grid are folded into addresses. Forward bytes: kept
pixels once for each tile of columns, tokens once; backward: d_x once for each tile of columns, d_patches once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels import tuning
from smi_kernels.launch import launch
from smi_kernels.linear.tile import launch_tiles, product_tile, tile_position
from smi_kernels.patch_embed.addressing import load_offsets, patch_cell, pixel_slot, source_pixel, wrap
from smi_kernels.patch_embed.reference import slot_table
from smi_kernels.tiles import chunks, compute_type, dot, store_row_statistics, wait_for_previous


@triton.jit(do_not_specialize=["M", "N", "P"])
def embed_tokens_kernel(
    images_ptr,  # (B, C, H, W)
    keep_ptr,  # (B, K) or unused
    offsets_ptr,  # (B or 1, 3) or unused
    weight_ptr,  # (D, C * PATCH_H * PATCH_W)
    position_ptr,  # (cells, D)
    prefix_ptr,  # (P, D)
    x_ptr,  # (B, N, D)
    x_low_ptr,  # (B, N, D) or unused
    stats_ptr,  # (B * N, chunks, 2)
    M,
    N,
    P,
    D,
    H,
    W,
    offsets_stride_b,
    stats_stride_m,
    HAS_KEEP: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    tiles_n = tl.cdiv(D, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tiles_n * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    b = tl.minimum(rows, M - 1) // N
    token = tl.minimum(rows, M - 1) - b * N
    is_patch = token >= P
    patch = tl.maximum(token - P, 0)
    dy, dx, flip = load_offsets(offsets_ptr, b, offsets_stride_b, HAS_OFFSETS)
    COLUMNS = W // PATCH_W
    if HAS_KEEP:
        patch = tl.load(keep_ptr + b.to(tl.int64) * (N - P) + patch).to(tl.int32)
        row, column = patch_cell(patch, dy, dx, flip, H // PATCH_H, COLUMNS, PATCH_H, PATCH_W)
    else:
        row = patch // COLUMNS
        column = patch % COLUMNS
    cell = row * COLUMNS + column
    top, left = source_pixel(row * PATCH_H, column * PATCH_W, dy, dx, flip, H, W)

    K: tl.constexpr = C * PATCH_H * PATCH_W
    k = tl.arange(0, BLOCK_K)
    image = images_ptr + b.to(tl.int64) * C * H * W
    x = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    for start in range(0, K, BLOCK_K):
        at = start + k
        c = at // (PATCH_H * PATCH_W)
        py = (at // PATCH_W % PATCH_H)[None, :]
        px = (at % PATCH_W)[None, :]
        if HAS_OFFSETS:  # a patch crosses the border once at most, so that no pixel needs a division
            sy = wrap(top[:, None] + py, H)
            sx = wrap(tl.where(flip[:, None] != 0, left[:, None] - px, left[:, None] + px), W)
        else:
            sy = top[:, None] + py
            sx = left[:, None] + px
        inside = is_patch[:, None] & (at < K)[None, :]
        pixels = tl.load(image[:, None] + (c[None, :] * (H * W) + sy * W + sx), mask=inside, other=0.0)
        weights = tl.load(
            weight_ptr + columns.to(tl.int64)[None, :] * K + at[:, None],
            mask=(at < K)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        x = dot(pixels.to(weights.dtype), weights, x, PRECISION)

    inside = (rows < M)[:, None] & (columns < D)[None, :]
    of_patch = inside & is_patch[:, None]
    x += tl.load(position_ptr + cell[:, None] * D + columns[None, :], mask=of_patch, other=0.0)
    of_prefix = inside & (token < P)[:, None]
    x += tl.load(prefix_ptr + token[:, None] * D + columns[None, :], mask=of_prefix, other=0.0)
    out = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(x_ptr + out, x, mask=inside)
    if HAS_LOW:
        tl.store(x_low_ptr + out, x.to(x_low_ptr.dtype.element_ty), mask=inside)
    store_row_statistics(stats_ptr, x, rows, first, stats_stride_m, M, D, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "K", "P"])
def embed_tokens_dx_kernel(
    dx_ptr,  # (B, P + K, D)
    weight_ptr,  # (D, PIXELS)
    scale_ptr,  # (B,) or unused
    d_patches_ptr,  # (B, K, PIXELS)
    M,
    K,
    P,
    D,
    PIXELS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, PIXELS, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    b = tl.minimum(rows, M - 1) // K
    tokens = tl.minimum(rows, M - 1) + (b + 1) * P  # prefix tokens stand before the patches of each image
    d_patches = product_tile(
        dx_ptr, weight_ptr, tokens, columns, first_row, first_column, M // K * (K + P), PIXELS, D, D, False,
        "pointers", EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_SCALE:
        d_patches *= tl.load(scale_ptr + b)[:, None]
    at = rows.to(tl.int64)[:, None] * PIXELS + columns[None, :]
    tl.store(d_patches_ptr + at, d_patches, mask=(rows < M)[:, None] & (columns < PIXELS)[None, :])


@triton.jit(do_not_specialize=["K"])
def patches_to_pixels_kernel(
    d_patches_ptr,  # (B, K, C * PATCH_H * PATCH_W)
    slots_ptr,  # (B, cells) or unused
    offsets_ptr,  # (B or 1, 3) or unused
    d_images_ptr,  # (B, C, H, W)
    K,
    H,
    W,
    offsets_stride_b,
    HAS_SLOTS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    blocks = tl.cdiv(H * W, BLOCK)
    b = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    dy, dx, flip = load_offsets(offsets_ptr, b, offsets_stride_b, HAS_OFFSETS)
    slot, py, px = pixel_slot(slots_ptr, b, at // W, at % W, dy, dx, flip, H, W, HAS_SLOTS, PATCH_H, PATCH_W)
    inside = at < H * W
    patch = d_patches_ptr + (b.to(tl.int64) * K + slot) * (C * PATCH_H * PATCH_W) + py * PATCH_W + px
    out = d_images_ptr + b.to(tl.int64) * C * H * W + at
    for c in tl.static_range(C):
        gradient = tl.load(patch + c * (PATCH_H * PATCH_W), mask=inside & (slot >= 0), other=0.0)
        tl.store(out + c * H * W, gradient, mask=inside)


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
    B, C, H, W = images.shape
    D, P = weight.shape[0], prefix.shape[0]
    N = P + (position.shape[0] if keep is None else keep.shape[1])
    x = torch.empty(B, N, D, dtype=images.dtype, device=images.device)
    x_low = torch.empty(0 if x.dtype == weight.dtype else x.shape, dtype=weight.dtype, device=x.device)
    stats = torch.empty(B * N, chunks(D), 2, dtype=x.dtype, device=x.device)
    tile = tuning.tile("embed_tokens", weight.dtype, B * N, D, weight.shape[1], precision, images.device)
    launch(
        embed_tokens_kernel,
        (triton.cdiv(B * N, tile.m) * triton.cdiv(D, tile.n),),
        {
            "images_ptr": images.contiguous(),
            "keep_ptr": None if keep is None else keep.contiguous(),
            "offsets_ptr": None if offsets is None else offsets.contiguous(),
            "weight_ptr": weight.contiguous(),
            "position_ptr": position.contiguous(),
            "prefix_ptr": prefix.contiguous(),
            "x_ptr": x,
            "x_low_ptr": x_low,
            "stats_ptr": stats,
            "M": B * N,
            "N": N,
            "P": P,
            "D": D,
            "H": H,
            "W": W,
            "offsets_stride_b": _stride(offsets),
            "stats_stride_m": stats.stride(0),
            "HAS_KEEP": keep is not None,
            "HAS_OFFSETS": offsets is not None,
            "HAS_LOW": x.dtype != weight.dtype,
            "PRECISION": tuning.dot_precision(precision),
            "COMPUTE": compute_type(x.dtype),
            "C": C,
            "PATCH_H": patch_height,
            "PATCH_W": patch_width,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=tile.registers,
    )
    return x, x_low, stats


def embed_tokens_dx(
    dx_low: Tensor, weight: Tensor, prefix_tokens: int, scale: Tensor | None, precision: str = "ieee"
) -> Tensor:
    """As `smi_kernels.patch_embed.reference.embed_tokens_dx`."""
    B, N, D = dx_low.shape
    K, pixels = N - prefix_tokens, weight.shape[1]
    wide = torch.promote_types(dx_low.dtype, torch.float32)
    d_patches = torch.empty(B, K, pixels, dtype=wide, device=dx_low.device)
    tile = tuning.tile("embed_tokens_dx", weight.dtype, B * K, pixels, D, precision, dx_low.device)
    args = {
        "dx_ptr": dx_low.contiguous(),
        "weight_ptr": weight.contiguous(),
        "scale_ptr": None if scale is None else scale.contiguous(),
        "d_patches_ptr": d_patches,
        "M": B * K,
        "K": K,
        "P": prefix_tokens,
        "D": D,
        "PIXELS": pixels,
        "HAS_SCALE": scale is not None,
    }
    launch_tiles(embed_tokens_dx_kernel, args, tile, B * K, pixels, D, precision, wide)
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
    B, K, pixels = d_patches.shape
    C = pixels // (patch_height * patch_width)
    d_images = torch.empty(B, C, height, width, dtype=d_patches.dtype, device=d_patches.device)
    cells = height // patch_height * (width // patch_width)
    BLOCK = 1024
    launch(
        patches_to_pixels_kernel,
        (B * triton.cdiv(height * width, BLOCK),),
        {
            "d_patches_ptr": d_patches.contiguous(),
            "slots_ptr": None if keep is None else slot_table(keep, cells),
            "offsets_ptr": None if offsets is None else offsets.contiguous(),
            "d_images_ptr": d_images,
            "K": K,
            "H": height,
            "W": width,
            "offsets_stride_b": _stride(offsets),
            "HAS_SLOTS": keep is not None,
            "HAS_OFFSETS": offsets is not None,
            "C": C,
            "PATCH_H": patch_height,
            "PATCH_W": patch_width,
            "BLOCK": BLOCK,
        },
    )
    return d_images


def _stride(offsets: Tensor | None) -> int:
    """From one image's offsets to the next's; 0 where all share one row."""
    return 0 if offsets is None or offsets.shape[0] == 1 else 3
