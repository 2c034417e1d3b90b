"""Which tile a matrix kernel works with, and where the vendor's library makes the product instead: tables, read once.

A table has, for each operation and arithmetic, tiles from large to small. A shape that was measured has its own entry;
any other takes the largest tile that still gives every multiprocessor work, else the smallest. `default.json` is for
every GPU, with lists of their own for some compute capabilities, and says by its ``measured`` field whether any of it
was timed; ``sm_90.json`` and the like, where they are shipped, have the shapes measured on GPUs of that compute
capability, and the file that `SMI_TUNING` names, if it is set, those of the user. ``python -m benchmarks.tune`` makes
such files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

INVARIANT = "+invariant"
USER_TABLE = "SMI_TUNING"
_MULTIPROCESSORS = 132  # of the GPU that recorded launches are meant for


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, warps of a program, and stages its loads are pipelined over.

    `by` says how the operands come: through ``pointers``, every thread loading some of their elements; by ``tma``, the
    unit that fetches whole tiles (compute capability 9.0 and later; 16-byte rows and addresses, else through pointers);
    or not at all, where the ``vendor``'s library (cuBLAS) makes the product, in float32, and the kernel does the rest.
    `programs` share the registers of a multiprocessor, so that one multiplies while another has its epilogue.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    by: str = "pointers"
    programs: int = 1

    @property
    def registers(self) -> int:
        """Most of them that a thread can have."""
        return registers(self.warps * self.programs)


def registers(warps: int) -> int:
    """Most of them that a thread can have where `warps` share the 65,536 of a multiprocessor, in eights."""
    return min(255, 2048 // warps // 8 * 8)


VENDOR = Tile(64, 64, 64, 4, 1, "vendor")
_GATHERS = ("embed_tokens", "embed_tokens_dx")  # rows while it multiplies: nothing for cuBLAS, nor tiles to fetch
_assumed: ContextVar[int | None] = ContextVar("assumed", default=None)
_forced: ContextVar[tuple[Tile, list[str]] | None] = ContextVar("forced", default=None)


def tile(operation: str, dtype: torch.dtype, M: int, N: int, K: int, precision: str, device: torch.device) -> Tile:
    """The tile for an (M, N) product with sums over K, of operands in `dtype`.

    Where `precision` ends in `INVARIANT`, it depends on operation and arithmetic alone, so that an image's bits do not
    depend on the batch it is in.
    """
    arithmetic = "16-bit" if dtype.itemsize == 2 else dot_precision(precision)
    shape = f"{operation} {arithmetic} {M}x{N}x{K}"
    forced = _forced.get()
    if forced is not None and (forced[0].by == "pointers" or operation not in _GATHERS):
        forced[1].append(shape)
        return forced[0]
    sm = capability(device)
    candidates = _tiles(sm, arithmetic, operation)
    if precision.endswith(INVARIANT):
        return candidates[-1]
    measured = shapes(sm).get(shape)
    if measured is not None:
        return measured
    programs = _multiprocessors(device)
    return next((t for t in candidates if -(-M // t.m) * -(-N // t.n) >= programs), candidates[-1])


@contextlib.contextmanager
def assuming(capability: int) -> Iterator[None]:
    """Within this context tiles for devices that are not there are those of this compute capability (times 10)."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def forcing(tile: Tile) -> Iterator[list[str]]:
    """Within this context every matrix kernel that can takes `tile`; yields the shapes that do, as tables name them."""
    asked: list[str] = []
    token = _forced.set((tile, asked))
    try:
        yield asked
    finally:
        _forced.reset(token)


def dot_precision(precision: str) -> str:
    """``ieee`` or ``tf32``, as `tl.dot` wants it."""
    return precision.removesuffix(INVARIANT)


def candidates(capability: int | None) -> dict[tuple[str, str], list[Tile]]:
    """All tiles that are shipped for this compute capability (times 10), by (arithmetic, operation)."""
    found = {
        (arithmetic, operation): list(_tiles(capability, arithmetic, operation))
        for arithmetic in ("16-bit", "tf32", "ieee")
        for operation in _table()[arithmetic]
    }
    if capability in _shipped():
        for name, entry in _read(capability)["shapes"].items():
            operation, arithmetic, _ = name.split()
            found[arithmetic, operation].append(Tile(*entry))
    return {key: list(dict.fromkeys(tiles)) for key, tiles in found.items()}


@functools.cache
def _tiles(capability: int | None, arithmetic: str, operation: str) -> tuple[Tile, ...]:
    """From large to small."""
    table = _table()
    own = table.get(f"sm_{capability}", {}).get(arithmetic, {})
    return tuple(Tile(*entry) for entry in own.get(operation, table[arithmetic][operation]))


@functools.cache
def shapes(capability: int | None) -> Mapping[str, Tile]:
    """Shapes that were measured on GPUs of this compute capability (times 10), and the user's, which come first.

    Raises:
        ValueError: the user's table cannot be read, or is none.
    """
    found = {} if capability not in _shipped() else _read(capability)["shapes"]
    if file := os.environ.get(USER_TABLE):
        found = found | _user_shapes(Path(file))
    return {name: Tile(*entry) for name, entry in found.items()}


def _user_shapes(file: Path) -> dict[str, list[Any]]:
    mend = f"set {USER_TABLE} to a file that `python -m benchmarks.tune` made, or to nothing."
    try:
        found = json.loads(file.read_text())["shapes"]
        for name, entry in found.items():
            operation, arithmetic, shape = name.split()
            known = operation in _table()[arithmetic] and [int(n) > 0 for n in shape.split("x")] == [True] * 3
            tile = Tile(*entry)
            sizes = all(type(n) is int and n > 0 for n in (*tile[:5], tile.programs))
            sizes = sizes and tile.n % 64 == 0  # chunks of row statistics are whole
            sensible = tile.by == "pointers" or (tile.by in ("tma", "vendor") and operation not in _GATHERS)
            if not (known and sizes and sensible):
                raise ValueError(f"entry {name!r}: {entry}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{USER_TABLE} names {str(file)!r}, which is no table of tiles ({error!r}); {mend}") from error
    return dict(found)


def source() -> str:
    """Where tiles come from, for people."""
    measured = [f"sm_{capability} measured on {_read(capability)['measured']}" for capability in _shipped()]
    user = [f"shapes of {os.environ[USER_TABLE]}"] if os.environ.get(USER_TABLE) else []
    return ", ".join([*user, *measured, "rules of thumb that were not measured"])


@functools.cache
def _shipped() -> tuple[int, ...]:
    names = (file.name for file in resources.files(__package__).iterdir())
    return tuple(sorted(int(n.removeprefix("sm_").removesuffix(".json")) for n in names if n.startswith("sm_")))


@functools.cache
def _read(capability: int | None) -> dict[str, Any]:
    return dict(json.loads((resources.files(__package__) / f"sm_{capability}.json").read_text()))


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads((resources.files(__package__) / "default.json").read_text()))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability(device: torch.device) -> int | None:
    """Compute capability of a GPU of NVIDIA's, times 10; of any other device what is assumed, if anything is."""
    if device.type != "cuda" or torch.version.hip is not None:  # whose numbers are of other GPUs, and overlap
        return _assumed.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * int(major) + int(minor)
