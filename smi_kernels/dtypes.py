"""The two dtypes of every operation, the low one of matrix operands and the wide one of sums, and chunks of columns."""

from __future__ import annotations

import torch
from torch import Tensor

STAT_CHUNK = 64  # columns that a pair of row statistics, or of their gradients, is of


def chunks(width: int) -> int:
    """Pairs of statistics of a row."""
    return -(-width // STAT_CHUNK)


def wide(low: torch.dtype) -> torch.dtype:
    """What numbers in `low` are summed in: float64 for float64, else float32."""
    return torch.promote_types(low, torch.float32)


def low(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`; empty if it has that dtype already, since an operation may not return a tensor twice."""
    return x.new_empty(0, dtype=dtype) if x.dtype == dtype else x.to(dtype)


def empty_low(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for what `low` gives."""
    return x.new_empty((0,) if x.dtype == dtype else x.shape, dtype=dtype)
