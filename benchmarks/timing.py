"""The one timing function, and the description of where a figure was taken."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

import smi


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Time the candidates in turn, A B A B ..., so that drift of the machine falls on all alike.

    Args:
        candidates: name -> what to time; each is called once per round. Warm up before.
        rounds: repeats, at least 1.

    Returns:
        name -> ``seconds`` (every round), ``median``, ``spread`` ((max - min) / median).
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {"seconds": values, "median": (m := statistics.median(values)), "spread": (max(values) - min(values)) / m}
        for name, values in seconds.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, for the head of a result file."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_load_before": os.getloadavg()[0],
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "smi": smi.__version__,
        "commit": git.stdout.strip() or "not a git checkout",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
