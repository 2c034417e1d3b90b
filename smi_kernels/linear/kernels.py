"""Triton kernels of the linear family: one matrix product each, with all that surrounds it in prologue and epilogue.

A program makes a BLOCK_M x BLOCK_N tile of the result in float32 and never splits the sum over K, so its bits do not
depend on the number of rows unless the tile does; nor is code made for particular numbers of rows. Bytes moved: both
operands and the result once, plus the epilogue's reads, as far as tiles share them through L2. The epilogue goes over
the tile in chunks of columns, from left to right: registers would not hold all that it reads beside the product.

How operands come is the tuning table's choice (`BY`, see `smi_kernels.tuning.Tile`); where it is "vendor" the product
stands in the place of the left operand, and the kernel is its epilogue alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels import tuning
from smi_kernels.linear.tile import column_chunks, launch_tiles, product_tile, tile_position
from smi_kernels.linear.vendor import product
from smi_kernels.tiles import (
    STAT_CHUNK,
    chunks,
    gelu_factor,
    merge_moments,
    row_moments,
    wait_for_previous,
)

# Columns of a chunk of an epilogue, and of the one that has most to keep: with triton 3.6 it spills at 32.
_NARROW = tl.constexpr(32)
_NARROWER = tl.constexpr(16)


@triton.jit(do_not_specialize=["M", "stats_every"])
def norm_linear_kernel(
    x_ptr,  # (M, D)
    stats_ptr,  # (M * stats_every, chunks, 2), of which the first of so many belong to the rows of x
    weight_ptr,  # (OUT, D)
    colsum_ptr,  # (OUT,)
    bias_ptr,  # (OUT,)
    u_ptr,  # (M, OUT)
    activation_ptr,  # (M, OUT) or unused
    moments_ptr,  # (M, 2)
    EPS,
    M,
    OUT,
    D,
    stats_every,
    x_stride_m,
    stats_stride_m,
    GELU: tl.constexpr,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, OUT, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    product = product_tile(
        x_ptr, weight_ptr, rows, columns, first_row, first_column, M, OUT, D, x_stride_m, True,
        BY, EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mean, rstd = row_moments(stats_ptr, rows, stats_every * stats_stride_m, M, D, EPS, COMPUTE, CHUNKS)
    if first_column == 0:
        tl.store(moments_ptr + rows * 2, mean, mask=rows < M)
        tl.store(moments_ptr + rows * 2 + 1, rstd, mask=rows < M)
    parts = column_chunks(product, BLOCK_M, BLOCK_N, _NARROW)
    for i in tl.static_range(BLOCK_N // _NARROW):
        columns = first_column + i * _NARROW + tl.arange(0, _NARROW)
        colsum = tl.load(colsum_ptr + columns, mask=columns < OUT, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0)
        u = rstd[:, None] * (parts[i] - mean[:, None] * colsum[None, :]) + bias[None, :]
        at = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
        inside = (rows < M)[:, None] & (columns < OUT)[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=inside)
        if GELU != "":
            below, _ = gelu_factor(u, GELU)
            activation = u * below
            tl.store(activation_ptr + at, activation.to(activation_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def linear_residual_kernel(
    a_ptr,  # (M, K)
    weight_ptr,  # (D, K)
    bias_ptr,  # (D,)
    residual_ptr,  # (M, D)
    x_ptr,  # (M, D)
    x_low_ptr,  # (M, D) or unused
    stats_ptr,  # (M, chunks, 2)
    M,
    D,
    K,
    residual_stride_m,
    stats_stride_m,
    HAS_LOW: tl.constexpr,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, D, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    product = product_tile(
        a_ptr, weight_ptr, rows, columns, first_row, first_column, M, D, K, K, True,
        BY, EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = column_chunks(product, BLOCK_M, BLOCK_N, _NARROWER)
    mean = tl.zeros((BLOCK_M,), COMPUTE)
    squares = tl.zeros((BLOCK_M,), COMPUTE)
    for i in tl.static_range(BLOCK_N // _NARROWER):
        first = first_column + i * _NARROWER
        columns = first + tl.arange(0, _NARROWER)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        x = parts[i] + tl.load(bias_ptr + columns, mask=columns < D, other=0.0)[None, :]
        x += tl.load(
            residual_ptr + rows.to(tl.int64)[:, None] * residual_stride_m + columns[None, :], mask=inside, other=0.0
        )
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(x_ptr + at, x, mask=inside)
        if HAS_LOW:
            tl.store(x_low_ptr + at, x.to(x_low_ptr.dtype.element_ty), mask=inside)
        mean, squares = merge_moments(mean, squares, x, first, D, i * _NARROWER % STAT_CHUNK, _NARROWER)
        if (i + 1) * _NARROWER % STAT_CHUNK == 0:
            chunk = first // STAT_CHUNK
            pairs = stats_ptr + rows.to(tl.int64) * stats_stride_m + chunk * 2
            mask = (rows < M) & (chunk * STAT_CHUNK < D)
            tl.store(pairs, mean, mask=mask)
            tl.store(pairs + 1, squares, mask=mask)
            mean = tl.zeros((BLOCK_M,), COMPUTE)
            squares = tl.zeros((BLOCK_M,), COMPUTE)


@triton.jit(do_not_specialize=["M"])
def linear_dx_kernel(
    dy_ptr,  # (M, OUT)
    weight_ptr,  # (OUT, D)
    dx_ptr,  # (M, D)
    M,
    OUT,
    D,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, D, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    dx = product_tile(
        dy_ptr, weight_ptr, rows, columns, first_row, first_column, M, D, OUT, OUT, False,
        BY, EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def linear_gelu_dx_kernel(
    dy_ptr,  # (M, D)
    weight_ptr,  # (D, OUT)
    u_ptr,  # (M, OUT)
    colsum_ptr,  # (OUT,)
    bias_ptr,  # (OUT,)
    du_ptr,  # (M, OUT)
    dstats_ptr,  # (M, chunks of OUT, 2)
    M,
    OUT,
    D,
    dstats_stride_m,
    GELU: tl.constexpr,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, OUT, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    product = product_tile(
        dy_ptr, weight_ptr, rows, columns, first_row, first_column, M, OUT, D, D, False,
        BY, EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = column_chunks(product, BLOCK_M, BLOCK_N, _NARROW)
    with_colsum = tl.zeros((BLOCK_M,), COMPUTE)
    with_u = tl.zeros((BLOCK_M,), COMPUTE)
    for i in tl.static_range(BLOCK_N // _NARROW):
        columns = first_column + i * _NARROW + tl.arange(0, _NARROW)
        at = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
        inside = (rows < M)[:, None] & (columns < OUT)[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        below, density = gelu_factor(u, GELU)
        du = (parts[i] * (below + u * density)).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + at, du, mask=inside)

        # The sums are over du as it was stored, since that is what the next product reads, and 0 beyond the end.
        du = du.to(COMPUTE)
        colsum = tl.load(colsum_ptr + columns, mask=columns < OUT, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0)
        with_colsum += tl.sum(du * colsum[None, :], axis=1)
        with_u += tl.sum(du * (u - bias[None, :]), axis=1)
        if (i + 1) * _NARROW % STAT_CHUNK == 0:
            first = first_column + (i + 1) * _NARROW - STAT_CHUNK
            pairs = dstats_ptr + rows.to(tl.int64) * dstats_stride_m + first // STAT_CHUNK * 2
            mask = (rows < M) & (first < OUT)
            tl.store(pairs, with_colsum, mask=mask)
            tl.store(pairs + 1, with_u, mask=mask)
            with_colsum = tl.zeros((BLOCK_M,), COMPUTE)
            with_u = tl.zeros((BLOCK_M,), COMPUTE)


# Where each row has its own residual there is one token an image, and no division.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["tokens", "first"])
def norm_linear_dx_kernel(
    du_ptr,  # (M, OUT)
    weight_ptr,  # (OUT, D)
    dstats_ptr,  # (M, parts, 2)
    x_ptr,  # (M, D)
    moments_ptr,  # (M, 2)
    residual_ptr,  # (M / tokens * first, D) or unused
    extra_ptr,  # (M / tokens * first, D) or unused
    dx_ptr,  # (M, D)
    dx_low_ptr,  # (M, D) or unused
    M,
    OUT,
    D,
    parts,
    tokens,
    first,
    x_stride_m,
    residual_stride_m,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BY: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    first_row, first_column = tile_position(M, D, BLOCK_M, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    wide = product_tile(
        du_ptr, weight_ptr, rows, columns, first_row, first_column, M, D, OUT, OUT, False,
        BY, EVEN_K, PRECISION, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    sums = tl.zeros((BLOCK_M, 2), COMPUTE)
    for start in range(0, 2 * parts, 32):
        number = start + tl.arange(0, 32)
        mask = (rows < M)[:, None] & (number < 2 * parts)[None, :]
        pairs = tl.load(dstats_ptr + rows.to(tl.int64)[:, None] * (2 * parts) + number[None, :], mask=mask, other=0.0)
        sums += tl.sum(tl.reshape(pairs, (BLOCK_M, 16, 2)), axis=1)
    with_colsum, with_u = tl.split(sums)

    mean = tl.load(moments_ptr + rows * 2, mask=rows < M, other=0.0)
    rstd = tl.load(moments_ptr + rows * 2 + 1, mask=rows < M, other=0.0)
    wide_rows = rows.to(tl.int64)[:, None]
    token = (rows % tokens)[:, None]
    compact = (rows // tokens).to(tl.int64)[:, None] * first + token
    parts_of_dx = column_chunks(wide, BLOCK_M, BLOCK_N, _NARROW)
    for i in tl.static_range(BLOCK_N // _NARROW):
        columns = first_column + i * _NARROW + tl.arange(0, _NARROW)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        chosen = inside & (token < first)
        d_normalised = parts_of_dx[i]
        if HAS_EXTRA:
            d_normalised += tl.load(extra_ptr + compact * D + columns[None, :], mask=chosen, other=0.0)
        x = tl.load(x_ptr + wide_rows * x_stride_m + columns[None, :], mask=inside, other=0.0).to(COMPUTE)
        normalised = (x - mean[:, None]) * rstd[:, None]
        dx = rstd[:, None] * (d_normalised - (with_colsum / D)[:, None] - normalised * (with_u / D)[:, None])
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + compact * residual_stride_m + columns[None, :], mask=chosen, other=0.0)
        at = wide_rows * D + columns[None, :]
        tl.store(dx_ptr + at, dx, mask=inside)
        if HAS_LOW:
            tl.store(dx_low_ptr + at, dx.to(dx_low_ptr.dtype.element_ty), mask=inside)


def norm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.linear.reference.norm_linear`."""
    u = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    return u, _launch_norm_linear(x, stats, weight, colsum, bias, eps, u, None, precision)


def norm_linear_gelu(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    precision: str = "ieee",
    kind: str = "erf",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.linear.reference.norm_linear_gelu`."""
    u = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    activation = torch.empty_like(u)
    return u, activation, _launch_norm_linear(x, stats, weight, colsum, bias, eps, u, activation, precision, kind)


def _launch_norm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    u: Tensor,
    activation: Tensor | None,
    precision: str,
    kind: str = "erf",
) -> Tensor:
    """Fills `u` and `activation`; returns the moments."""
    x = _rows(x)
    M, D = x.shape
    # Those of an image's first token lie as many rows apart as it has tokens, which is nothing to compile for.
    stats_stride_m = 2 * chunks(D)
    if not stats[0:1].is_contiguous() or stats.stride(0) % stats_stride_m:
        stats = stats.contiguous()
    OUT = weight.shape[0]
    moments = torch.empty(M, 2, dtype=stats.dtype, device=x.device)
    tile = tuning.tile("norm_linear", x.dtype, M, OUT, D, precision, x.device)
    args = {
        "x_ptr": x,
        "stats_ptr": stats,
        "weight_ptr": weight.contiguous(),
        "colsum_ptr": colsum.contiguous(),
        "bias_ptr": bias.contiguous(),
        "u_ptr": u,
        "activation_ptr": activation,
        "moments_ptr": moments,
        "EPS": eps,
        "M": M,
        "OUT": OUT,
        "D": D,
        "stats_every": stats.stride(0) // stats_stride_m,
        "x_stride_m": x.stride(0),
        "stats_stride_m": stats_stride_m,
        "GELU": "" if activation is None else kind,
        "CHUNKS": triton.next_power_of_2(chunks(D)),
    }
    launch_tiles(norm_linear_kernel, args, tile, M, OUT, D, precision, stats.dtype, "x_ptr", True)
    return moments


def linear_residual(
    a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.linear.reference.linear_residual`."""
    M, K = a.shape
    D = weight.shape[0]
    residual = _rows(residual)
    x = torch.empty(M, D, dtype=residual.dtype, device=a.device)
    x_low = _empty_low(x, a.dtype)
    stats = torch.empty(M, chunks(D), 2, dtype=residual.dtype, device=a.device)
    tile = tuning.tile("linear_residual", a.dtype, M, D, K, precision, a.device)
    args = {
        "a_ptr": a.contiguous(),
        "weight_ptr": weight.contiguous(),
        "bias_ptr": bias.contiguous(),
        "residual_ptr": residual,
        "x_ptr": x,
        "x_low_ptr": x_low,
        "stats_ptr": stats,
        "M": M,
        "D": D,
        "K": K,
        "residual_stride_m": residual.stride(0),
        "stats_stride_m": stats.stride(0),
        "HAS_LOW": x.dtype != a.dtype,
    }
    launch_tiles(linear_residual_kernel, args, tile, M, D, K, precision, residual.dtype, "a_ptr", True)
    return x, x_low, stats


def linear_dx(dy: Tensor, weight: Tensor, out_dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    """As `smi_kernels.linear.reference.linear_dx`."""
    M, OUT = dy.shape
    D = weight.shape[1]
    tile = tuning.tile("linear_dx", dy.dtype, M, D, OUT, precision, dy.device)
    if tile.by == "vendor":
        return product(dy, weight, precision, out_dtype)
    dx = torch.empty(M, D, dtype=out_dtype, device=dy.device)
    args = {
        "dy_ptr": dy.contiguous(),
        "weight_ptr": weight.contiguous(),
        "dx_ptr": dx,
        "M": M,
        "OUT": OUT,
        "D": D,
    }
    launch_tiles(linear_dx_kernel, args, tile, M, D, OUT, precision, dy.dtype, "dy_ptr")
    return dx


def linear_gelu_dx(
    dy: Tensor, weight: Tensor, u: Tensor, colsum: Tensor, bias: Tensor, precision: str = "ieee", kind: str = "erf"
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.linear.reference.linear_gelu_dx`."""
    M, D = dy.shape
    OUT = weight.shape[1]
    du = torch.empty(M, OUT, dtype=u.dtype, device=u.device)
    dstats = torch.empty(M, chunks(OUT), 2, dtype=colsum.dtype, device=u.device)
    tile = tuning.tile("linear_gelu_dx", dy.dtype, M, OUT, D, precision, dy.device)
    args = {
        "dy_ptr": dy.contiguous(),
        "weight_ptr": weight.contiguous(),
        "u_ptr": u.contiguous(),
        "colsum_ptr": colsum.contiguous(),
        "bias_ptr": bias.contiguous(),
        "du_ptr": du,
        "dstats_ptr": dstats,
        "M": M,
        "OUT": OUT,
        "D": D,
        "dstats_stride_m": dstats.stride(0),
        "GELU": kind,
    }
    launch_tiles(linear_gelu_dx_kernel, args, tile, M, OUT, D, precision, colsum.dtype, "dy_ptr", frugal=kind == "erf")
    return du, dstats


def norm_linear_dx(
    du: Tensor,
    weight: Tensor,
    dstats: Tensor,
    x: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    extra: Tensor | None,
    tokens: int,
    first: int,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.linear.reference.norm_linear_dx`."""
    M, OUT = du.shape
    D = weight.shape[1]
    x, residual = _rows(x), None if residual is None else _rows(residual)
    dx = torch.empty(M, D, dtype=moments.dtype, device=du.device)
    dx_low = _empty_low(dx, weight.dtype)
    tile = tuning.tile("norm_linear_dx", du.dtype, M, D, OUT, precision, du.device)
    args = {
        "du_ptr": du.contiguous(),
        "weight_ptr": weight.contiguous(),
        "dstats_ptr": dstats.contiguous(),
        "x_ptr": x,
        "moments_ptr": moments.contiguous(),
        "residual_ptr": residual,
        "extra_ptr": None if extra is None else extra.contiguous(),
        "dx_ptr": dx,
        "dx_low_ptr": dx_low,
        "M": M,
        "OUT": OUT,
        "D": D,
        "parts": dstats.shape[1],
        "tokens": tokens,
        "first": first,
        "x_stride_m": x.stride(0),
        "residual_stride_m": 0 if residual is None else residual.stride(0),
        "HAS_RESIDUAL": residual is not None,
        "HAS_EXTRA": extra is not None,
        "HAS_LOW": dx.dtype != weight.dtype,
    }
    launch_tiles(norm_linear_dx_kernel, args, tile, M, D, OUT, precision, moments.dtype, "du_ptr", frugal=extra is None)
    return dx, dx_low


def _empty_low(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0 if x.dtype == dtype else x.shape, dtype=dtype, device=x.device)


def _rows(x: Tensor) -> Tensor:
    """`x` with unit stride along its rows, which may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()
