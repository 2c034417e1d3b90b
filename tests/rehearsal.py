"""A stand-in for CUDA graphs, so that what is done with them is tested where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class Rehearsal:
    """Stands in for a CUDA graph: its making runs the body and then undoes what that did to tensors, a replay runs it.

    What a body did to the host's state is not undone, as with a graph.
    """

    made: ClassVar[list[str]] = []
    capturing = False
    tensors: Callable[[], list[Tensor]]

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        before = [tensor.clone() for tensor in type(self).tensors()]
        Rehearsal.capturing = True
        try:
            body()
        finally:
            Rehearsal.capturing = False
            for tensor, old in zip(type(self).tensors(), before, strict=True):
                tensor.copy_(old)
        self.replay = body
        type(self).made.append(body.__name__)
