"""Capture and replay of work on the GPU: what the host launched once, the device repeats without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Graph:
    """What `body` launches, captured once as one CUDA graph.

    `body` runs on fixed tensors: what it reads and writes in place keeps its address, what it allocates lives in the
    graph's own pool. It must have run before, so that every kernel is compiled, and must not wait for the device.

    Raises:
        Exception: whatever `body` raised; nothing was executed then, and the next capture may succeed.
    """

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        reason: Exception | None = None
        # The outer stream context is for versions of PyTorch whose failed captures leave their own stream current.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            torch.cuda.synchronize()
            # A stream of this device: the default one belongs to whichever device captured first. Other threads, such
            # as those that pin memory for a data loader, may go on calling CUDA.
            stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        body()
                    except Exception as error:
                        reason = error
                        raise
            except Exception:
                _give_back(pool)
                if reason is not None:  # the end of a spoilt capture fails too, and says less
                    raise reason from None
                raise
            finally:
                del reason  # with its traceback it holds this frame, and the frame's tensors

    def replay(self) -> None:
        self._graph.replay()


def _give_back(pool: Any) -> None:
    """The pool of a capture that failed on the current device.

    A spoilt capture ends before PyTorch's allocator hears of it, which then believes for good that one is going on: it
    would return no more memory to the device, nor make room when there is none, and ask the dead graph about each
    allocation.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it has heard, and the graph gives the pool back itself
        return
    torch._C._cuda_releasePool(device, pool)


class NoWaiting(TorchDispatchMode):
    """Within this context an operation for whose result the host would have to wait raises before it starts.

    It would raise in a capture too, but spoil that for good, and say less. Indexing by masks in place, and copies that
    PyTorch makes on its own, are not seen here.

    Raises:
        RuntimeError: such an operation, by its name.
    """

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else torch.compile would leave compiled functions uncompiled in here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            raise RuntimeError(f"{func} needs the host to wait for the device")
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    aten = torch.ops.aten
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type != args[0].device.type
    if func is aten.copy_.default:
        return isinstance(args[1], Tensor) and args[1].device.type != args[0].device.type
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
