"""A network in evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module is in evaluation mode for the while, and then each of its parts in its own again."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [part.training for part in parts]
    if any(before):
        model.eval()
    try:
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training  # not train(), which would take all parts along
