"""Where the time of an iteration goes, operator by operator, against what the machine could do."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import smi_kernels
from smi.adapters.timm import SparseModel
from smi.config import Config
from smi.errors import SmiError
from smi.files import atomic_file, writing
from smi.inversion import Inversion

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One operator at one shape.

    Attributes:
        name, shape, calls: which, at what size, how often in an iteration.
        seconds: of all its calls.
        share: of the sum of all rows.
        bytes_per_second, flops_per_second: reached.
        roofline: time that the machine's ceilings would need over the time taken; 1 is perfect, and above 1 means that
            operands were found in a cache.
        registers, shared: of its Triton kernel: registers of a thread, bytes of shared memory; 0 where there is none.
    """

    name: str
    shape: tuple[int, ...]
    calls: int
    seconds: float
    share: float
    bytes_per_second: float
    flops_per_second: float
    roofline: float
    registers: int
    shared: int


@dataclass(frozen=True)
class Profile:
    """The findings of `profile`.

    Attributes:
        model, where, batch_size, kept: what ran, and on what.
        iteration: seconds of a whole iteration as an inversion runs it, median.
        copy: bytes a second that a copy reaches here; matmul: operations a second of a matrix product.
        rows: operators, the costliest first.
        trace: the trace file, if one was asked for.
    """

    model: str
    where: str
    batch_size: int
    kept: int
    iteration: float
    copy: float
    matmul: float
    rows: list[Row] = field(default_factory=list)
    trace: str | None = None

    @property
    def seconds(self) -> float:
        """Of all operators together, each timed by itself."""
        return sum(row.seconds for row in self.rows)


def profile(
    model: SparseModel,
    *,
    batch_size: int = 8,
    kept: int | None = None,
    trace: Path | None = None,
    repeats: int = 10,
    proton: bool = False,
) -> Profile:
    """Time every operator of one iteration.

    Args:
        model: one that runs on fused operators.
        batch_size: images.
        kept: patches that are fed, 1 to all; default a quarter of them.
        trace: file for a Chrome trace (chrome://tracing, ui.perfetto.dev) of one iteration, with named spans.
        repeats: calls of an operator in each of five rounds.
        proton: whether an iteration also runs under Triton's own profiler, which writes ``smi-profile.hatchet``.

    Raises:
        SmiError: a model that runs on timm's modules, with every reason; no such number of patches; no way to write
            `trace`.
    """
    if model.vit is None:
        raise SmiError(
            f"{model.info.name} runs on timm's own modules here, which torch.profiler shows: "
            f"{'; '.join(model.against_kernels)}."
        )
    patches = model.info.num_patches
    kept = max(1, patches // 4) if kept is None else kept
    if not 1 <= kept <= patches:
        raise SmiError(f"kept is {kept}; expected 1 to {patches}, the patches of {model.info.name}.")
    inversion = in_phase(model, batch_size, kept)
    if trace is not None:  # first, for a file that cannot be written would cost what was measured
        _write_trace(inversion, trace)
    if proton:
        _run_proton(inversion)
    with smi_kernels.record_operations() as operations:
        inversion.step()
    copy, matmul = smi_kernels.ceilings(model.device, DTYPES[model.precision])
    with smi_kernels.use_backend(model.backend):
        for operation in operations:
            operation.measure(model.device, repeats)
    total = sum(operation.seconds * operation.calls for operation in operations)
    rows = [
        Row(
            name=operation.name,
            shape=operation.shape,
            calls=operation.calls,
            seconds=operation.seconds * operation.calls,
            share=operation.seconds * operation.calls / total,
            bytes_per_second=operation.bytes / operation.seconds,
            flops_per_second=operation.flops / operation.seconds,
            roofline=max(operation.bytes / copy, operation.flops / matmul) / operation.seconds,
            registers=operation.registers,
            shared=operation.shared,
        )
        for operation in sorted(operations, key=lambda o: -o.seconds * o.calls)
    ]
    return Profile(
        model=model.info.name,
        where=model.where,
        batch_size=batch_size,
        kept=kept,
        iteration=_iteration(inversion),
        copy=copy,
        matmul=matmul,
        rows=rows,
        trace=None if trace is None else str(trace),
    )


def in_phase(model: SparseModel, batch_size: int, kept: int) -> Inversion:
    """A running inversion that feeds `kept` patches; everything has run once, so nothing is left to compile."""
    patches = model.info.num_patches
    config = Config(iterations=10_000, ranking="auto", precision=model.precision)
    if kept == patches:
        config = config.replace(strategy="dense")
    else:
        config = config.replace(prune_at=(1,), prune_ratio=(1 - (kept + 0.5) / patches,))
    inversion = Inversion(model, [i % model.info.num_classes for i in range(batch_size)], config)
    for _ in range(3):
        inversion.step()
    assert inversion.keep.shape[1] == kept
    return inversion


def _iteration(inversion: Inversion) -> float:
    """Seconds of an iteration, as many at once as an inversion would run."""
    on_gpu = inversion.model.device.type == "cuda"
    stride = 64 if on_gpu else 3
    rounds = []
    for _ in range(6):
        if on_gpu:
            torch.cuda.synchronize(inversion.model.device)
        began = time.perf_counter()
        inversion._advance(stride)
        if on_gpu:
            torch.cuda.synchronize(inversion.model.device)
        rounds.append((time.perf_counter() - began) / stride)
    return statistics.median(rounds[1:])  # the first captures what the others replay


def _write_trace(inversion: Inversion, path: Path) -> None:
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if inversion.model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler, smi_kernels.spans():
        inversion.step()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temp:
            profiler.export_chrome_trace(str(temp))


def _run_proton(inversion: Inversion) -> None:
    if inversion.model.device.type != "cuda":
        raise SmiError(f"proton profiles kernels on a GPU, and this model is on {inversion.model.device}.")
    with smi_kernels.proton("smi-profile"):
        inversion.step()
