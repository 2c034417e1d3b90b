"""The compiled operators of ``csrc/``: finding them, checking what goes in, calling them.

A call hands over addresses, sizes and numbers, so the library knows neither Python nor PyTorch; threads are PyTorch's
own. What a caller can get wrong is checked here or by the caller, before: the library itself trusts its arguments.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent
_DTYPES = (torch.float32, torch.float64)
_functions: dict[tuple[str, torch.dtype], Any] = {}


def folder() -> Path:
    """Where the libraries lie; ``SMI_NATIVE_LIBRARIES`` names another folder, to test other builds of them."""
    return Path(os.environ.get("SMI_NATIVE_LIBRARIES") or _PACKAGE / "_native")


def instruction_set() -> str:
    """The library for this CPU. ``ATEN_CPU_CAPABILITY`` chooses a lesser one, as it does for PyTorch."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return next((name for name in ("avx512", "avx2") if capability.startswith(name)), "default")


@functools.cache
def reasons_against() -> tuple[str, ...]:
    """Every reason why compiled operators cannot run on a CPU here; empty if they can."""
    return against_library(_path(), "a C++ compiler on PATH")


def about() -> str:
    """How the operators for CPUs were built."""
    return f"{instruction_set()}, compiled by {text(_library().smi_compiler)}"


def against_library(path: Path, builder: str) -> tuple[str, ...]:
    """Every reason why the library at `path`, which `builder` makes, cannot be loaded; empty if it can."""
    if not path.is_file():
        return (f"{path.name} was not built; with {builder}, install the package again",)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return (f"{path.name} cannot be loaded: {error}",)
    return _stale(library, path.name)


def load(path: Path, reasons: tuple[str, ...] = ()) -> Any:
    """The library at `path`. Raises RuntimeError if there are `reasons` against it."""
    if reasons:
        raise RuntimeError(f"the operators of {path.name} cannot run here: {'; '.join(reasons)}.")
    library = ctypes.CDLL(str(path))
    library.smi_operator.restype = ctypes.c_void_p
    return library


def text(function: Any) -> str:
    """What a function of a library that takes nothing says."""
    function.restype = ctypes.c_char_p
    return str(function().decode())


def takes(*dtypes: torch.dtype) -> bool:
    """Whether there are operators for tensors of these dtypes: one and the same, float32 or float64."""
    return dtypes[0] in _DTYPES and all(dtype == dtypes[0] for dtype in dtypes)


def by_image(operation: Callable[..., Any], args: tuple[Any, ...], batched: tuple[int, ...]) -> Any:
    """What a reference gives, one image at a time where nothing is compiled.

    PyTorch's matrix products of several images may sum in another order than those of one.

    Args:
        batched: places in `args` of tensors with an image in each row, or None; the first is a tensor.
    """
    images = args[batched[0]].shape[0]
    if images < 2:
        return operation(*args)
    made = []
    for i in range(images):
        given = [a[i : i + 1] if place in batched and a is not None else a for place, a in enumerate(args)]
        made.append(operation(*given))
    if isinstance(made[0], Tensor):
        return torch.cat(made)
    return tuple(torch.cat(parts) for parts in zip(*made, strict=True))


def call(name: str, dtype: torch.dtype, *args: Any) -> None:
    """Run operator `name` for numbers of `dtype`.

    Args:
        args: what the function in ``csrc/cpu`` takes: contiguous CPU tensors or `Rows` where it takes addresses, None
            for an address of nothing, ints, floats, bools, and tuples of ints where it takes a structure of them.

    Raises:
        ValueError: a tensor that is not contiguous, on another device, or floating and of another dtype.
        MemoryError: no room for intermediate results.
    """
    key = (name, dtype)
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = _operator(name, dtype, args)
    if function(*[_value(name, dtype, arg) for arg in args]):
        raise MemoryError(f"{name} found no memory for its intermediate results.")


def call_untyped(name: str, *args: Any) -> None:
    """As `call`, for a function that takes integers alone."""
    getattr(_library(), f"smi_{name}")(*(_type(arg)(_value(name, torch.int64, arg)) for arg in args))


def written(*tensors: Tensor) -> None:
    """Tells autograd that an operator, which knows addresses alone, has written to these."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


class Rows:
    """A matrix whose rows are contiguous, but may be apart: its address, and ``row``, elements from one to the next."""

    def __init__(self, matrix: Tensor) -> None:
        self.tensor = matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= 0 else matrix.contiguous()
        self.row = self.tensor.stride(0)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor in contiguous memory; None stays."""
    return None if tensor is None else tensor.contiguous()


def expect(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError where a tensor has not the shape beside it; None has any."""
    for name, (tensor, shape) in given.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")


def expect_dtype(dtype: torch.dtype, **given: Tensor | None) -> None:
    """Raises ValueError where a tensor has another dtype."""
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype}.")


def expect_indices(name: str, indices: Tensor, end: int) -> None:
    """Raises ValueError unless `indices` are int64 in [0, end)."""
    expect_dtype(torch.int64, **{name: indices})
    if indices.numel():
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= end:
            raise ValueError(f"{name} has {low if low < 0 else high}; expected 0 to {end - 1}.")


def expect_offsets(offsets: Tensor | None, images: int) -> None:
    """Raises ValueError unless `offsets` is None, or int64 rows of (dy, dx, flip), one for all images or for each."""
    if offsets is None:
        return
    expect_dtype(torch.int64, offsets=offsets)
    if offsets.ndim != 2 or offsets.shape[1] != 3 or offsets.shape[0] not in (1, images):
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; expected ({images}, 3) or (1, 3), rows of (dy, dx, flip)."
        )


def _value(name: str, dtype: torch.dtype, value: Any) -> Any:
    """What ctypes takes for an argument of `call`."""
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError(f"{name} was given a tensor of strides {value.stride()}; expected a contiguous one.")
    elif isinstance(value, Rows):
        value = value.tensor
    elif isinstance(value, tuple):
        return ctypes.addressof(_structure(value))
    else:
        return value
    if not value.is_cpu:
        raise ValueError(f"{name} was given a tensor on {value.device}; expected one on the CPU.")
    if value.dtype != dtype and value.is_floating_point():
        raise ValueError(f"{name} was given a tensor of {value.dtype}; expected {dtype}.")
    return value.data_ptr()


@functools.cache
def _structure(numbers: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _type(value: Any) -> Any:
    return {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}.get(type(value), ctypes.c_void_p)


def _operator(name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Any:
    """The function, which takes arguments of the types of `args`, and returns whether it failed."""
    address = _library().smi_operator(name.encode(), ctypes.c_int32(dtype.itemsize))
    if not address:
        raise ValueError(f"there is no compiled operator {name!r}.")
    return ctypes.CFUNCTYPE(ctypes.c_int32, *map(_type, args))(address)


def _path() -> Path:
    return folder() / f"cpu_{instruction_set()}.so"


@functools.cache
def _library() -> Any:
    library = load(_path(), reasons_against())
    suffix = ".dylib" if os.uname().sysname == "Darwin" else ".so"
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
    library.smi_use_threads(torch_library.torch_parallel_for)
    return library


def _stale(library: Any, name: str) -> tuple[str, ...]:
    """In a source checkout, where code and library may differ: whether they do."""
    builder = _builder()
    if builder is None or text(library.smi_sources) == builder.sources_hash():
        return ()
    return (f"{name} was built from other sources than csrc/ holds now; install the package again",)


def _builder() -> ModuleType | None:
    """``csrc/build.py``, if this is a source checkout."""
    path = _PACKAGE.parent / "csrc" / "build.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("smi_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
