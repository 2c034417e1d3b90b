"""The tile of a matrix product that every kernel of the linear family makes, and how its programs are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels import tuning
from smi_kernels.launch import launch
from smi_kernels.linear.vendor import product
from smi_kernels.tiles import compute_type, dot


@triton.jit
def tile_position(M, OUT, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program's tile; neighbours in time share columns of the weights through L2."""
    GROUP: tl.constexpr = 8
    tiles_n = tl.cdiv(OUT, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def product_tile(
    a_ptr,  # (M, K), contiguous along K; the product itself, (M, OUT), if VENDOR
    b_ptr,  # element (k, n) at k * b_stride_k + n * b_stride_n
    rows,  # (BLOCK_M,)
    columns,  # (BLOCK_N,)
    M,
    OUT,
    K,
    a_stride_m,
    b_stride_k,
    b_stride_n,
    VENDOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) tile of a @ b. Rows beyond the end repeat the last one, columns are 0; stores mask both."""
    if VENDOR:
        at = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
        inside = (rows < M)[:, None] & (columns < OUT)[None, :]
        product = tl.load(a_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    else:
        k = tl.arange(0, BLOCK_K)
        a_tile = a_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_stride_m + k[None, :]
        b_tile = b_ptr + k[:, None] * b_stride_k + columns.to(tl.int64)[None, :] * b_stride_n
        product = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                a = tl.load(a_tile)
                b = tl.load(b_tile, mask=(columns < OUT)[None, :], other=0.0)
            else:
                a = tl.load(a_tile, mask=(k < K - start)[None, :], other=0.0)
                b = tl.load(b_tile, mask=(k < K - start)[:, None] & (columns < OUT)[None, :], other=0.0)
            product = dot(a, b, product, PRECISION)
            a_tile += BLOCK_K
            b_tile += BLOCK_K * b_stride_k
    return product


def launch_tiles(
    kernel: Any,
    args: dict[str, Any],
    tile: tuning.Tile,
    M: int,
    N: int,
    K: int,
    precision: str,
    compute: torch.dtype,
    factors: tuple[str, Tensor] | None = None,
) -> None:
    """Launch one program for each tile of an (M, N) result whose sums run over K.

    `factors` are the name of the left operand and the right one as (K, N), of a kernel that takes their product too.
    """
    if factors is not None:
        left, right = factors
        made = {left: product(args[left], right, precision)} if tile.vendor and M else {}
        args = {**args, **made, "VENDOR": tile.vendor}
    launch(
        kernel,
        (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),),
        {
            **args,
            "EVEN_K": tile.vendor or K % tile.k == 0,
            "PRECISION": tuning.dot_precision(precision),
            "COMPUTE": compute_type(compute),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=min(255, 2048 // tile.warps),
    )
