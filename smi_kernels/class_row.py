"""One query's attention to all tokens of its image, in the registers of one program: what ranks tokens."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.tiles import compute_type


@triton.jit
def _query_norm(query, norm_ptr, query_step_d, EPS, D, COMPUTE: tl.constexpr, WHOLE_D: tl.constexpr):
    """Mean and 1 / standard deviation of one query, and the normalised query's product with the bias of the keys."""
    d = tl.arange(0, WHOLE_D)
    inside = d < D
    q = tl.load(query + d * query_step_d, mask=inside, other=0.0).to(COMPUTE)
    mean = tl.sum(q, axis=0) / D
    apart = tl.where(inside, q - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, axis=0) / D + EPS)
    q = apart * rstd * tl.load(norm_ptr + d, mask=inside, other=0.0)
    q += tl.load(norm_ptr + D + d, mask=inside, other=0.0)
    shift = tl.sum(q * tl.load(norm_ptr + 3 * D + d, mask=inside, other=0.0), axis=0)
    return mean, rstd, shift


@triton.jit
def class_row(
    query_ptr,  # (B, H, D)
    key_ptr,  # (B, N, H, D)
    norm_ptr,  # (4, D): weight and bias of the query's LayerNorm, then of the keys'; or unused
    image,
    SCALE,
    EPS,
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
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_N,) mean over heads of ``softmax(SCALE * query @ key^T)`` of one image; 0 beyond the N-th token."""
    n = tl.arange(0, BLOCK_N)
    tokens = n < N
    d = tl.arange(0, BLOCK_D)
    # Any axis may be the outermost, and 32 bits not reach from one head, or column, to the last.
    query_step_h, query_step_d = tl.full((), query_stride_h, tl.int64), tl.full((), query_stride_d, tl.int64)
    key_step_h, key_step_d = tl.full((), key_stride_h, tl.int64), tl.full((), key_stride_d, tl.int64)
    offsets = n.to(tl.int64)[:, None] * key_stride_n + d[None, :] * key_step_d
    total = tl.zeros((BLOCK_N,), COMPUTE)
    for head in range(H):
        query = query_ptr + image.to(tl.int64) * query_stride_b + head * query_step_h
        keys = key_ptr + image.to(tl.int64) * key_stride_b + head * key_step_h
        if HAS_NORM:
            query_mean, query_rstd, shift = _query_norm(query, norm_ptr, query_step_d, EPS, D, COMPUTE, WHOLE_D)
            mean = tl.zeros((BLOCK_N,), COMPUTE)
            for start in range(0, D, BLOCK_D):
                at = start + d
                inside = tokens[:, None] & (at < D)[None, :]
                key = tl.load(keys + start * key_step_d + offsets, mask=inside, other=0.0).to(COMPUTE)
                mean += tl.sum(key, axis=1)
            mean /= D

        logits = tl.zeros((BLOCK_N,), COMPUTE)
        squares = tl.zeros((BLOCK_N,), COMPUTE)
        for start in range(0, D, BLOCK_D):
            at = start + d
            inside = tokens[:, None] & (at < D)[None, :]
            q = tl.load(query + at * query_step_d, mask=at < D, other=0.0).to(COMPUTE)
            key = tl.load(keys + start * key_step_d + offsets, mask=inside, other=0.0).to(COMPUTE)
            if HAS_NORM:
                q = (q - query_mean) * query_rstd
                q = q * tl.load(norm_ptr + at, mask=at < D, other=0.0)
                q += tl.load(norm_ptr + D + at, mask=at < D, other=0.0)
                q *= tl.load(norm_ptr + 2 * D + at, mask=at < D, other=0.0)
                key = tl.where(inside, key - mean[:, None], 0.0)
                squares += tl.sum(key * key, axis=1)
            logits += tl.sum(key * q[None, :], axis=1)
        if HAS_NORM:
            logits = logits / tl.sqrt(squares / D + EPS) + shift

        logits = tl.where(tokens, logits * tl.full((), SCALE, COMPUTE), float("-inf"))
        weights = tl.exp(logits - tl.max(logits, axis=0))
        total += weights / tl.sum(weights, axis=0)
    return total / H


def class_row_args(query: Tensor, key: Tensor, scale: float) -> tuple[dict[str, Any], int]:
    """Launch arguments that `class_row` needs without a norm, and warps to give it, for query (B, H, D) and key
    (B, N, H, D)."""
    _, N, H, D = key.shape
    BLOCK_N = max(16, triton.next_power_of_2(N))
    warps = min(max(BLOCK_N // 64, 2), 8 if BLOCK_N <= 1024 else 16)
    args = {
        "query_ptr": query,
        "key_ptr": key,
        "SCALE": scale,
        "N": N,
        "H": H,
        "D": D,
        "query_stride_b": query.stride(0),
        "query_stride_h": query.stride(1),
        "query_stride_d": query.stride(2),
        "key_stride_b": key.stride(0),
        "key_stride_n": key.stride(1),
        "key_stride_h": key.stride(2),
        "key_stride_d": key.stride(3),
        "COMPUTE": compute_type(query.dtype),
        "BLOCK_N": BLOCK_N,
        # 16 entries of keys a thread, as long as rows are read 16 bytes at a time.
        "BLOCK_D": min(triton.next_power_of_2(D), max(16 * 32 * warps // BLOCK_N, 16 // key.element_size())),
    }
    return args, warps
