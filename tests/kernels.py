"""What the tests of kernels share: where they run, poisoned memory, and error budgets in place of tolerances."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smi_kernels import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On which the same results are to be had here: a GPU has its Triton kernels, a CPU has them interpreted.
BACKENDS = ["reference", "triton", *(["cpu"] if DEVICE == "cpu" and not native.reasons_against() else [])]


class Kernels:
    """The implementation of a folder of operations that the running test is about: Triton kernels, or compiled.

    A test module that holds one is run for both; a test marked ``triton`` for Triton kernels alone.
    """

    module = "kernels"

    def __init__(self, folder: str, triton: str = "kernels") -> None:
        self._modules = {"kernels": f"smi_kernels.{folder}.{triton}", "cpu": f"smi_kernels.{folder}.cpu"}

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._modules[Kernels.module]), name)


def launched(names: list[str]) -> list[str]:
    """The launches to expect: Triton kernels of these names, or none of compiled operators."""
    return names if Kernels.module == "kernels" else []


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this context fresh memory (torch.empty and its relatives) holds NaN, or an integer type's greatest value.

    What a kernel forgets to write, or reads before it is written, then shows.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def error(actual: Tensor, exact: Tensor) -> float:
    """Euclidean norm of the difference over that of `exact` (over 1 if that is zero), in float64; NaN if any is."""
    exact = exact.detach().double().cpu()
    difference = actual.detach().double().cpu() - exact
    return float(difference.norm() / (exact.norm() or 1.0))


@dataclass(frozen=True)
class Budget:
    """True in an ``assert`` if the error is allowed; a failing one prints both numbers."""

    error: float
    allowed: float

    def __bool__(self) -> bool:
        return self.error <= self.allowed


def within_budget(actual: Tensor, reference: Tensor, exact: Tensor, factor: float = 1.5, floor: float = 1e-7) -> Budget:
    """Whether `actual` is about as near to the truth as plain PyTorch is.

    Args:
        actual: of the kernel.
        reference: of the reference, from the same inputs in the same dtype.
        exact: of the reference in float64, from the same (rounded) inputs.
        factor: how many times the reference's `error` is allowed.
        floor: error that is allowed in any case, for where the reference happens to be exact.
    """
    if actual.shape != exact.shape or reference.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(exact.shape)}.")
    return Budget(error(actual, exact), factor * error(reference, exact) + floor)
