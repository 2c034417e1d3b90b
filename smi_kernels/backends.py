"""Which implementation of the operations runs, which others could, and every reason why one cannot.

    python -m smi_kernels.backends

Looking imports torch but not Triton, and leaves CUDA uninitialised, so that it is safe before a fork.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BACKENDS = ("reference", "triton", "cuda")
_wanted: ContextVar[str] = ContextVar("backend", default="auto")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: ``reference`` is plain PyTorch and defines what is correct; ``triton`` and ``cuda`` are kernels.
        live: whether the public functions of `smi_kernels` can run on it here and now.
        reason: why it is live, or everything that stands against it, separated by semicolons.
    """

    name: str
    live: bool
    reason: str


def status() -> list[Backend]:
    """All backends, the reference first."""
    import torch

    against = {name: reasons_against(name) for name in ("triton", "cuda")}
    return [
        Backend("reference", True, f"PyTorch {torch.__version__}"),
        *(Backend(name, not reasons, "; ".join(reasons) or _about_triton()) for name, reasons in against.items()),
    ]


def reasons_against(name: str, device: torch.device | None = None) -> list[str]:
    """Every reason why backend `name` cannot run, at all or for tensors on `device`; empty if it can."""
    if name == "reference":
        return []
    if name == "triton":
        return [*_without_triton(), *(_without_gpu() if device is None else _not_for(device))]
    if name == "cuda":
        return ["this version has no compiled operators", *_missing_compilers(), *_without_gpu()]
    raise ValueError(f"backend is {name!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context (of this thread) every operation runs on backend `name`.

    Args:
        name: ``reference``, ``triton``, ``cuda``, or ``auto``: kernels wherever they can run on the tensors' device,
            else the reference.

    Raises:
        ValueError: no such backend, or not live, with every reason. Tensors on a device that it cannot serve raise when
            an operation meets them: nothing falls back unasked.
    """
    if name != "auto":
        reasons = reasons_against(name)
        if reasons:
            raise ValueError(f"backend {name!r} cannot run here: {'; '.join(reasons)}.")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> str:
    """What `use_backend` asked for here, else ``auto``."""
    return _wanted.get()


def choose(device: torch.device) -> str:
    """The backend that an operation on tensors of `device` runs on. Raises ValueError if the wanted one cannot."""
    name = wanted()
    if name == "reference":
        return "reference"
    reasons = _reasons(device, interpreted())
    if not reasons:
        return "triton" if name == "triton" or device.type == "cuda" else "reference"
    if name == "auto":
        return "reference"
    raise ValueError(f"backend {name!r} cannot run on {device}: {'; '.join(reasons)}.")


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _reasons(device: torch.device, _interpreted: bool) -> list[str]:
    return reasons_against("triton", device)


def _not_for(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of this device."""
    import torch

    if interpreted():
        return []
    if device.type != "cuda":
        here = f"tensors on {device.type} are not for GPU kernels, unless TRITON_INTERPRET=1 interprets them"
        return [here, *_without_gpu()]
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and (major, minor) < (8, 0):
        return [f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"]
    return []


def _without_gpu() -> list[str]:
    import torch

    if interpreted():
        return []
    # device_count asks NVML first; is_available would initialise the driver.
    if torch.version.cuda is None and torch.version.hip is None:
        return [f"torch {torch.__version__} is built without GPU support"]
    if torch.cuda.device_count() == 0:
        return ["no CUDA GPU is visible"]
    return []


def _without_triton() -> list[str]:
    return [] if importlib.util.find_spec("triton") else ["triton is not installed"]


def _about_triton() -> str:
    try:
        version = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # nightly builds of torch bring it under other names
        version = "triton"
    return f"{version}, interpreted on the CPU" if interpreted() else version


def _missing_compilers() -> list[str]:
    missing = []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if not shutil.which("nvcc") and not Path(home, "bin", "nvcc").is_file():
        missing.append(f"no nvcc on PATH or in {home}")
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        missing.append("no C++ compiler on PATH")
    return missing


def main() -> None:
    for backend in status():
        print(f"{backend.name:<10} {'live' if backend.live else 'not live':<9} {backend.reason}")


if __name__ == "__main__":
    main()
