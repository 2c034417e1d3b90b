"""Triton kernels of self-attention over the tokens of one image, softmax(q k^T) v, and of its gradient.

A program has one head of one image, in the forward of long rows one block of its queries. It reads q, k, v (and the
output's gradient) once where all tokens fit one tile, so that bytes moved are B N H d times 4 elements forward and 7
backward; probabilities are made again in the backward and never leave the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels import tuning
from smi_kernels.attention.class_kernels import class_attention, class_attention_dx
from smi_kernels.attention.row import attention_row
from smi_kernels.attention.rows import (
    load_keys,
    load_rows,
    load_transposed,
    normed,
    pairs,
    sized,
    softmax_step,
    store_gradient,
    store_rows,
)
from smi_kernels.launch import launch
from smi_kernels.tiles import compute_type, dot, wait_for_previous

__all__ = ["attention", "attention_dx", "attention_row", "class_attention", "class_attention_dx"]


@triton.jit
def _scores(q, kt, size_ptr, keys, N, HAS_SIZE: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """(queries, keys) tile of q @ k^T + log size; keys beyond the last token get no share of a softmax."""
    s = dot(q, kt, tl.zeros((q.shape[0], kt.shape[1]), COMPUTE), PRECISION)
    s = sized(s, size_ptr, keys, N, HAS_SIZE)
    return tl.where((keys < N)[None, :], s, float("-inf"))


@triton.jit(do_not_specialize=["N"])
def attention_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    qk_norm_ptr,  # (2, 2, D) or unused
    size_ptr,  # (B, N) or unused
    out_ptr,  # (B, N, H, D)
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_previous()
    blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks % H
    first_row = (pid // blocks // H).to(tl.int64) * N
    if HAS_SIZE:
        size_ptr += first_row
    stride_n = 3 * H * D
    q_ptr = qkv_ptr + first_row * stride_n + head * D
    k_ptr = q_ptr + H * D
    v_ptr = k_ptr + H * D

    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, N, stride_n, D, BLOCK_D)
    q = normed(q, qk_norm_ptr, rows, N, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D)
    highest = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    total = tl.zeros((BLOCK_M,), COMPUTE)
    out = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    for start in range(0, BLOCK_N if WHOLE else N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        kt = load_keys(k_ptr, qk_norm_ptr, keys, N, stride_n, EPS, HAS_NORM, COMPUTE, D, BLOCK_D)
        v = load_rows(v_ptr, keys, N, stride_n, D, BLOCK_D)
        s = _scores(q, kt, size_ptr, keys, N, HAS_SIZE, PRECISION, COMPUTE)
        higher = tl.maximum(highest, tl.max(s, axis=1))
        p = tl.exp(s - higher[:, None])
        if not WHOLE:
            shrink = tl.exp(highest - higher)
            total *= shrink
            out *= shrink[:, None]
        total += tl.sum(p, axis=1)
        out = dot(p.to(v.dtype), v, out, PRECISION)
        highest = higher
    out *= (1.0 / total)[:, None]
    store_rows(out_ptr + first_row * (H * D) + head * D, out.to(out_ptr.dtype.element_ty), rows, N, H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def attention_dx_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    d_out_ptr,  # (B, N, H, D)
    qk_norm_ptr,  # (2, 2, D) or unused
    size_ptr,  # (B, N) or unused
    colsum_ptr,  # (3, H, D)
    bias_ptr,  # (3, H, D)
    dqkv_ptr,  # (B, N, 3, H, D)
    dstats_ptr,  # (B, N, H, 2)
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_previous()
    pid = tl.program_id(0)
    head = pid % H
    first_row = (pid // H).to(tl.int64) * N
    if HAS_SIZE:
        size_ptr += first_row
    stride_n = 3 * H * D
    part = H * D
    qkv_ptr += first_row * stride_n + head * D
    d_out_ptr += first_row * part + head * D
    dqkv_ptr += first_row * stride_n + head * D
    dstats_ptr += (first_row * H + head) * 2
    colsum_ptr += head * D
    bias_ptr += head * D

    rows = tl.arange(0, BLOCK_N)
    q = load_rows(qkv_ptr, rows, N, stride_n, D, BLOCK_D, AGAIN=True)
    kt = load_keys(qkv_ptr + part, qk_norm_ptr, rows, N, stride_n, EPS, HAS_NORM, COMPUTE, D, BLOCK_D, AGAIN=True)
    vt = load_transposed(qkv_ptr + 2 * part, rows, N, stride_n, D, BLOCK_D, AGAIN=True)
    d_out = load_rows(d_out_ptr, rows, N, part, D, BLOCK_D)
    q = normed(q, qk_norm_ptr, rows, N, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D)

    # Each gradient leaves as soon as it is known, so that few tiles are alive at a time.
    nothing = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    s = _scores(q, kt, size_ptr, rows, N, HAS_SIZE, PRECISION, COMPUTE)
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    p *= (1.0 / tl.sum(p, axis=1))[:, None]
    dv = dot(tl.trans(p.to(q.dtype)), d_out, nothing, PRECISION)
    sums = store_gradient(
        dv, qkv_ptr + 2 * part, qk_norm_ptr, colsum_ptr + 2 * part, bias_ptr + 2 * part, dqkv_ptr + 2 * part,
        EPS, rows, N, stride_n, 2, False, COMPUTE, D, BLOCK_D,
    )  # fmt: skip
    dp = dot(d_out, vt, tl.zeros((BLOCK_N, BLOCK_N), COMPUTE), PRECISION)
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q.dtype)
    if HAS_NORM:
        k = tl.trans(kt)
    else:  # read again, sooner than keep them in registers
        k = load_rows(qkv_ptr + part, rows, N, stride_n, D, BLOCK_D)
    dk = dot(tl.trans(ds), q, nothing, PRECISION)
    sums += store_gradient(
        dk, qkv_ptr + part, qk_norm_ptr, colsum_ptr + part, bias_ptr + part, dqkv_ptr + part,
        EPS, rows, N, stride_n, 1, HAS_NORM, COMPUTE, D, BLOCK_D,
    )  # fmt: skip
    dq = dot(ds, k, nothing, PRECISION)
    sums += store_gradient(
        dq, qkv_ptr, qk_norm_ptr, colsum_ptr, bias_ptr, dqkv_ptr,
        EPS, rows, N, stride_n, 0, HAS_NORM, COMPUTE, D, BLOCK_D,
    )  # fmt: skip
    tl.store(pairs(dstats_ptr, rows, H * 2), sums, mask=(rows < N)[:, None])


@triton.jit(do_not_specialize=["N"])
def attention_long_dx_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    d_out_ptr,  # (B, N, H, D)
    qk_norm_ptr,  # (2, 2, D) or unused
    size_ptr,  # (B, N) or unused
    colsum_ptr,  # (3, H, D)
    bias_ptr,  # (3, H, D)
    dqkv_ptr,  # (B, N, 3, H, D)
    dstats_ptr,  # (B, N, H, 2)
    softmax_ptr,  # (B, H, 3, N)
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Nine products of all tokens with all where five would do: the forward saves nothing, and sums over queries and
    # over keys want loops of their own. Launched one after the other these would fill more of a GPU when there are few
    # images, but each block of the network would have a kernel more.
    wait_for_previous()
    pid = tl.program_id(0)
    head = pid % H
    first_row = (pid // H).to(tl.int64) * N
    if HAS_SIZE:
        size_ptr += first_row
    qkv_ptr += first_row * (3 * H * D) + head * D
    d_out_ptr += first_row * (H * D) + head * D
    dqkv_ptr += first_row * (3 * H * D) + head * D
    dstats_ptr += (first_row * H + head) * 2
    colsum_ptr += head * D
    bias_ptr += head * D
    softmax_ptr += pid.to(tl.int64) * 3 * N
    _queries_dx(
        qkv_ptr, d_out_ptr, qk_norm_ptr, size_ptr, colsum_ptr, bias_ptr, dqkv_ptr, dstats_ptr, softmax_ptr,
        EPS, N, H, HAS_NORM, HAS_SIZE, PRECISION, COMPUTE, D, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # What follows reads what other threads of this program, and no other program, wrote to dstats and softmax. A
    # barrier of the program orders global memory among its threads.
    tl.debug_barrier()
    _keys_dx(
        qkv_ptr, d_out_ptr, qk_norm_ptr, size_ptr, colsum_ptr, bias_ptr, dqkv_ptr, dstats_ptr, softmax_ptr,
        EPS, N, H, HAS_NORM, HAS_SIZE, PRECISION, COMPUTE, D, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _queries_dx(
    qkv_ptr,  # (N, 3, H, D) of one image, at the columns of one head; the others likewise
    d_out_ptr,
    qk_norm_ptr,
    size_ptr,
    colsum_ptr,
    bias_ptr,
    dqkv_ptr,
    dstats_ptr,
    softmax_ptr,
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, its sums, and for each query its highest score, 1 / sum of exponentials, and sum of p dp."""
    stride_n = 3 * H * D
    k_ptr = qkv_ptr + H * D
    v_ptr = k_ptr + H * D
    for first in tl.range(0, N, BLOCK_M, disable_licm=True):
        rows = first + tl.arange(0, BLOCK_M)
        q = load_rows(qkv_ptr, rows, N, stride_n, D, BLOCK_D, AGAIN=True)
        q = normed(q, qk_norm_ptr, rows, N, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D)
        d_out = load_rows(d_out_ptr, rows, N, H * D, D, BLOCK_D)
        highest = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
        total = tl.zeros((BLOCK_M,), COMPUTE)
        delta = tl.zeros((BLOCK_M,), COMPUTE)
        for start in tl.range(0, N, BLOCK_N, disable_licm=True):
            keys = start + tl.arange(0, BLOCK_N)
            kt = load_keys(k_ptr, qk_norm_ptr, keys, N, stride_n, EPS, HAS_NORM, COMPUTE, D, BLOCK_D)
            vt = load_transposed(v_ptr, keys, N, stride_n, D, BLOCK_D)
            s = _scores(q, kt, size_ptr, keys, N, HAS_SIZE, PRECISION, COMPUTE)
            p, shrink, highest, total = softmax_step(s, highest, total)
            dp = dot(d_out, vt, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), PRECISION)
            delta = delta * shrink + tl.sum(p * dp, axis=1)
        share = 1.0 / total
        delta *= share
        dq = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
        for start in tl.range(0, N, BLOCK_N, disable_licm=True):
            keys = start + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, keys, N, stride_n, D, BLOCK_D)
            k = normed(k, qk_norm_ptr, keys, N, EPS, 1, HAS_NORM, COMPUTE, D, BLOCK_D)
            vt = load_transposed(v_ptr, keys, N, stride_n, D, BLOCK_D)
            s = _scores(q, tl.trans(k), size_ptr, keys, N, HAS_SIZE, PRECISION, COMPUTE)
            p = tl.exp(s - highest[:, None]) * share[:, None]
            dp = dot(d_out, vt, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), PRECISION)
            dq = dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, PRECISION)
        tl.store(softmax_ptr + rows, highest, mask=rows < N)
        tl.store(softmax_ptr + N + rows, share, mask=rows < N)
        tl.store(softmax_ptr + 2 * N + rows, delta, mask=rows < N)
        sums = store_gradient(
            dq, qkv_ptr, qk_norm_ptr, colsum_ptr, bias_ptr, dqkv_ptr,
            EPS, rows, N, stride_n, 0, HAS_NORM, COMPUTE, D, BLOCK_D,
        )  # fmt: skip
        tl.store(pairs(dstats_ptr, rows, H * 2), sums, mask=(rows < N)[:, None])


@triton.jit
def _keys_dx(
    qkv_ptr,  # (N, 3, H, D) of one image, at the columns of one head; the others likewise
    d_out_ptr,
    qk_norm_ptr,
    size_ptr,
    colsum_ptr,
    bias_ptr,
    dqkv_ptr,
    dstats_ptr,
    softmax_ptr,
    EPS,
    N,
    H,
    HAS_NORM: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv; their sums join those that `_queries_dx` left."""
    stride_n = 3 * H * D
    part = H * D
    for first in tl.range(0, N, BLOCK_M, disable_licm=True):
        keys = first + tl.arange(0, BLOCK_M)
        kt = load_keys(qkv_ptr + part, qk_norm_ptr, keys, N, stride_n, EPS, HAS_NORM, COMPUTE, D, BLOCK_D, AGAIN=True)
        vt = load_transposed(qkv_ptr + 2 * part, keys, N, stride_n, D, BLOCK_D, AGAIN=True)
        dk = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
        dv = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
        for start in tl.range(0, N, BLOCK_N, disable_licm=True):
            rows = start + tl.arange(0, BLOCK_N)
            q = load_rows(qkv_ptr, rows, N, stride_n, D, BLOCK_D)
            q = normed(q, qk_norm_ptr, rows, N, EPS, 0, HAS_NORM, COMPUTE, D, BLOCK_D)
            d_out = load_rows(d_out_ptr, rows, N, part, D, BLOCK_D)
            # Queries beyond the last token are zeros and have a share of zero: they add exactly nothing.
            highest = tl.load(softmax_ptr + rows, mask=rows < N, other=0.0)
            share = tl.load(softmax_ptr + N + rows, mask=rows < N, other=0.0)
            delta = tl.load(softmax_ptr + 2 * N + rows, mask=rows < N, other=0.0)
            s = dot(q, kt, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), PRECISION)
            s = sized(s, size_ptr, keys, N, HAS_SIZE)
            p = tl.exp(s - highest[:, None]) * share[:, None]
            dv = dot(tl.trans(p.to(q.dtype)), d_out, dv, PRECISION)
            dp = dot(d_out, vt, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), PRECISION)
            dk = dot(tl.trans((p * (dp - delta[:, None])).to(q.dtype)), q, dk, PRECISION)
        sums = tl.load(pairs(dstats_ptr, keys, H * 2), mask=(keys < N)[:, None], other=0.0)
        sums += store_gradient(
            dv, qkv_ptr + 2 * part, qk_norm_ptr, colsum_ptr + 2 * part, bias_ptr + 2 * part, dqkv_ptr + 2 * part,
            EPS, keys, N, stride_n, 2, False, COMPUTE, D, BLOCK_D,
        )  # fmt: skip
        sums += store_gradient(
            dk, qkv_ptr + part, qk_norm_ptr, colsum_ptr + part, bias_ptr + part, dqkv_ptr + part,
            EPS, keys, N, stride_n, 1, HAS_NORM, COMPUTE, D, BLOCK_D,
        )  # fmt: skip
        tl.store(pairs(dstats_ptr, keys, H * 2), sums, mask=(keys < N)[:, None])


class _Tile(NamedTuple):
    """Rows of a block, tokens that it meets at a time (`whole`: all there are), warps, stages of loads in a loop, and
    most registers of a thread where the assembler's own choice would spill."""

    m: int
    n: int
    whole: bool
    warps: int
    stages: int
    registers: int | None = None


# What fits the registers of every GPU from compute capability 8.0 on. A choice does not depend on the batch, so that an
# image's bits do not either. Products of float32 keep their operands in registers and get small tiles.


def _forward_tile(N: int, BLOCK_D: int, dtype: torch.dtype) -> _Tile:
    n = max(16, triton.next_power_of_2(N))
    narrow = BLOCK_D <= 64
    if dtype.itemsize == 4 or (dtype.itemsize == 8 and n * BLOCK_D > 2048):
        return _Tile(32, 32 if narrow else 16, False, 4 if narrow else 8, 1, 168)
    if n > (256 if narrow else 128):
        return _Tile(64, 64, False, 4 if narrow else 8, 2)
    warps = {16: 1, 32: 2, 64: 4, 128: 4 if narrow else 8, 256: 8}[n]
    return _Tile(min(n, 64), n, True, warps, 1)


def _dx_tile(N: int, BLOCK_D: int, dtype: torch.dtype, norm: bool, sized: bool) -> _Tile:
    n = max(16, triton.next_power_of_2(N))
    narrow = BLOCK_D <= 64
    if dtype.itemsize == 4 or (dtype.itemsize == 8 and n * BLOCK_D > 2048):
        return _Tile(32, 32 if narrow else 16, False, 8, 1, 255 if sized else None)
    if n > (128 if narrow else 64):
        return _Tile(64, 64, False, 4 if narrow and not norm else 8, 1)
    return _Tile(n, n, True, 8 if n == 128 or not narrow else 4, 1)


def attention(
    qkv: Tensor, qk_norm: Tensor | None, eps: float, precision: str = "ieee", size: Tensor | None = None
) -> Tensor:
    """As `smi_kernels.attention.reference.attention`."""
    qkv = qkv.contiguous()
    B, N, _, H, D = qkv.shape
    out = torch.empty(B, N, H * D, dtype=qkv.dtype, device=qkv.device)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    precision = tuning.dot_precision(precision)
    tile = _forward_tile(N, BLOCK_D, qkv.dtype)
    args = {
        "qkv_ptr": qkv,
        "qk_norm_ptr": None if qk_norm is None else qk_norm.contiguous(),
        "size_ptr": size if size is None else size.contiguous(),
        "out_ptr": out,
        "EPS": eps,
        "N": N,
        "H": H,
        "HAS_NORM": qk_norm is not None,
        "HAS_SIZE": size is not None,
        "WHOLE": tile.whole,
        "PRECISION": precision,
        "COMPUTE": compute_type(qkv.dtype),
        "D": D,
        "BLOCK_D": BLOCK_D,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
    }
    grid = (B * H * -(-N // tile.m),)
    launch(attention_kernel, grid, args, num_warps=tile.warps, num_stages=tile.stages, max_registers=tile.registers)
    return out


def attention_dx(
    qkv: Tensor,
    d_out: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    colsum: Tensor,
    bias: Tensor,
    precision: str = "ieee",
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.attention.reference.attention_dx`."""
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    B, N, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    dstats = torch.empty(B * N, H, 2, dtype=colsum.dtype, device=qkv.device)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    precision = tuning.dot_precision(precision)
    tile = _dx_tile(N, BLOCK_D, qkv.dtype, qk_norm is not None, size is not None)
    args = {
        "qkv_ptr": qkv,
        "d_out_ptr": d_out,
        "qk_norm_ptr": None if qk_norm is None else qk_norm.contiguous(),
        "size_ptr": size if size is None else size.contiguous(),
        "colsum_ptr": colsum.contiguous(),
        "bias_ptr": bias.contiguous(),
        "dqkv_ptr": dqkv,
        "dstats_ptr": dstats,
        "EPS": eps,
        "N": N,
        "H": H,
        "HAS_NORM": qk_norm is not None,
        "HAS_SIZE": size is not None,
        "PRECISION": precision,
        "COMPUTE": compute_type(qkv.dtype),
        "D": D,
        "BLOCK_D": BLOCK_D,
        "BLOCK_N": tile.n,
    }
    kernel = attention_dx_kernel
    if not tile.whole:
        softmax = torch.empty(B, H, 3, N, dtype=colsum.dtype, device=qkv.device)
        kernel = attention_long_dx_kernel
        args |= {"softmax_ptr": softmax, "BLOCK_M": tile.m}
    launch(kernel, (B * H,), args, num_warps=tile.warps, num_stages=tile.stages, max_registers=tile.registers)
    return dqkv, dstats
