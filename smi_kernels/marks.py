"""Names for parts of the work, in traces of `torch.profiler` and, on a GPU, as NVTX ranges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_on = False


@contextlib.contextmanager
def spans() -> Iterator[None]:
    """Within this context, in every thread, `span` marks what it names."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """A named part of the work; costs nothing unless within `spans`."""
    return _marked(name) if _on else contextlib.nullcontext()


@contextlib.contextmanager
def _marked(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_initialized():
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield
