"""What the tests of kernels share: where they run, poisoned memory, and error budgets in place of tolerances."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smi_kernels import native

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On which the same results are to be had here: a GPU has its Triton kernels, a CPU has them interpreted.
BACKENDS = ["reference", "triton", *(["cpu"] if DEVICE == "cpu" and not native.reasons_against() else [])]


class Kernels:
    """The implementation of a folder of operations that the running test is about: Triton kernels, or compiled.

    A test module that holds one is run for both; a test marked ``triton`` for Triton kernels alone, one marked
    ``native_cuda`` for the CUDA operators too, which the host emulates where there is no GPU.
    """

    module = "kernels"

    def __init__(self, folder: str, triton: str = "kernels") -> None:
        self._modules = {"kernels": f"smi_kernels.{folder}.{triton}", "cpu": f"smi_kernels.{folder}.cpu"}
        native = f"smi_kernels.{folder}.cuda"
        self._modules["cuda"] = native if importlib.util.find_spec(native) else self._modules["kernels"]

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._modules[Kernels.module]), name)


def launched(names: list[str]) -> list[str]:
    """The launches to expect: Triton kernels of these names, or none of compiled operators."""
    return names if Kernels.module == "kernels" else []


def builder() -> ModuleType:
    """``csrc/build.py``."""
    name = "tests_native_build"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / "build.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@functools.cache
def emulated(races: str | None = None) -> Path | str:
    """The CUDA operators for the host, as `build_emulated` makes them, or why they cannot be had."""
    build = builder()
    cxx = build._cxx()
    if cxx is None:
        return "no C++ compiler"
    probe = "#include <barrier>\n#include <atomic>\nint main() { int i = 0; return std::atomic_ref<int>(i); }"
    flags = ["-std=c++20", "-pthread", *([f"-fsanitize={races}"] if races else []), "-x", "c++", "-", "-o", "/dev/null"]
    found = subprocess.run([cxx, *flags], input=probe, capture_output=True, text=True)
    if found.returncode:
        return f"{cxx} cannot build the emulator: {found.stderr.strip().splitlines()[-1]}"
    return build.build_emulated(ROOT / "build" / "emulated", cxx, races)


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
