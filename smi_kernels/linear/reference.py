"""Reference of the linear layers with fused surroundings, forward and input gradient; weights are frozen.

A LayerNorm's weight and bias are folded into the linear layer behind it, so that a normalised row x_hat = (x - mean)
rstd gives ``u = x_hat W^T + b = rstd (x W^T - mean colsum) + b`` with ``colsum = W.sum(1)``. Its input gradient needs
two numbers a row, and both are sums over du where du is made: sum(dx_hat) = du . colsum and sum(dx_hat x_hat) = du . (u
- b). Rows of `stats` hold the moments of x in chunks, rows of `dstats` parts of these sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import dtypes
from smi_kernels.dtypes import STAT_CHUNK, low

GELUS = ("erf", "tanh", "sigmoid")


def row_statistics(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each chunk of 64 columns; the last chunk may be shorter.

    Args:
        x: (M, D).

    Returns:
        (M, ceil(D / 64), 2), dtype of `x`.
    """
    M, D = x.shape
    whole = D // STAT_CHUNK
    chunks = [x[:, : whole * STAT_CHUNK].reshape(M, whole, STAT_CHUNK)]
    if D % STAT_CHUNK:
        chunks.append(x[:, None, whole * STAT_CHUNK :])
    means = [chunk.mean(2) for chunk in chunks]
    squares = [(chunk - mean[..., None]).square().sum(2) for chunk, mean in zip(chunks, means, strict=True)]
    return torch.stack((torch.cat(means, dim=1), torch.cat(squares, dim=1)), dim=2)


def row_moments(stats: Tensor, width: int, eps: float) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of each row of `width` columns out of its `row_statistics`.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Returns:
        (M, 2).
    """
    count = stats.new_full((stats.shape[1],), STAT_CHUNK)
    count[-1] = width - STAT_CHUNK * (stats.shape[1] - 1)
    means, squares = stats.unbind(2)
    mean = (means * count).sum(1, keepdim=True) / width
    variance = (squares.sum(1, keepdim=True) + ((means - mean).square() * count).sum(1, keepdim=True)) / width
    return torch.cat((mean, (variance + eps).rsqrt()), dim=1)


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
    """Linear layer of normalised rows.

    Args:
        x: (M, D) in the dtype of `weight`; rows may be strided.
        stats: (M, ceil(D / 64), 2) float32, `row_statistics` of the rows before they were rounded to the dtype of `x`.
        weight: (OUT, D).
        colsum, bias: (OUT,) float32; `colsum` is ``weight.sum(1)``.
        eps: of the normalisation.
        out_dtype: of the result.
        precision: of the kernels' products of float32 numbers, ``ieee`` or ``tf32``.

    Returns:
        u: (M, OUT) in `out_dtype`.
        moments: (M, 2) float32, mean and 1 / sqrt(variance + eps) of each row.
    """
    moments = row_moments(stats, x.shape[1], eps)
    mean, rstd = moments.split(1, dim=1)
    product = _product(x, weight.T, stats.dtype)
    return (rstd * (product - mean * colsum) + bias).to(out_dtype), moments


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
    """`norm_linear` and its GELU (Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016, section 2).

    Args:
        kind: ``erf`` is u Phi(u); its approximations are ``tanh``, 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))),
            and ``sigmoid``, u sigmoid(1.702 u), known as quick GELU.

    Returns:
        pre-activation and activation, both (M, OUT) in the dtype of `x`, and the moments of `norm_linear`.
    """
    u, moments = norm_linear(x, stats, weight, colsum, bias, eps, stats.dtype, precision)
    return u.to(x.dtype), gelu(u, kind).to(x.dtype), moments


def gelu(u: Tensor, kind: str) -> Tensor:
    """The activation of `norm_linear_gelu`."""
    if kind == "sigmoid":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="none" if kind == "erf" else kind)


def gelu_slope(u: Tensor, kind: str) -> Tensor:
    """Its derivative."""
    if kind == "erf":
        return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    # 0.5 (1 + tanh(x)) = sigmoid(2 x), so both are u sigmoid(a u (1 + b u^2)).
    a, b = (2 * math.sqrt(2 / math.pi), 0.044715) if kind == "tanh" else (1.702, 0.0)
    below = torch.sigmoid(a * u * (1 + b * u**2))
    return below + u * below * (1 - below) * a * (1 + 3 * b * u**2)


def linear_residual(
    a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """``residual + a W^T + b`` with what the next normalisation needs of it.

    Args:
        a: (M, K) in the dtype of `weight`.
        weight: (D, K).
        bias: (D,) float32.
        residual: (M, D) float32; rows may be strided.

    Returns:
        x: (M, D) float32.
        x_low: the same in the dtype of `a`; empty if that is the dtype of `x`.
        stats: (M, ceil(D / 64), 2) float32, `row_statistics` of `x`.
    """
    # The product comes first because sums have the strides of what comes first.
    x = _product(a, weight.T, residual.dtype) + residual + bias
    return x, low(x, a.dtype), row_statistics(x)


def linear_dx(dy: Tensor, weight: Tensor, out_dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    """Input gradient of a linear layer.

    Args:
        dy: (M, OUT) in the dtype of `weight`.
        weight: (OUT, D).

    Returns:
        (M, D) in `out_dtype`.
    """
    return _product(dy, weight, dtypes.wide(dy.dtype)).to(out_dtype)


def linear_gelu_dx(
    dy: Tensor, weight: Tensor, u: Tensor, colsum: Tensor, bias: Tensor, precision: str = "ieee", kind: str = "erf"
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the pre-activation `u` of ``gelu(u) W^T``, and its row sums for the norm before `u`.

    Args:
        dy: (M, D) in the dtype of `weight`.
        weight: (D, OUT).
        u: (M, OUT) in the dtype of `weight`.
        colsum, bias: (OUT,) float32, of the `norm_linear_gelu` that made `u`.
        kind: of that too.

    Returns:
        du: (M, OUT), dtype of `u`.
        dstats: (M, ceil(OUT / 64), 2) float32, for each chunk of columns the sums of ``du colsum`` and ``du (u -
        bias)``.
    """
    slope = gelu_slope(u.to(colsum.dtype), kind)
    du = (_product(dy, weight, colsum.dtype) * slope).to(u.dtype)
    return du, gradient_sums(du, u, colsum, bias)


def gradient_sums(du: Tensor, u: Tensor, colsum: Tensor, bias: Tensor) -> Tensor:
    """(M, ceil(OUT / 64), 2) sums of ``du colsum`` and ``du (u - bias)`` over chunks of 64 columns of (M, OUT)
    tensors."""
    du, u = du.to(colsum.dtype), u.to(colsum.dtype)
    # Where no gradient is, u may be infinite: a bias of minus infinity switches a class off.
    parts = torch.stack((du * colsum, torch.where(du == 0, 0, du * (u - bias))), dim=2)
    whole = du.shape[1] // STAT_CHUNK
    sums = [parts[:, : whole * STAT_CHUNK].unflatten(1, (whole, STAT_CHUNK)).sum(2)]
    if du.shape[1] % STAT_CHUNK:
        sums.append(parts[:, whole * STAT_CHUNK :].sum(1, keepdim=True))
    return torch.cat(sums, dim=1)


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
    """Input gradient of `norm_linear`, plus the gradient that came round it.

    Args:
        du: (M, OUT) in the dtype of `weight`.
        weight: (OUT, D).
        dstats: (M, parts, 2) float32, whose sum over the parts is sum(du colsum), sum(du (u - bias)).
        x, moments: of the forward.
        residual: (M / tokens * first, D) float32, added to the first `first` of each `tokens` rows; None adds nothing.
        extra: like `residual`, but a gradient with respect to the *normalised* rows, which `dstats` already counts.
        tokens, first: rows of an image, and how many of them `residual` and `extra` hold.

    Returns:
        dx: (M, D) float32.
        dx_low: the same in the dtype of `weight`; empty if that is the dtype of `dx`.
    """
    M, D = x.shape
    mean, rstd = moments.split(1, dim=1)
    normalised = (x.to(moments.dtype) - mean) * rstd
    sums = dstats.sum(1) / D
    wide = _product(du, weight, moments.dtype)
    if extra is not None:
        wide.view(M // tokens, tokens, D)[:, :first] += extra.view(-1, first, D)
    dx = rstd * (wide - sums[:, :1] - normalised * sums[:, 1:])
    if residual is not None:
        dx.view(M // tokens, tokens, D)[:, :first] += residual.view(-1, first, D)
    return dx, low(dx, weight.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of rounded numbers, not a rounded product: kernels accumulate in `dtype` too."""
    return a.to(dtype) @ b.to(dtype)
