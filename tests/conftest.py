"""Without a GPU Triton's kernels are interpreted, and that is decided before anything imports Triton.

Tests of a module that holds a `kernels.Kernels` run once for each implementation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import BACKENDS, DEVICE, Kernels, emulated


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if any(isinstance(value, Kernels) for value in vars(metafunc.module).values()):
        marked = metafunc.definition.get_closest_marker
        native = [*(["cpu"] if "cpu" in BACKENDS else []), *(["cuda"] if marked("native_cuda") else [])]
        metafunc.parametrize("implementation", ["kernels", *([] if marked("triton") else native)], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    Kernels.module = getattr(request, "param", "kernels")
    with cuda_operators() if Kernels.module == "cuda" else contextlib.nullcontext():
        yield
    Kernels.module = "kernels"


def cuda_operators() -> contextlib.AbstractContextManager[None]:
    """Those of the GPU, else their emulation; skips where neither is to be had."""
    from smi_kernels import native_cuda

    if DEVICE != "cpu":
        if native_cuda.reasons_against():
            pytest.skip("; ".join(native_cuda.reasons_against()))
        return contextlib.nullcontext()
    library = emulated()
    if isinstance(library, str):
        pytest.skip(library)
    return native_cuda.emulated(library)
