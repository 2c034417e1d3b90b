"""Without a GPU Triton's kernels are interpreted, and that is decided before anything imports Triton.

Tests of a module that holds a `kernels.Kernels` run once for each implementation.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import numpy
import pytest
import torch
from packaging.version import Version

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import BACKENDS, DEVICE, Kernels, emulated

# Autograd starts its threads at the first backward, for all devices known by then, and opcheck makes some known that
# are none. A process with such threads has no autograd in what it forks, and some tests fork.
torch.ones((), requires_grad=True).backward()


def pytest_configure() -> None:
    with contextlib.suppress(ImportError):
        import triton

        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if (
            interpreted
            and Version(triton.__version__) < Version("3.7")
            and Version(numpy.__version__) >= Version("2.4")
        ):
            raise pytest.UsageError(
                f"Triton {triton.__version__} interprets kernels with NumPy below 2.4 alone, and this is "
                f"{numpy.__version__}: pip install 'numpy<2.4', or a newer Triton."
            )


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


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that take long on a busy machine say no more than on an idle one."""
    monkeypatch.setattr("smi.cli_progress.LINE_EVERY", math.inf)


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
