"""Which tile a matrix kernel works with: shipped tables, one for each family of GPUs, read once.

A table has, for each operation and arithmetic, tiles from large to small. A shape that was measured has its own entry;
any other takes the largest tile that still gives every multiprocessor work, else the smallest. `default.json` says by
its ``measured`` field whether any of it was timed.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch

INVARIANT = "+invariant"
_MULTIPROCESSORS = 132  # of the GPU that recorded launches are meant for


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, warps of a program, and stages its loads are pipelined over."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile(operation: str, dtype: torch.dtype, M: int, N: int, K: int, precision: str, device: torch.device) -> Tile:
    """The tile for an (M, N) product with sums over K, of operands in `dtype`.

    Where `precision` ends in `INVARIANT`, it depends on operation and arithmetic alone, so that an image's bits do not
    depend on the batch it is in.
    """
    arithmetic = "16-bit" if dtype.itemsize == 2 else dot_precision(precision)
    table = _table()
    measured = table["shapes"].get(f"{operation} {arithmetic} {M}x{N}x{K}")
    candidates = [Tile(*entry) for entry in table[arithmetic][operation]]
    if precision.endswith(INVARIANT):
        return candidates[-1]
    if measured is not None:
        return Tile(*measured)
    programs = _multiprocessors(device)
    return next((t for t in candidates if -(-M // t.m) * -(-N // t.n) >= programs), candidates[-1])


def dot_precision(precision: str) -> str:
    """``ieee`` or ``tf32``, as `tl.dot` wants it."""
    return precision.removesuffix(INVARIANT)


def candidates() -> dict[tuple[str, str], list[Tile]]:
    """All shipped tiles by (arithmetic, operation)."""
    table = _table()
    found = {
        (arithmetic, operation): [Tile(*entry) for entry in entries]
        for arithmetic in ("16-bit", "tf32", "ieee")
        for operation, entries in table[arithmetic].items()
    }
    for name, entry in table["shapes"].items():
        operation, arithmetic, _ = name.split()
        found[arithmetic, operation].append(Tile(*entry))
    return found


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads((resources.files(__package__) / "default.json").read_text()))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
