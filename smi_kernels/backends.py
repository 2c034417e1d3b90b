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

BACKENDS = ("reference", "triton", "cpu", "cuda")
_wanted: ContextVar[str] = ContextVar("backend", default="auto")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: ``reference`` is plain PyTorch and defines what is correct; ``triton`` is kernels for GPUs, ``cpu`` and
            ``cuda`` are compiled operators. ``cuda`` selects tokens and steps pixels; Triton kernels do all else.
        live: whether the public functions of `smi_kernels` can run on it here and now.
        reason: why it is live, or everything that stands against it, separated by semicolons.
    """

    name: str
    live: bool
    reason: str


def status() -> list[Backend]:
    """All backends, the reference first."""
    import torch

    found = [Backend("reference", True, f"PyTorch {torch.__version__}")]
    for name, about in (("triton", _about_triton), ("cpu", _about_cpu), ("cuda", _about_cuda)):
        reasons = reasons_against(name)
        found.append(Backend(name, not reasons, "; ".join(reasons) or about()))
    return found


def reasons_against(name: str, device: torch.device | None = None) -> list[str]:
    """Every reason why backend `name` cannot run, at all or for tensors on `device`; empty if it can."""
    if name == "reference":
        return []
    if name == "triton":
        return [*_without_triton(), *(_without_gpu() if device is None else _not_for(device))]
    if name == "cpu":
        from smi_kernels import native

        elsewhere = device is not None and device.type != "cpu"
        against = native.reasons_against()
        return [
            *against,
            *(_missing_compiler() if against else []),
            *([f"its operators are for CPUs, not for {device}"] if elsewhere else []),
        ]
    if name == "cuda":
        from smi_kernels import native_cuda

        against = native_cuda.reasons_against()
        elsewhere = device is not None and device.type != "cuda"
        return [
            *against,
            *(_missing_nvcc() if against else []),
            *_without_triton(),
            *([f"its operators are for GPUs, not for {device}"] if elsewhere else []),
            *(_not_for(device) if device is not None and not elsewhere else []),
            *_no_gpu(),
        ]
    raise ValueError(f"backend is {name!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context (of this thread) every operation runs on backend `name`.

    Args:
        name: ``reference``, ``triton``, ``cpu``, ``cuda``, or ``auto``: Triton kernels on a GPU and compiled operators
            on a CPU, wherever they can run, else the reference.

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
    asked = wanted()
    if asked == "reference":
        return "reference"
    name = preferred(device) if asked == "auto" else asked
    reasons = _reasons(name, device, interpreted())
    if not reasons:
        return name
    if asked == "auto":
        return "reference"
    raise ValueError(f"backend {name!r} cannot run on {device}: {'; '.join(reasons)}.")


def preferred(device: torch.device) -> str:
    """What ``auto`` runs on tensors of `device`, if it can."""
    # Not "cuda" until timings on a GPU say that its operators are the faster ones.
    return "triton" if device.type == "cuda" else "cpu"


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _reasons(name: str, device: torch.device, _interpreted: bool) -> list[str]:
    return reasons_against(name, device)


def _not_for(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of this device."""
    import torch

    if interpreted():
        return []
    if device.type != "cuda":
        here = f"tensors on {device.type} are not for GPU kernels, unless TRITON_INTERPRET=1 interprets them"
        return [here, *_without_gpu()]
    dependent = os.environ.get("SMI_PDL") == "1"
    if torch.version.hip is not None:
        return ["SMI_PDL=1 is set, and AMD's GPUs know no dependent launch; unset it"] if dependent else []
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < ((9, 0) if dependent else (8, 0)):
        needed = "9.0 with SMI_PDL=1 set" if dependent else "8.0"
        return [f"the GPU has compute capability {major}.{minor}; the kernels need {needed}"]
    if major >= 10 and _triton_version().startswith("3.6"):
        return [
            f"the GPU has compute capability {major}.{minor}, for which Triton 3.6 fails to compile long attention; "
            f"a newer PyTorch brings a Triton that does"
        ]
    return []


def _without_gpu() -> list[str]:
    return [] if interpreted() else _no_gpu()


def _no_gpu() -> list[str]:
    import torch

    # device_count asks NVML first; is_available would initialise the driver.
    if torch.version.cuda is None and torch.version.hip is None:
        return [f"torch {torch.__version__} is built without GPU support"]
    if torch.cuda.device_count() == 0:
        return ["no CUDA GPU is visible"]
    return []


def _without_triton() -> list[str]:
    return [] if importlib.util.find_spec("triton") else ["triton is not installed"]


def _triton_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # nightly builds of torch have other names
        return importlib.metadata.version("triton")
    return ""


def _about_triton() -> str:
    version = f"triton {_triton_version()}".rstrip()
    return f"{version}, interpreted on the CPU" if interpreted() else version


def _about_cpu() -> str:
    from smi_kernels import native

    return native.about()


def _about_cuda() -> str:
    from smi_kernels import native_cuda

    return f"{native_cuda.about()}; all else {_about_triton()}"


def _missing_compiler() -> list[str]:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return [] if any(shutil.which(name) for name in names if name) else ["no C++ compiler on PATH"]


def _missing_nvcc() -> list[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    there = shutil.which("nvcc") or Path(home, "bin", "nvcc").is_file()
    return [] if there else [f"no nvcc on PATH or in {home}"]


def main() -> None:
    from smi_kernels import tuning

    for backend in status():
        print(f"{backend.name:<10} {'live' if backend.live else 'not live':<9} {backend.reason}")
    print(f"tiles of Triton's matrix kernels: {tuning.source()}")
    dependent = os.environ.get("SMI_PDL") == "1"
    print(f"dependent launch of Triton kernels: {'on' if dependent else 'off, SMI_PDL=1 has it on'}")


if __name__ == "__main__":
    main()
