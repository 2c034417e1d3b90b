"""Linear layers with their surroundings on compiled operators; signatures and meanings as in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.dtypes import chunks
from smi_kernels.linear import reference
from smi_kernels.linear.reference import GELUS
from smi_kernels.native import Rows


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
    if not native.takes(x.dtype, stats.dtype, weight.dtype, colsum.dtype, bias.dtype, out_dtype):
        return reference.norm_linear(x, stats, weight, colsum, bias, eps, out_dtype, precision)
    u, moments = _norm_linear(x, stats, weight, colsum, bias, eps, None)
    return u, moments


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
    if not native.takes(x.dtype, stats.dtype, weight.dtype, colsum.dtype, bias.dtype):
        return reference.norm_linear_gelu(x, stats, weight, colsum, bias, eps, precision, kind)
    activation = x.new_empty(x.shape[0], weight.shape[0])
    u, moments = _norm_linear(x, stats, weight, colsum, bias, eps, activation, kind)
    return u, activation, moments


def linear_residual(
    a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.linear.reference.linear_residual`."""
    if not native.takes(a.dtype, weight.dtype, bias.dtype, residual.dtype):
        return reference.linear_residual(a, weight, bias, residual, precision)
    (M, K), D = a.shape, weight.shape[0]
    native.expect(weight=(weight, (D, K)), bias=(bias, (D,)), residual=(residual, (M, D)))
    x, stats = a.new_empty(M, D), a.new_empty(M, chunks(D), 2)
    rows, around = Rows(a), Rows(residual)
    native.call(
        "linear_residual", a.dtype, rows, rows.row, weight.contiguous(), bias.contiguous(), around, around.row, x,
        stats, M, D, K,
    )  # fmt: skip
    return x, a.new_empty(0), stats


def linear_dx(dy: Tensor, weight: Tensor, out_dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    """As `smi_kernels.linear.reference.linear_dx`."""
    if not native.takes(dy.dtype, weight.dtype, out_dtype):
        return reference.linear_dx(dy, weight, out_dtype, precision)
    (M, OUT), D = dy.shape, weight.shape[1]
    native.expect(weight=(weight, (OUT, D)))
    dx, rows = dy.new_empty(M, D), Rows(dy)
    native.call("linear_dx", dy.dtype, rows, rows.row, weight.contiguous(), dx, M, D, OUT)
    return dx


def linear_gelu_dx(
    dy: Tensor, weight: Tensor, u: Tensor, colsum: Tensor, bias: Tensor, precision: str = "ieee", kind: str = "erf"
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.linear.reference.linear_gelu_dx`."""
    if not native.takes(dy.dtype, weight.dtype, u.dtype, colsum.dtype, bias.dtype):
        return reference.linear_gelu_dx(dy, weight, u, colsum, bias, precision, kind)
    (M, D), OUT = dy.shape, weight.shape[1]
    native.expect(weight=(weight, (D, OUT)), u=(u, (M, OUT)), colsum=(colsum, (OUT,)), bias=(bias, (OUT,)))
    du, dstats, rows = dy.new_empty(M, OUT), dy.new_empty(M, chunks(OUT), 2), Rows(dy)
    native.call(
        "linear_gelu_dx", dy.dtype, rows, rows.row, weight.contiguous(), u.contiguous(), colsum.contiguous(),
        bias.contiguous(), GELUS.index(kind), du, dstats, M, OUT, D,
    )  # fmt: skip
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
    more = [t.dtype for t in (residual, extra) if t is not None]
    if not native.takes(du.dtype, weight.dtype, dstats.dtype, x.dtype, moments.dtype, *more):
        return reference.norm_linear_dx(du, weight, dstats, x, moments, residual, extra, tokens, first, precision)
    (M, OUT), D, parts = du.shape, weight.shape[1], dstats.shape[1]
    if not 1 <= first <= tokens or M % tokens:
        raise ValueError(
            f"tokens is {tokens} and first {first} for {M} rows; expected 1 <= first <= tokens, a divisor."
        )
    native.expect(
        weight=(weight, (OUT, D)),
        dstats=(dstats, (M, parts, 2)),
        x=(x, (M, D)),
        moments=(moments, (M, 2)),
        residual=(residual, (M // tokens * first, D)),
        extra=(extra, (M // tokens * first, D)),
    )
    dx, rows, normed = du.new_empty(M, D), Rows(du), Rows(x)
    native.call(
        "norm_linear_dx", du.dtype, rows, rows.row, weight.contiguous(), dstats.contiguous(), parts, normed,
        normed.row, moments.contiguous(), native.dense(residual),
        native.dense(extra), dx, M, D, OUT, tokens, first,
    )  # fmt: skip
    return dx, du.new_empty(0)


def _norm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    activation: Tensor | None,
    kind: str = "erf",
) -> tuple[Tensor, Tensor]:
    (M, D), OUT = x.shape, weight.shape[0]
    native.expect(
        stats=(stats, (M, chunks(D), 2)), weight=(weight, (OUT, D)), colsum=(colsum, (OUT,)), bias=(bias, (OUT,))
    )
    u, moments, rows = x.new_empty(M, OUT), x.new_empty(M, 2), Rows(x)
    pairs = Rows(stats if stats[:1].is_contiguous() else stats.contiguous())
    native.call(
        "norm_linear", x.dtype, rows, rows.row, pairs, pairs.row, weight.contiguous(), colsum.contiguous(),
        bias.contiguous(), float(eps), u, activation, GELUS.index(kind), moments, M, OUT, D,
    )  # fmt: skip
    return u, moments
