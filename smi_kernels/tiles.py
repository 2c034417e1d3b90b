"""What kernels share: matrix products of tiles, activations, the highest of scores, and merging of row statistics.

Row statistics come in chunks of `STAT_CHUNK` columns, as (mean, sum of squared deviations): whoever writes rows of
width D leaves ceil(D / STAT_CHUNK) pairs a row, and whoever normalises them merges the pairs (Chan, Golub & LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979). The chunk is fixed, so statistics do
not depend on tile sizes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from smi_kernels import dtypes
from smi_kernels.dtypes import chunks as chunks
from smi_kernels.launch import DEPENDENT_LAUNCH

STAT_CHUNK = tl.constexpr(dtypes.STAT_CHUNK)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_DEPENDENT = tl.constexpr(DEPENDENT_LAUNCH and not _INTERPRETED.value)


@triton.jit
def wait_for_previous():
    """What every kernel does first: under dependent launch it may have been started before the one before it ended.

    Nothing is read or written earlier, so that all kernels before it in the stream have done their work: each waited
    likewise. The next one may then be started, and waits here while this one works.
    """
    if _DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``; PRECISION is "ieee" or "tf32" and matters to float32 operands only."""
    if _INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter has no bfloat16 arithmetic
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def row_moments(stats_ptr, rows, stride_m, M, D, EPS, COMPUTE: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and 1 / standard deviation of each row of `rows`, out of its ceil(D / STAT_CHUNK) <= CHUNKS pairs."""
    chunk = tl.arange(0, CHUNKS)
    count = tl.minimum(tl.maximum(D - chunk * STAT_CHUNK, 0), STAT_CHUNK).to(COMPUTE)
    number = tl.arange(0, 2 * CHUNKS)
    inside = (rows < M)[:, None] & (number // 2 * STAT_CHUNK < D)[None, :]
    pairs = tl.load(stats_ptr + rows.to(tl.int64)[:, None] * stride_m + number[None, :], mask=inside, other=0.0)
    means, squares = tl.split(tl.reshape(pairs, (rows.shape[0], CHUNKS, 2)))
    mean = tl.sum(means * count[None, :], axis=1) / D
    apart = means - mean[:, None]
    variance = (tl.sum(squares, axis=1) + tl.sum(apart * apart * count[None, :], axis=1)) / D
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def store_row_statistics(stats_ptr, x, rows, first, stride_m, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave the pairs of the columns ``first .. first + BLOCK_N`` of the tile `x` (BLOCK_M, BLOCK_N)."""
    PARTS: tl.constexpr = BLOCK_N // STAT_CHUNK
    column = first + tl.reshape(tl.arange(0, BLOCK_N), (1, PARTS, STAT_CHUNK))
    inside = column < D
    count = tl.maximum(tl.sum(inside.to(tl.int32), axis=2), 1)
    parts = tl.reshape(x, (BLOCK_M, PARTS, STAT_CHUNK))
    mean = tl.sum(tl.where(inside, parts, 0.0), axis=2) / count
    apart = tl.where(inside, parts - mean[:, :, None], 0.0)
    chunk = first // STAT_CHUNK + tl.arange(0, PARTS)
    pairs = stats_ptr + rows.to(tl.int64)[:, None] * stride_m + chunk[None, :] * 2
    mask = (rows < M)[:, None] & (chunk * STAT_CHUNK < D)[None, :]
    tl.store(pairs, mean, mask=mask)
    tl.store(pairs + 1, tl.sum(apart * apart, axis=2), mask=mask)


@triton.jit
def merge_moments(mean, squares, x, first, D, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and sum of squared deviations of `COUNT` columns together with those of the tile `x` (M, WIDTH) behind them.

    `x` begins at column `first`; columns from D on do not count.
    """
    count = tl.minimum(tl.maximum(D - first, 0), WIDTH)
    inside = (tl.arange(0, WIDTH) < count)[None, :]
    mean_x = tl.sum(tl.where(inside, x, 0.0), axis=1) / tl.maximum(count, 1)
    apart = tl.where(inside, x - mean_x[:, None], 0.0)
    share = count.to(x.dtype) / tl.maximum(count + COUNT, 1)  # of integers it would be a float32
    between = mean_x - mean
    # In this order, so that a mean whose square would overflow does not make NaN of nothing to merge with.
    squares += tl.sum(apart * apart, axis=1) + between * (between * (share * COUNT))
    return mean + between * share, squares


@triton.jit
def among_highest(scores, candidates, count):
    """Whether each of `scores`, float32 or float64, is among the `count` highest `candidates`; earlier ties first."""
    if scores.dtype == tl.float64:
        BITS: tl.constexpr = 64
        ORDER: tl.constexpr = tl.int64
    else:
        BITS: tl.constexpr = 32
        ORDER: tl.constexpr = tl.int32
    one = tl.full((), 1, ORDER)
    lowest = one << (BITS - 1)
    bits = scores.to(ORDER, bitcast=True)
    order = tl.where(bits < 0, bits ^ ~lowest, bits)
    order = tl.where(bits == lowest, 0, order)  # -0 is as high as +0
    order = tl.where(scores != scores, ~lowest, order)

    enough = tl.sum((candidates & (order >= 0)).to(tl.int32), axis=0) >= count
    threshold = tl.where(enough, 0, lowest)
    step = one << (BITS - 2)
    for _ in range(BITS - 1):
        higher = threshold | step
        enough = tl.sum((candidates & (order >= higher)).to(tl.int32), axis=0) >= count
        threshold = tl.where(enough, higher, threshold)
        step = step >> 1

    above = candidates & (order > threshold)
    ties = (candidates & (order == threshold)).to(tl.int32)
    left = count - tl.sum(above.to(tl.int32), axis=0)
    return above | ((ties > 0) & (tl.cumsum(ties, axis=0) <= left))


@triton.jit
def gelu_factor(u, KIND: tl.constexpr):
    """The factor of `u` in a GELU of `KIND` (`smi_kernels.linear.reference.GELUS`), and that factor's derivative."""
    if KIND == "erf":
        below = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        A: tl.constexpr = 1.5957691216057308 if KIND == "tanh" else 1.702
        B: tl.constexpr = 0.044715 if KIND == "tanh" else 0.0
        below = 1.0 / (1.0 + tl.exp(-A * u * (1.0 + B * u * u)))
        density = below * (1.0 - below) * A * (1.0 + 3.0 * B * u * u)
    return below, density


def compute_type(dtype: torch.dtype) -> Any:
    """What kernels accumulate in: float64 for float64 tensors, which only tests use, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
