"""Capture with stand-ins for what only a GPU has: what a capture that fails leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smi_kernels.graphs import Graph


class Allocator:
    """The pools that PyTorch's allocator draws from while something is captured, and those in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: list[Any] = []
        self.used: list[Any] = []
        self.spoilt = False
        numbers = iter(range(1, 99))
        for name, value in {
            "CUDAGraph": lambda: None,
            "Stream": lambda device: None,
            "current_device": lambda: 0,
            "current_stream": lambda device: None,
            "device": contextlib.nullcontext,
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, next(numbers)),
            "stream": contextlib.nullcontext,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.used.remove(pool), raising=False)

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.capturing.append(pool)
        self.used.append(pool)
        try:
            yield
        finally:
            if self.spoilt:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end(0, pool)

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_capture_that_fails_leaves_the_allocator_as_it_was(spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)

    def failing() -> None:
        allocator.spoilt = spoilt
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Graph(failing, torch.device("cuda"))
    assert allocator.capturing == []
    assert len(allocator.used) == (0 if spoilt else 1)  # a capture that ended is given back with its graph
    allocator.spoilt = False
    graph = Graph(lambda: None, torch.device("cuda"))
    assert allocator.capturing == [] and graph is not None
