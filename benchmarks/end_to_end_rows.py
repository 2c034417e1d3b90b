"""The rows of `benchmarks.end_to_end`: what is measured of one implementation, and what follows from it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gate import OURS, Gate
from benchmarks.implementations import Implementation
from benchmarks.timing import gpu_state
from smi.errors import SmiError
from smi.flops import count_flops
from smi.state import ModelInfo

STATE = 3 * 4  # bytes of a pixel: its value and two moments, float32


def phases(made: Implementation, gate: Gate, steps: int) -> dict[str, Any]:
    """Walk through all phases, each warmed up and then timed once; ends in the steady one, warm.

    Peak memory is of this implementation alone: what was there before is taken off.
    """
    row: dict[str, Any] = {
        "implementation": made.name,
        "about": made.about,
        "notes": list(made.notes),
        "gate": gate.to_dict(),
        "phases": [],
    }
    for number, (fed, iterations) in enumerate(made.phases or [(None, 0)]):
        if number:
            made.advance(1)  # by itself, for the ranking
        made.advance(made.warm)
        if made.fed != fed:
            raise SmiError(f"{made.name} feeds {made.fed} patches where the schedule says {fed}.")
        made.wait()
        began = time.perf_counter()
        made.advance(steps)
        made.wait()
        seconds = (time.perf_counter() - began) / steps
        row["phases"].append({"fed": fed, "iterations": iterations, "seconds_per_iteration": seconds})
    return row


def steady(running: Mapping[str, Implementation], steps: int, rounds: int, device: torch.device, clock: Any) -> dict:
    """Seconds per iteration in each round, A B A B ...; fewer rounds, but one at least, when the time is over.

    What finds no memory beside all others, whose graphs keep theirs, is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in running}
    before = sm_clock(device)
    for number in range(rounds):
        if number and clock.over:
            break
        for name in list(seconds):
            made = running[name]
            try:
                made.wait()
                began = time.perf_counter()
                made.advance(steps)
                made.wait()
                seconds[name].append((time.perf_counter() - began) / steps)
            except torch.cuda.OutOfMemoryError:
                del seconds[name]
    clocks = [before, sm_clock(device)]
    return {name: {"rounds": values, "sm_clock_mhz": clocks} for name, values in seconds.items()}


def complete(row: dict[str, Any], timed: dict[str, Any], made: Implementation, info: ModelInfo, work: dict) -> dict:
    """The row of the steady phase with all that follows from its time.

    Args:
        row: of `phases`. timed: of `steady`.
        work: of `work_of`.
    """
    values = sorted(timed["rounds"])
    median = statistics.median(values)
    B = row["batch_size"]
    kept = made.fed or row["kept"]
    row = {
        **row,
        "phase": "steady",
        "fed": made.fed,
        "seconds": median,
        "low": values[len(values) // 5],
        "high": values[len(values) - 1 - len(values) // 5],
        "rounds": timed["rounds"],
        "sm_clock_mhz": timed["sm_clock_mhz"],
        "flops": None,
        "mfu": None,
        "of_floor": None,
        "launches": launches(made),
        "final": made.final(),
    }
    if made.phases:
        flops = work["flops"](kept)
        floor = floor_seconds(info, work["shape"], kept, B, work["copy"], work["matmul"])
        row |= {"flops": flops, "mfu": flops / median / work["matmul"], "of_floor": floor / median}
        *early, last = row["phases"]
        schedule = sum(p["iterations"] * p["seconds_per_iteration"] for p in early) + last["iterations"] * median
        row |= throughput(schedule, B, "composed")
    return row


def throughput(seconds: float, batch: int, kind: str) -> dict[str, Any]:
    """Of a whole schedule, whose seconds were ``measured``, or ``composed`` of those of its phases."""
    return {
        "schedule_seconds": seconds,
        "schedule": kind,
        "images_per_second": batch / seconds,
        "images_per_gpu_hour": 3600 * batch / seconds,
    }


def whole(made: Implementation, device: torch.device, clock: Any) -> dict[str, Any]:
    """The schedule as it is given, from noise to images, compilation apart; only a reason if the time is too short."""
    iterations = made.config.iterations
    made.warm_up()
    before = sm_clock(device)
    made.wait()
    began = time.perf_counter()
    while made.iteration < iterations:
        if clock.over:
            reason = f"time ran out at iteration {made.iteration} of {iterations}"
            return {"implementation": made.name, "phase": "whole", "reason": reason}
        made.advance(min(64, iterations - made.iteration))
        made.wait()
    seconds = time.perf_counter() - began
    return {
        "implementation": made.name,
        "about": made.about,
        "notes": list(made.notes),
        "phase": "whole",
        "seconds": seconds,
        "sm_clock_mhz": [before, sm_clock(device)],
        **throughput(seconds, len(made.targets), "measured"),
        "final": made.final(),
    }


def launches(made: Implementation) -> float | None:
    """Kernels, copies and fills that the device runs in an iteration; None on a CPU."""
    if made.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    count = 8
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        made.advance(count)
        made.wait()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) / count


class Memory:
    """Peak bytes on the device while this context is open, above those at its start; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak: int | None = None

    def __enter__(self) -> Memory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            gc.collect()  # what ran before refers to itself, through bound methods
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before


def sm_clock(device: torch.device) -> int | None:
    """MHz of the multiprocessors now; None where nvidia-smi cannot tell."""
    said = gpu_state(device, "clocks.sm") if device.type == "cuda" else []
    return int(said[0]) if said and said[0].isdecimal() else None


def needed_flops(info: ModelInfo, shape: tuple[int, int, float], kept: int, batch: int) -> float:
    """Floating-point operations of an iteration that no exact method saves: forward and pixel gradient.

    Linear layers and attention of every block, the embedding of the kept patches, and of the last block everything but
    keys and values for the class token alone.

    Args:
        shape: depth, width, and the MLP's width over it.
    """
    depth, D, ratio = shape
    L = kept + info.num_prefix_tokens
    T = batch * L
    linear = 2 * (8 + 4 * ratio) * D * D * T  # both ways
    attention = 14 * L * L * D * batch  # 4 forward; 10 backward, for the scores are computed again
    saved = 2 * (4 + 4 * ratio) * D * D * (T - batch) + attention * (1 - 1 / L)
    patch = info.input_size[0] * info.patch_size[0] * info.patch_size[1]
    return depth * (linear + attention) - saved + 4 * patch * D * batch * kept


def floor_seconds(
    info: ModelInfo, shape: tuple[int, int, float], kept: int, batch: int, copy: float, matmul: float
) -> float:
    """The least time of an iteration: `needed_flops` at the measured rate of matrix products, then 24 bytes of each
    pixel value (it and two moments, read and written) at that of a copy.

    Args:
        copy, matmul: bytes and operations a second.
    """
    C, H, W = info.input_size
    return needed_flops(info, shape, kept, batch) / matmul + 2 * STATE * batch * C * H * W / copy


def speed_up(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times faster `ours` is, for people.

    Empty where either fails its gate; with "~" before it where a spread (20 % to 80 % of the rounds) is wider than the
    difference.
    """
    if not (ours["gate"]["passed"] and other["gate"]["passed"]):
        return ""
    spread = max(row["high"] - row["low"] for row in (ours, other))
    mark = "~" if spread >= abs(ours["seconds"] - other["seconds"]) else ""
    return f"{mark}{other['seconds'] / ours['seconds']:.2f}x"


def steady_rows(record: dict[str, Any]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """(model, batch size) -> implementation -> its row of the steady phase."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["phase"] == "steady":
            found.setdefault((row["model"], row["batch_size"]), {})[row["implementation"]] = row
    return found


def work_of(model: Any, network: Any, batch: int, copy: float, matmul: float) -> dict[str, Any]:
    """What `complete` needs to know of a model: operations, shape, and the machine's ceilings."""
    block = network.blocks[0]
    width = network.embed_dim
    return {
        "flops": lambda kept: count_flops(model, kept) * batch,
        "shape": (len(network.blocks), width, block.mlp.fc1.out_features / width),
        "copy": copy,
        "matmul": matmul,
    }


def line(row: dict[str, Any]) -> str:
    """One row for a terminal, while others are still to come."""
    unit = "ms/iteration" if row["phase"] == "steady" else "ms, whole schedule"
    gate = "" if row["gate"]["passed"] else f"; gate failed: {row['gate']['reason']}"
    return (
        f"{row['model']} batch {row['batch_size']} {row['implementation']:<10} {1e3 * row['seconds']:.3f} {unit}, "
        f"teacher agreement {row['final']['teacher_agreement']:.0%}{gate}"
    )


def speed_ups(record: dict[str, Any]) -> list[str]:
    """For a terminal: ours over every other, per model and batch size."""
    lines = []
    for (model, batch), found in steady_rows(record).items():
        if OURS in found:
            shown = {name: speed_up(found[OURS], row) or "gate failed" for name, row in found.items() if name != OURS}
            lines.append(f"{model} batch {batch}: {OURS} over " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    return lines
