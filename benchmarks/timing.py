"""The timing functions, the description of where a figure was taken, and the file that keeps it."""

from __future__ import annotations

import importlib.metadata
import json
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
import smi_kernels


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


def write_result(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """Write `record` as `name` with the GPU's in it, or ``cpu``, and say where.

    The file is there whole whenever the process ends, or as it was before.
    """
    gpu = record["environment"]["gpu"]
    kind = "cpu" if gpu is None else gpu["name"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(':', '-').replace('/', '-')}-{kind}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, path)
    return path


RESULTS = Path(__file__).parent / "results"


def gpu_state(device: torch.device, *queries: str) -> list[str]:
    """What nvidia-smi says of the GPU, one answer for each query; nothing where it cannot be asked."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # torch numbers only the GPUs that it may see
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits", f"--id={name}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in said.splitlines()[0].split(",")] if said.strip() else []


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, for the head of a result file."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "pstate")
        gpu |= dict(zip(names, gpu_state(device, *names), strict=False))
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_load_before": os.getloadavg()[0],
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": timm.__version__,
        "smi": smi.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:  # a machine with a copy of the tree may have no git
        said = ""
    return said.strip() or "not a git checkout"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def quantiles(
    body: Callable[[], object],
    device: torch.device,
    rounds: int,
    *,
    repeats: int = 10,
    cold: bool = False,
    captured: bool = True,
) -> dict[str, float]:
    """Seconds of one call: ``median``, ``low`` (20 %) and ``high`` (80 %) over the rounds.

    What was to be captured and cannot be has ``launches`` 1 besides: its time includes the host's launches.

    Args:
        rounds: at least 5.
        repeats: calls in a warm round; on a GPU they are one CUDA graph where they can be captured.
        cold: evict everything before each call, which a round then makes once.
        captured: whether a CUDA graph may be made of the calls.
    """
    body()
    launched = {}
    if cold:
        seconds = _cold(body, device, rounds)
    elif not captured:
        seconds = [_waited(body, device, repeats) for _ in range(rounds)]
    else:
        try:
            seconds = smi_kernels.timed(body, device, repeats, rounds)
        except RuntimeError:  # not capturable, as the backward of a forward on another stream
            launched = {"launches": 1.0}
            seconds = [_waited(body, device, repeats) for _ in range(rounds)]
    ordered = sorted(seconds)
    return {
        "median": statistics.median(ordered),
        "low": ordered[len(ordered) // 5],
        "high": ordered[len(ordered) - 1 - len(ordered) // 5],
        **launched,
    }


def _waited(body: Callable[[], object], device: torch.device, repeats: int) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        body()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _cold(body: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Of single calls, each after as many bytes were written as any cache holds."""
    evict = torch.empty(2**28 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    seconds = []
    # On a GPU so often that it still writes when the host, which is slower, has launched the call.
    evictions = 4 if device.type == "cuda" else 1
    for _ in range(rounds):
        for _ in range(evictions):
            evict.add_(1)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            body()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            body()
            seconds.append(time.perf_counter() - began)
    return seconds
