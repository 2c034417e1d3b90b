"""The compiled operators of ``csrc/cuda``: finding them, checking what goes in, launching them on the current stream.

As `smi_kernels.native`: addresses and sizes go over, and nothing of PyTorch. What can be known without waiting for the
device is checked always; indices, which lie on it, only where the environment says ``SMI_CHECK=1``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_kernels import native

_emulated: ContextVar[Path | None] = ContextVar("emulated", default=None)


@functools.cache
def reasons_against() -> tuple[str, ...]:
    """Every reason why the library of CUDA operators cannot be loaded; empty if it can. Looks at no GPU."""
    return native.against_library(_path(), "nvcc in CUDA_HOME or on PATH")


def about() -> str:
    """How the operators were built."""
    return f"compiled by {native.text(_library(_path()).smi_compiler)}"


@contextlib.contextmanager
def emulated(library: Path) -> Iterator[None]:
    """Within this context the operators run on CPU tensors, by the library that ``csrc/build.py --emulate`` made."""
    token = _emulated.set(library)
    try:
        yield
    finally:
        _emulated.reset(token)


def call(name: str, dtype: torch.dtype, *args: Any) -> None:
    """Launch operator `name` for numbers of `dtype` on the current stream of its tensors' device.

    Args:
        args: what the launcher in ``csrc/cuda`` takes, less the stream: contiguous tensors or None where it takes
            addresses, ints, floats and bools. The first is a tensor.

    Raises:
        ValueError: a tensor that is not contiguous, on another device, or floating and of another dtype.
        RuntimeError: CUDA refused the launch, or an error of earlier work came to light.
    """
    device, emulating = args[0].device, _emulated.get()
    kind = "cpu" if emulating else "cuda"
    if device.type != kind:
        raise ValueError(f"{name} was given a tensor on {device}; expected one on {kind}.")
    for tensor in args:
        if isinstance(tensor, Tensor):
            _check(name, dtype, device, tensor)
    path = emulating or _path()
    function = _operator(path, name, dtype.itemsize)
    with contextlib.nullcontext() if emulating else torch.cuda.device(device):
        stream = None if emulating else torch.cuda.current_stream(device).cuda_stream
        error = function(*map(_argument, args), ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{name} could not be launched: {_error(path, error)} (CUDA error {error}).")


def checks_indices(device: torch.device) -> bool:
    """Whether to look at indices, which waits for the device: ``SMI_CHECK=1``, except while a graph is captured."""
    if os.environ.get("SMI_CHECK") != "1":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _check(name: str, dtype: torch.dtype, device: torch.device, tensor: Tensor) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} was given tensors on {device} and on {tensor.device}; expected one device.")
    if tensor.is_floating_point() and tensor.dtype != dtype:
        raise ValueError(f"{name} was given a tensor of {tensor.dtype}; expected {dtype}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} was given a tensor of strides {tensor.stride()}; expected a contiguous one.")


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p(None)


@functools.cache
def _operator(path: Path, name: str, itemsize: int) -> Any:
    address = _library(path).smi_operator(name.encode(), ctypes.c_int32(itemsize))
    if not address:
        raise ValueError(f"there is no compiled operator {name!r}.")
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)


def _path() -> Path:
    return native.folder() / "cuda.so"


@functools.cache
def _library(path: Path) -> Any:
    library = native.load(path, reasons_against() if path == _path() else ())
    library.smi_error.restype = ctypes.c_char_p
    return library


def _error(path: Path, code: int) -> str:
    return str(_library(path).smi_error(ctypes.c_int(code)).decode())
