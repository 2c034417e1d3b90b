"""Capture and replay of work on the GPU: what the host launched once, the device repeats without it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Graph:
    """What `body` launches, captured once as one CUDA graph.

    `body` runs on fixed tensors: what it reads and writes in place keeps its address, what it allocates lives in the
    graph's own pool. It must have run before, so that every kernel is compiled, and must not wait for the device.
    """

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            # A stream of this device: the default one belongs to whichever device captured first. Other threads, such
            # as those that pin memory for a data loader, may go on calling CUDA.
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                body()

    def replay(self) -> None:
        self._graph.replay()
