"""Matrix products by the vendor's library, for the shapes that a tuning table names."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smi_kernels.tuning import dot_precision

_SETTINGS = {
    torch.float32: "fp32_precision",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_lock = threading.RLock()


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
        with _sums_in_float32(a.dtype, precision) if a.is_cuda and a.itemsize <= 4 else contextlib.nullcontext():
            return torch.mm(a, b).to(dtype)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide).to(dtype)
    return torch.mm(a.to(wide), b.to(wide)).to(dtype)


@contextlib.contextmanager
def _sums_in_float32(dtype: torch.dtype, precision: str) -> Iterator[None]:
    """Products of float32 numbers in `precision`; parts of a sum of 16-bit products are not rounded to be added.

    PyTorch has no settings of a thread: where the process has others, products of other threads have these meanwhile,
    and ``allow_tf32`` cannot be read there.
    """
    matmul, name = torch.backends.cuda.matmul, _SETTINGS[dtype]
    with _lock:  # or of two threads one would take for the caller's what the other has set
        before: Any = getattr(matmul, name)
        wanted: Any = dot_precision(precision)
        if dtype == torch.float32:
            right = (before == "tf32") == (wanted == "tf32")
        else:
            split = getattr(matmul, f"{name}_split_k", True)
            right, wanted, before = not before, (False, split), (before, split)
        if right:
            yield
            return
        setattr(matmul, name, wanted)
        try:
            yield
        finally:
            setattr(matmul, name, before)
