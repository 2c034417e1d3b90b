"""Without a GPU Triton's kernels are interpreted, and that is decided before anything imports Triton.

Tests of a module that holds a `kernels.Kernels` run once for each implementation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import BACKENDS, Kernels


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if any(isinstance(value, Kernels) for value in vars(metafunc.module).values()):
        only_triton = "cpu" not in BACKENDS or metafunc.definition.get_closest_marker("triton") is not None
        metafunc.parametrize("implementation", ["kernels"] if only_triton else ["kernels", "cpu"], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    Kernels.module = getattr(request, "param", "kernels")
    yield
    Kernels.module = "kernels"
