"""Triton kernels of the attention of the few tokens that a classifier reads to all tokens, and of its gradient.

A program has one head of one image and walks over its tokens in chunks, softmax(q k^T) v growing along. Bytes moved are
those of keys and values, read once forward and twice backward, where their gradients are written too. One or two
queries leave tensor cores nothing to do, so that products are float32 in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.attention.rows import load_rows, normed, pairs, sized, softmax_step, store_gradient, store_rows
from smi_kernels.launch import launch
from smi_kernels.tiles import compute_type, wait_for_previous

_REGISTERS = 168  # The assembler's own choice spills for the sake of a fourth or fifth program.


@triton.jit
def _products(queries, rows):
    """(R, rows) inner products of (R, D) and (rows, D)."""
    return tl.sum(queries[:, None, :] * rows[None, :, :], axis=2)


@triton.jit
def _combined(weights, rows):
    """(R, D) sums over rows of (R, rows) weights times (rows, D)."""
    return tl.sum(weights[:, :, None] * rows[None, :, :], axis=1)


@triton.jit
def _spread(weights, queries):
    """(rows, D) sums over queries of (R, rows) weights times (R, D)."""
    return tl.sum(weights[:, :, None] * queries[:, None, :], axis=0)


@triton.jit
def _keys_and_scores(
    q,  # (R, BLOCK_D)
    k_ptr,
    qk_norm_ptr,
    size_ptr,
    keys,
    EPS,
    N,
    stride_n,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """(keys, BLOCK_D) of keys behind their norm, and (R, keys) of scores; none beyond the last token gets a share."""
    k = load_rows(k_ptr, keys, N, stride_n, D, BLOCK_D, AGAIN)
    k = normed(k, qk_norm_ptr, keys, N, EPS, 1, HAS_NORM, COMPUTE, D, BLOCK_D).to(COMPUTE)
    s = sized(_products(q, k), size_ptr, keys, N, HAS_SIZE)
    return k, tl.where((keys < N)[None, :], s, float("-inf"))


@triton.jit(do_not_specialize=["N"])
def class_attention_kernel(
    query_ptr,  # (B, R, H, D)
    kv_ptr,  # (B, N, 2, H, D)
    qk_norm_ptr,  # (2, 2, D) or unused
    size_ptr,  # (B, N) or unused
    out_ptr,  # (B, R, H, D)
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_previous()
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    if HAS_SIZE:
        size_ptr += image * N
    part = H * D
    query_ptr += image * R * part + head * D
    out_ptr += image * R * part + head * D
    k_ptr = kv_ptr + image * N * (2 * part) + head * D

    queries = tl.arange(0, R)
    q = load_rows(query_ptr, queries, R, part, D, BLOCK_D)
    q = normed(q, qk_norm_ptr, queries, R, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D).to(COMPUTE)
    highest = tl.full((R,), float("-inf"), COMPUTE)
    total = tl.zeros((R,), COMPUTE)
    out = tl.zeros((R, BLOCK_D), COMPUTE)
    for start in tl.range(0, N, BLOCK_N, disable_licm=True):
        keys = start + tl.arange(0, BLOCK_N)
        v = load_rows(k_ptr + part, keys, N, 2 * part, D, BLOCK_D).to(COMPUTE)
        _, s = _keys_and_scores(
            q, k_ptr, qk_norm_ptr, size_ptr, keys, EPS, N, 2 * part, HAS_NORM, HAS_SIZE, COMPUTE, D, BLOCK_D, False
        )
        p, shrink, highest, total = softmax_step(s, highest, total)
        out = out * shrink[:, None] + _combined(p, v)
    out *= (1.0 / total)[:, None]
    store_rows(out_ptr, out.to(out_ptr.dtype.element_ty), queries, R, part, D, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def class_attention_dx_kernel(
    query_ptr,  # (B, R, H, D)
    kv_ptr,  # (B, N, 2, H, D)
    d_out_ptr,  # (B, R, H, D)
    qk_norm_ptr,  # (2, 2, D) or unused
    size_ptr,  # (B, N) or unused
    q_colsum_ptr,  # (H, D)
    q_bias_ptr,  # (H, D)
    kv_colsum_ptr,  # (2, H, D)
    kv_bias_ptr,  # (2, H, D)
    d_query_ptr,  # (B, R, H, D)
    d_kv_ptr,  # (B, N, 2, H, D)
    dstats_ptr,  # (B, N, H, 2)
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_previous()
    image = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    if HAS_SIZE:
        size_ptr += image * N
    part = H * D
    query_ptr += image * R * part + head * D
    d_out_ptr += image * R * part + head * D
    d_query_ptr += image * R * part + head * D
    kv_ptr += image * N * (2 * part) + head * D
    d_kv_ptr += image * N * (2 * part) + head * D
    dstats_ptr += (image * N * H + head) * 2
    kv_colsum_ptr += head * D
    kv_bias_ptr += head * D

    queries = tl.arange(0, R)
    q = load_rows(query_ptr, queries, R, part, D, BLOCK_D)
    q = normed(q, qk_norm_ptr, queries, R, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D).to(COMPUTE)
    d_out = load_rows(d_out_ptr, queries, R, part, D, BLOCK_D).to(COMPUTE)
    highest = tl.full((R,), float("-inf"), COMPUTE)
    total = tl.zeros((R,), COMPUTE)
    delta = tl.zeros((R,), COMPUTE)
    for start in tl.range(0, N, BLOCK_N, disable_licm=True):
        keys = start + tl.arange(0, BLOCK_N)
        v = load_rows(kv_ptr + part, keys, N, 2 * part, D, BLOCK_D, AGAIN=True).to(COMPUTE)
        _, s = _keys_and_scores(
            q, kv_ptr, qk_norm_ptr, size_ptr, keys, EPS, N, 2 * part, HAS_NORM, HAS_SIZE, COMPUTE, D, BLOCK_D, True
        )
        p, shrink, highest, total = softmax_step(s, highest, total)
        delta = delta * shrink + tl.sum(p * _products(d_out, v), axis=1)
    share = 1.0 / total
    delta *= share

    dq = tl.zeros((R, BLOCK_D), COMPUTE)
    first_sums = tl.zeros((BLOCK_N, 2), COMPUTE)
    for start in tl.range(0, N, BLOCK_N, disable_licm=True):
        keys = start + tl.arange(0, BLOCK_N)
        v = load_rows(kv_ptr + part, keys, N, 2 * part, D, BLOCK_D).to(COMPUTE)
        k, s = _keys_and_scores(
            q, kv_ptr, qk_norm_ptr, size_ptr, keys, EPS, N, 2 * part, HAS_NORM, HAS_SIZE, COMPUTE, D, BLOCK_D, False
        )
        p = tl.exp(s - highest[:, None]) * share[:, None]
        ds = p * (_products(d_out, v) - delta[:, None])
        dq += _combined(ds, k)
        sums = store_gradient(
            _spread(ds, q), kv_ptr, qk_norm_ptr, kv_colsum_ptr, kv_bias_ptr, d_kv_ptr,
            EPS, keys, N, 2 * part, 1, HAS_NORM, COMPUTE, D, BLOCK_D,
        )  # fmt: skip
        sums += store_gradient(
            _spread(p, d_out), kv_ptr + part, qk_norm_ptr, kv_colsum_ptr + part, kv_bias_ptr + part, d_kv_ptr + part,
            EPS, keys, N, 2 * part, 2, False, COMPUTE, D, BLOCK_D,
        )  # fmt: skip
        # Rows that queries were made from wait for dq, which is known at the end.
        first_sums = tl.where(start == 0, sums, first_sums)
        tl.store(pairs(dstats_ptr, keys, H * 2), sums, mask=((keys >= R) & (keys < N))[:, None])
    q_sums = store_gradient(
        dq, query_ptr, qk_norm_ptr, q_colsum_ptr + head * D, q_bias_ptr + head * D, d_query_ptr,
        EPS, queries, R, part, 0, HAS_NORM, COMPUTE, D, BLOCK_D,
    )  # fmt: skip
    own = queries[:, None, None] == tl.arange(0, BLOCK_N)[None, :, None]
    q_sums += tl.sum(tl.where(own, first_sums[None, :, :], 0.0), axis=1)
    tl.store(pairs(dstats_ptr, queries, H * 2), q_sums)


def class_attention(
    query: Tensor, kv: Tensor, qk_norm: Tensor | None, eps: float, size: Tensor | None = None
) -> Tensor:
    """As `smi_kernels.attention.reference.class_attention`."""
    query, kv = query.contiguous(), kv.contiguous()
    B, R, H, D = query.shape
    out = torch.empty(B, R, H * D, dtype=query.dtype, device=query.device)
    args = {
        "query_ptr": query,
        "kv_ptr": kv,
        "qk_norm_ptr": None if qk_norm is None else qk_norm.contiguous(),
        "size_ptr": size if size is None else size.contiguous(),
        "out_ptr": out,
        "EPS": eps,
        "N": kv.shape[1],
        "H": H,
        "HAS_NORM": qk_norm is not None,
        "HAS_SIZE": size is not None,
        "COMPUTE": compute_type(query.dtype),
        "R": R,
        "D": D,
        **_blocks(kv.shape[1], D),
    }
    launch(class_attention_kernel, (B * H,), args, num_warps=4, num_stages=1, max_registers=_REGISTERS)
    return out


def class_attention_dx(
    query: Tensor,
    kv: Tensor,
    d_out: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    q_colsum: Tensor,
    q_bias: Tensor,
    kv_colsum: Tensor,
    kv_bias: Tensor,
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.attention.reference.class_attention_dx`."""
    query, kv, d_out = query.contiguous(), kv.contiguous(), d_out.contiguous()
    B, R, H, D = query.shape
    N = kv.shape[1]
    d_query = torch.empty_like(query)
    d_kv = torch.empty_like(kv)
    dstats = torch.empty(B * N, H, 2, dtype=q_colsum.dtype, device=query.device)
    args = {
        "query_ptr": query,
        "kv_ptr": kv,
        "d_out_ptr": d_out,
        "qk_norm_ptr": None if qk_norm is None else qk_norm.contiguous(),
        "size_ptr": size if size is None else size.contiguous(),
        "q_colsum_ptr": q_colsum.contiguous(),
        "q_bias_ptr": q_bias.contiguous(),
        "kv_colsum_ptr": kv_colsum.contiguous(),
        "kv_bias_ptr": kv_bias.contiguous(),
        "d_query_ptr": d_query,
        "d_kv_ptr": d_kv,
        "dstats_ptr": dstats,
        "EPS": eps,
        "N": N,
        "H": H,
        "HAS_NORM": qk_norm is not None,
        "HAS_SIZE": size is not None,
        "COMPUTE": compute_type(query.dtype),
        "R": R,
        "D": D,
        **_blocks(N, D),
    }
    launch(class_attention_dx_kernel, (B * H,), args, num_warps=4, num_stages=1, max_registers=_REGISTERS)
    return d_query, d_kv, dstats


def _blocks(N: int, D: int) -> dict[str, int]:
    BLOCK_D = max(16, triton.next_power_of_2(D))
    return {"BLOCK_D": BLOCK_D, "BLOCK_N": min(2048 // BLOCK_D, max(16, triton.next_power_of_2(N)))}
