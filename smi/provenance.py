"""Which programs make a pool: versions, and the commit where this package runs from a checkout."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from smi._version import __version__


def versions() -> dict[str, str]:
    """Program -> version, of those installed; of this one with ``+gCOMMIT``, and ``.dirty`` behind it if changed."""
    found = {"smi": __version__ + _local(), "torch": str(torch.__version__)}
    for name in ("timm", "torchvision", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "python": platform.python_version()}


@functools.cache
def _local() -> str:
    """The local part of the version (PEP 440); nothing where there is no checkout or no git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--exclude=*",
        "--dirty=.dirty",
        "--abbrev=12",
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+g{said}"
