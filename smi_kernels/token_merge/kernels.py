"""Triton kernels of token merging: matching in two launches, merging and its gradient in one each.

Matching reads each image's keys once for every 32 even patches, compares them in float32 and never writes the
similarities down. Merging gathers: a program has one row of what is left, and of its gradient some rows of what was, so
that sums have a fixed order and need no atomics. Bytes moved by it are those of the rows in and out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.attention.rows import load_rows, normed
from smi_kernels.launch import launch
from smi_kernels.tiles import STAT_CHUNK, among_highest, compute_type, dot, store_row_statistics, wait_for_previous


@triton.jit
def _directions(
    key_ptr,
    norm_ptr,
    rows,
    N,
    H,
    EPS,
    stride_n,
    stride_h,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(rows, BLOCK_D) means over heads of the keys of one image, scaled to length 1."""
    # Any axis may be the outermost, and 32 bits not reach from one head, or token, to the last.
    step_h, rows = tl.full((), stride_h, tl.int64), rows.to(tl.int64)
    total = tl.zeros((rows.shape[0], BLOCK_D), COMPUTE)
    for head in range(H):
        key = load_rows(key_ptr + head * step_h, rows, N, stride_n, D, BLOCK_D)
        total += normed(key, norm_ptr, rows, N, EPS, 1, HAS_NORM, COMPUTE, D, BLOCK_D).to(COMPUTE)
    total /= H
    length = tl.sqrt(tl.sum(total * total, axis=1))
    return total / tl.maximum(length, 1e-12)[:, None]


@triton.jit(do_not_specialize=["N", "prefix"])
def pair_tokens_kernel(
    key_ptr,  # (B, N, H, D)
    norm_ptr,  # (2, 2, D) or unused
    best_ptr,  # (B, E), E = even patches
    partner_ptr,  # (B, E)
    EPS,
    N,
    H,
    prefix,
    stride_b,
    stride_n,
    stride_h,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    evens, odds = (N - prefix + 1) // 2, (N - prefix) // 2
    blocks = tl.cdiv(evens, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    key_ptr += image * stride_b
    even = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ours = _directions(
        key_ptr, norm_ptr, prefix + 2 * even, N, H, EPS, stride_n, stride_h, HAS_NORM, COMPUTE, D, BLOCK_D
    )
    best = tl.full((BLOCK,), float("-inf"), COMPUTE)
    partner = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, odds, BLOCK, disable_licm=True):
        odd = start + tl.arange(0, BLOCK)
        theirs = _directions(
            key_ptr, norm_ptr, prefix + 1 + 2 * odd, N, H, EPS, stride_n, stride_h, HAS_NORM, COMPUTE, D, BLOCK_D
        )
        likeness = dot(ours, tl.trans(theirs), tl.zeros((BLOCK, BLOCK), COMPUTE), "ieee")
        likeness = tl.where(likeness == likeness, likeness, -2.0)
        likeness = tl.where((odd < odds)[None, :], likeness, float("-inf"))
        found = tl.max(likeness, axis=1)
        at = start + tl.argmax(likeness, axis=1)
        partner = tl.where(found > best, at, partner)  # an equal one that comes later does not count
        best = tl.maximum(found, best)
    tl.store(best_ptr + image * evens + even, best, mask=even < evens)
    tl.store(partner_ptr + image * evens + even, partner, mask=even < evens)


@triton.jit(do_not_specialize=["N", "prefix", "fewer"])
def merge_targets_kernel(
    best_ptr,  # (B, E)
    partner_ptr,  # (B, E)
    target_ptr,  # (B, N)
    N,
    prefix,
    fewer,
    BLOCK_N: tl.constexpr,
):
    wait_for_previous()
    image = tl.program_id(0).to(tl.int64)
    evens = (N - prefix + 1) // 2
    token = tl.arange(0, BLOCK_N)
    patch = token - prefix
    even = (patch >= 0) & (patch % 2 == 0) & (token < N)
    at = image * evens + patch // 2
    gone = among_highest(tl.load(best_ptr + at, mask=even, other=0.0), even, fewer)
    stays = (token < N) & ~gone
    place = tl.cumsum(stays.to(tl.int32), axis=0) - 1
    target_ptr += image * N
    tl.store(target_ptr + token, place.to(tl.int64), mask=stays)
    # The places of partners were written by other threads of this program; a barrier orders global memory among them.
    tl.debug_barrier()
    partner = prefix + 1 + 2 * tl.load(partner_ptr + at, mask=gone, other=0)
    tl.store(target_ptr + token, tl.load(target_ptr + partner, mask=gone, other=0), mask=gone)


@triton.jit
def _sizes(size_ptr, rows, inside, HAS_SIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """Patches in tokens; 0 where not `inside`."""
    if HAS_SIZE:
        return tl.load(size_ptr + rows, mask=inside, other=0.0)
    else:
        return inside.to(COMPUTE)


@triton.jit(do_not_specialize=["N", "left"])
def merge_tokens_kernel(
    x_ptr,  # (B, N, D)
    size_ptr,  # (B, N) or unused
    target_ptr,  # (B, N)
    out_ptr,  # (B, left, D)
    low_ptr,  # as out, or unused
    stats_ptr,  # (B, left, ceil(D / 64), 2)
    total_ptr,  # (B, left)
    N,
    left,
    D,
    HAS_SIZE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0)
    image, place = (row // left).to(tl.int64), row % left
    first = tl.program_id(1) * BLOCK_D
    column = first + tl.arange(0, BLOCK_D)
    total = tl.zeros((1,), COMPUTE)
    for start in range(0, N, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        mine = tl.load(target_ptr + image * N + token, mask=token < N, other=-1) == place
        total += tl.sum(_sizes(size_ptr, image * N + token, mine, HAS_SIZE, COMPUTE), axis=0)
    out = tl.zeros((1, BLOCK_D), COMPUTE)
    for start in range(0, N, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        mine = tl.load(target_ptr + image * N + token, mask=token < N, other=-1) == place
        share = _sizes(size_ptr, image * N + token, mine, HAS_SIZE, COMPUTE) / tl.where(total == 0, 1.0, total)
        at = x_ptr + (image * N + token)[:, None] * D + column[None, :]
        x = tl.load(at, mask=mine[:, None] & (column < D)[None, :], other=0.0)
        out += tl.sum(x * share[:, None], axis=0)[None, :]
    rows = row + tl.arange(0, 1)
    at = rows.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_ptr + at, out, mask=(column < D)[None, :])
    if HAS_LOW:
        tl.store(low_ptr + at, out.to(low_ptr.dtype.element_ty), mask=(column < D)[None, :])
    stride_m = 2 * tl.cdiv(D, STAT_CHUNK)
    store_row_statistics(stats_ptr, out, rows, first, stride_m, row + 1, D, 1, BLOCK_D)
    tl.store(total_ptr + row, tl.sum(total), mask=first == 0)


@triton.jit(do_not_specialize=["N", "left", "M"])
def merge_tokens_dx_kernel(
    dx_ptr,  # (B, left, D)
    size_ptr,  # (B, N) or unused
    target_ptr,  # (B, N)
    total_ptr,  # (B, left)
    out_ptr,  # (B, N, D)
    low_ptr,  # as out, or unused
    N,
    left,
    M,
    D,
    HAS_SIZE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = rows < M
    into = rows // N * left + tl.load(target_ptr + rows, mask=inside, other=0)
    share = _sizes(size_ptr, rows, inside, HAS_SIZE, COMPUTE) / tl.load(total_ptr + into, mask=inside, other=1.0)
    mask = inside[:, None] & (column < D)[None, :]
    out = tl.load(dx_ptr + into[:, None] * D + column[None, :], mask=mask, other=0.0) * share[:, None]
    at = rows[:, None] * D + column[None, :]
    tl.store(out_ptr + at, out, mask=mask)
    if HAS_LOW:
        tl.store(low_ptr + at, out.to(low_ptr.dtype.element_ty), mask=mask)


def match_tokens(key: Tensor, norm: Tensor | None, eps: float, prefix: int, fewer: int) -> Tensor:
    """As `smi_kernels.token_merge.reference.match_tokens`."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    B, N, H, D = key.shape
    target = torch.empty(B, N, dtype=torch.int64, device=key.device)
    if not fewer:
        return target.copy_(torch.arange(N, device=key.device))
    evens = (N - prefix + 1) // 2
    best = torch.empty(B, evens, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
    partner = torch.empty(B, evens, dtype=torch.int32, device=key.device)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    args = {
        "key_ptr": key,
        "norm_ptr": None if norm is None else norm.contiguous(),
        "best_ptr": best,
        "partner_ptr": partner,
        "EPS": eps,
        "N": N,
        "H": H,
        "prefix": prefix,
        "stride_b": key.stride(0),
        "stride_n": key.stride(1),
        "stride_h": key.stride(2),
        "HAS_NORM": norm is not None,
        "COMPUTE": compute_type(key.dtype),
        "D": D,
        "BLOCK_D": BLOCK_D,
        "BLOCK": 32 if BLOCK_D <= 64 else 16,
    }
    launch(pair_tokens_kernel, (B * -(-evens // args["BLOCK"]),), args, num_warps=4, num_stages=1)
    BLOCK_N = max(16, triton.next_power_of_2(N))
    args = {
        "best_ptr": best,
        "partner_ptr": partner,
        "target_ptr": target,
        "N": N,
        "prefix": prefix,
        "fewer": fewer,
        "BLOCK_N": BLOCK_N,
    }
    launch(merge_targets_kernel, (B,), args, num_warps=min(max(BLOCK_N // 128, 1), 16))
    return target


def merge_tokens(
    x: Tensor, size: Tensor | None, target: Tensor, left: int, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `smi_kernels.token_merge.reference.merge_tokens`."""
    x, target = x.contiguous(), target.contiguous()
    (B, N), D = target.shape, x.shape[1]
    out = torch.empty(B * left, D, dtype=x.dtype, device=x.device)
    x_low = torch.empty(0 if low == x.dtype else out.shape, dtype=low, device=x.device)
    stats = torch.empty(B * left, -(-D // STAT_CHUNK.value), 2, dtype=x.dtype, device=x.device)
    total = torch.empty(B, left, dtype=x.dtype, device=x.device)
    BLOCK_D = min(256, max(64, triton.next_power_of_2(D)))
    args = {
        "x_ptr": x,
        "size_ptr": size if size is None else size.contiguous(),
        "target_ptr": target,
        "out_ptr": out,
        "low_ptr": x_low,
        "stats_ptr": stats,
        "total_ptr": total,
        "N": N,
        "left": left,
        "D": D,
        "HAS_SIZE": size is not None,
        "HAS_LOW": low != x.dtype,
        "COMPUTE": compute_type(x.dtype),
        "BLOCK_N": 16,
        "BLOCK_D": BLOCK_D,
    }
    launch(merge_tokens_kernel, (B * left, -(-D // BLOCK_D)), args, num_warps=2, num_stages=1)
    return out, x_low, stats, total


def merge_tokens_dx(
    dx: Tensor, size: Tensor | None, target: Tensor, total: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.token_merge.reference.merge_tokens_dx`."""
    dx, target = dx.contiguous(), target.contiguous()
    (B, N), D = target.shape, dx.shape[1]
    out = torch.empty(B * N, D, dtype=dx.dtype, device=dx.device)
    out_low = torch.empty(0 if low == dx.dtype else out.shape, dtype=low, device=dx.device)
    BLOCK_D = min(256, max(16, triton.next_power_of_2(D)))
    args = {
        "dx_ptr": dx,
        "size_ptr": size if size is None else size.contiguous(),
        "target_ptr": target,
        "total_ptr": total.contiguous(),
        "out_ptr": out,
        "low_ptr": out_low,
        "N": N,
        "left": total.shape[1],
        "M": B * N,
        "D": D,
        "HAS_SIZE": size is not None,
        "HAS_LOW": low != dx.dtype,
        "COMPUTE": compute_type(dx.dtype),
        "BLOCK_M": 8,
        "BLOCK_D": BLOCK_D,
    }
    launch(merge_tokens_dx_kernel, (-(-B * N // 8), -(-D // BLOCK_D)), args, num_warps=4, num_stages=1)
    return out, out_low
