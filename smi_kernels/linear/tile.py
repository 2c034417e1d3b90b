"""The tile of a matrix product that every kernel of the linear family makes, and how its programs are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
    a,  # (M, K), contiguous along K: its pointer or, if BY is "tma", descriptor; of the product, (M, OUT), if "vendor"
    b,  # (OUT, K) if B_IS_OUT_BY_K else (K, OUT), contiguous: likewise
    rows,  # (BLOCK_M,); from first_row on, if BY is "tma"
    columns,  # (BLOCK_N,), from first_column on
    first_row,
    first_column,
    M,
    OUT,
    K,
    a_stride_m,
    B_IS_OUT_BY_K: tl.constexpr,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) tile of the product. Columns beyond the end are 0, rows there arbitrary; stores mask both."""
    if BY == "vendor":
        at = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
        inside = (rows < M)[:, None] & (columns < OUT)[None, :]
        product = tl.load(a + at, mask=inside, other=0.0).to(COMPUTE)
    elif BY == "tma":
        product = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for start in range(0, K, BLOCK_K):
            if B_IS_OUT_BY_K:
                right = b.load([first_column, start]).T
            else:
                right = b.load([start, first_column])
            product = dot(a.load([first_row, start]), right, product, PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        left_at = a + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_stride_m + k[None, :]
        if B_IS_OUT_BY_K:
            right_at = b + columns.to(tl.int64)[None, :] * K + k[:, None]
        else:
            right_at = b + k.to(tl.int64)[:, None] * OUT + columns[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                left = tl.load(left_at)
                right = tl.load(right_at, mask=(columns < OUT)[None, :], other=0.0)
            else:
                left = tl.load(left_at, mask=(k < K - start)[None, :], other=0.0)
                right = tl.load(right_at, mask=(k < K - start)[:, None] & (columns < OUT)[None, :], other=0.0)
            product = dot(left, right, product, PRECISION)
            left_at += BLOCK_K
            if B_IS_OUT_BY_K:
                right_at += BLOCK_K
            else:
                right_at += BLOCK_K * OUT
    return product


@triton.jit
def column_chunks(x, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """The tile `x` (M, N) as N / WIDTH tiles (M, WIDTH), from left to right.

    An epilogue that goes from one to the next needs registers for one of them, and not for the whole tile.
    """
    if N == WIDTH:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        return column_chunks(left, M, N // 2, WIDTH) + column_chunks(right, M, N // 2, WIDTH)


def launch_tiles(
    kernel: Any,
    args: dict[str, Any],
    tile: tuning.Tile,
    M: int,
    N: int,
    K: int,
    precision: str,
    compute: torch.dtype,
    left: str | None = None,
    weight_is_out_by_k: bool = False,
    frugal: bool = True,
) -> None:
    """Launch one program for each tile of an (M, N) result whose sums run over K.

    Args:
        left: name of the left operand, of a kernel that can have its product of ``weight_ptr`` by other means than
            loads through pointers (`tuning.Tile.by`).
        weight_is_out_by_k: whether the weight is (N, K); (K, N) otherwise.
        frugal: whether the epilogue leaves registers enough where programs share them; slopes of GELU's approximations
            and an extra gradient do not, nor do widths that are no multiples of 16, whose elements come one by one.
    """
    by = tile.by
    if left is not None:
        a, weight = args[left], args["weight_ptr"]
        if by == "tma" and not (_describable(a) and _describable(weight)):
            by = "pointers"
        if by == "tma":
            block = [tile.n, tile.k] if weight_is_out_by_k else [tile.k, tile.n]
            args = {**args, left: _descriptor(a, [tile.m, tile.k]), "weight_ptr": _descriptor(weight, block)}
        elif by == "vendor" and M:
            args = {**args, left: product(a, weight.T if weight_is_out_by_k else weight, precision)}
        args["BY"] = by
    if not frugal or K % 16 or N % 16:
        tile = tile._replace(programs=1)
    launch(
        kernel,
        (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),),
        {
            **args,
            "EVEN_K": by != "pointers" or K % tile.k == 0,
            "PRECISION": tuning.dot_precision(precision),
            "COMPUTE": compute_type(compute),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=tile.registers,
    )


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of `x` (M, K): 16-byte addresses, rows that lie apart."""
    apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x.numel() > 0 and apart and (x.data_ptr() | x.stride(0) * x.itemsize) % 16 == 0


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
