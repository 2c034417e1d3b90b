"""Which implementations of the operations are live in this process and, where one is not, every reason why.

    python -m smi_kernels.backends

Nothing is chosen here. Looking imports torch but not Triton, and leaves CUDA uninitialised, so that it is safe before a
fork.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: ``reference`` is plain PyTorch and defines what is correct; ``triton`` and ``cuda`` are kernels.
        live: whether the public functions of `smi_kernels` can run on it here and now.
        reason: why it is live, or everything that stands against it, separated by semicolons.
    """

    name: Literal["reference", "triton", "cuda"]
    live: bool
    reason: str


def status() -> list[Backend]:
    """All backends, the reference first."""
    import torch

    # device_count asks NVML first; is_available would initialise the driver.
    if torch.version.cuda is None and torch.version.hip is None:
        gpu = [f"torch {torch.__version__} is built without GPU support"]
    elif torch.cuda.device_count() == 0:
        gpu = ["no CUDA GPU is visible"]
    else:
        gpu = []

    return [
        Backend("reference", True, f"PyTorch {torch.__version__}"),
        Backend("triton", False, "; ".join(["this version has no Triton kernels", *_about_triton(), *gpu])),
        Backend("cuda", False, "; ".join(["this version has no compiled operators", *_missing_compilers(), *gpu])),
    ]


def _about_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    try:
        return [f"triton {importlib.metadata.version('triton')} is installed but unused"]
    except importlib.metadata.PackageNotFoundError:  # nightly builds of torch bring it under other names
        return ["triton is installed but unused"]


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
