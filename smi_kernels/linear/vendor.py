"""Matrix products by the vendor's library, for the shapes that a tuning table names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from smi_kernels.tuning import dot_precision


def product(a: Tensor, b: Tensor, precision: str, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b``, accumulated in float32 (float64 of float64).

    The result is not rounded to 16 bits before the epilogue: a LayerNorm that is folded into the weights subtracts two
    large numbers there.

    Args:
        a, b: (M, K) and (K, N) of one dtype.
        precision: of the products of float32 numbers, ``ieee`` or ``tf32``.
        dtype: of the result; None is that of the sums.

    Returns:
        (M, N), contiguous.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    dtype = dtype or wide
    if a.dtype in (wide, dtype):
        with _float32_products(precision) if a.is_cuda and a.dtype == torch.float32 else contextlib.nullcontext():
            return torch.mm(a, b).to(dtype)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide).to(dtype)
    return torch.mm(a.to(wide), b.to(wide)).to(dtype)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = dot_precision(precision)
    try:
        yield
    finally:
        matmul.fp32_precision = before
