"""Triton kernels of token selection: one program an image finds the count-th highest score bit by bit, then compacts.

A score becomes an integer of the same order; the threshold's bits are then found from the highest down, since a bit
belongs to it if at least `count` scores reach it. Bytes moved: `keep` and scores once; where the scores are
made here also the keys once, or twice with a norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels import tuning
from smi_kernels.class_row import class_row, class_row_args
from smi_kernels.launch import launch
from smi_kernels.tiles import among_highest, compute_type, wait_for_previous


@triton.jit
def _store_chosen(keep_ptr, chosen, index, out_ptr):
    """Entries `index` of a row of `keep` where `chosen`, next to each other."""
    rank = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(out_ptr + rank, tl.load(keep_ptr + index, mask=chosen, other=0), mask=chosen)


@triton.jit(do_not_specialize=["count", "K", "scores_stride_b", "keep_stride_b"])
def select_tokens_kernel(
    scores_ptr,  # (B, K)
    keep_ptr,  # (B, K)
    out_ptr,  # (B, count)
    count,
    K,
    scores_stride_b,
    scores_stride_k,
    keep_stride_b,
    keep_stride_k,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    image = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    scores = tl.load(scores_ptr + image * scores_stride_b + k * scores_stride_k, mask=k < K, other=0.0).to(COMPUTE)
    chosen = among_highest(scores, k < K, count)
    _store_chosen(keep_ptr + image * keep_stride_b, chosen, k * keep_stride_k, out_ptr + image * count)


@triton.jit(do_not_specialize=["count", "prefix", "N", "keep_stride_b"])
def rank_tokens_kernel(
    query_ptr,  # (B, H, D)
    key_ptr,  # (B, N, H, D)
    norm_ptr,  # (4, D) or unused
    keep_ptr,  # (B, K)
    out_ptr,  # (B, count)
    scores_ptr,  # (B, K)
    SCALE: tl.float64,
    EPS,
    count,
    prefix,
    N,
    H,
    D,
    query_stride_b,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_n,
    key_stride_h,
    key_stride_d,
    keep_stride_b,
    keep_stride_k,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous()
    image = tl.program_id(0)
    row = class_row(
        query_ptr, key_ptr, norm_ptr, image, SCALE, EPS, N, H, D, query_stride_b, query_stride_h, query_stride_d,
        key_stride_b, key_stride_n, key_stride_h, key_stride_d, HAS_NORM, COMPUTE, BLOCK_N, WHOLE_D, BLOCK_D,
    )  # fmt: skip
    patch = tl.arange(0, BLOCK_N) - prefix
    candidates = (patch >= 0) & (patch < N - prefix)
    tl.store(scores_ptr + image.to(tl.int64) * (N - prefix) + patch, row, mask=candidates)
    chosen = among_highest(row, candidates, count)
    keep = keep_ptr + image.to(tl.int64) * keep_stride_b
    _store_chosen(keep, chosen, patch * keep_stride_k, out_ptr + image.to(tl.int64) * count)


def select_tokens(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """As `smi_kernels.select_tokens`."""
    B, K = keep.shape
    out = torch.empty(B, count, dtype=keep.dtype, device=keep.device)
    BLOCK_K = max(16, triton.next_power_of_2(K))
    args = {
        "scores_ptr": scores,
        "keep_ptr": keep,
        "out_ptr": out,
        "count": count,
        "K": K,
        "scores_stride_b": scores.stride(0),
        "scores_stride_k": scores.stride(1),
        "keep_stride_b": keep.stride(0),
        "keep_stride_k": keep.stride(1),
        "COMPUTE": compute_type(scores.dtype),
        "BLOCK_K": BLOCK_K,
    }
    launch(select_tokens_kernel, (B,), args, num_warps=min(max(BLOCK_K // 128, 1), 16))
    return out


def rank_tokens(
    query: Tensor,
    key: Tensor,
    scale: float,
    qk_norm: Tensor | None,
    eps: float,
    keep: Tensor,
    count: int,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.token_select.reference.rank_tokens`."""
    B, K = keep.shape
    out = torch.empty(B, count, dtype=keep.dtype, device=keep.device)
    scores = torch.empty(B, K, dtype=torch.promote_types(query.dtype, torch.float32), device=keep.device)
    shared, warps = class_row_args(query, key, scale)
    args = {
        **shared,
        "norm_ptr": None if qk_norm is None else qk_norm.contiguous(),
        "EPS": eps,
        "HAS_NORM": qk_norm is not None,
        "WHOLE_D": triton.next_power_of_2(query.shape[2]),
        "keep_ptr": keep,
        "out_ptr": out,
        "scores_ptr": scores,
        "count": count,
        "prefix": prefix,
        "keep_stride_b": keep.stride(0),
        "keep_stride_k": keep.stride(1),
    }
    launch(rank_tokens_kernel, (B,), args, num_warps=warps, max_registers=tuning.registers(warps))
    return out, scores
