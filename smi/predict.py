"""What an inversion will cost before it is paid for: arithmetic counted, time measured on a few iterations, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from smi.flops import count_flops, probe_inputs
from smi.inversion import Inversion
from smi.objectives import BUILT_IN, Objective, Objectives

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.state import WorkPlan

_PROBE_SECONDS = 2.0
# Images, their gradient, two moments, the augmented copy and its gradient, and one temporary of the update.
_PIXEL_COPIES = 7


@dataclass(frozen=True)
class PhasePrediction:
    """A stretch of iterations with one number of fed patches; figures are for one full batch.

    Attributes:
        start, stop: iterations, half open.
        kept: patches fed for each image.
        flops: of the network's forward and input-only backward in one iteration.
        seconds: of one iteration.
    """

    start: int
    stop: int
    kept: int
    flops: int
    seconds: float

    @property
    def iterations(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prediction:
    """The cost of a whole work plan.

    Attributes:
        phases: of one full batch, in order.
        images, batches: of the plan.
        flops: of the plan, counted.
        seconds: of the plan, extrapolated from a few iterations of each phase.
        memory_bytes: peak, at the first phase.
        memory_measured: True for the allocator's own peak on a GPU; False for an estimate from the bytes of parameters,
            pixel state and saved activations.
        disk_bytes: of the shards exactly, with PNG files at most as large as their pixels.
    """

    phases: tuple[PhasePrediction, ...]
    images: int
    batches: int
    flops: int
    seconds: float
    memory_bytes: int
    memory_measured: bool
    disk_bytes: int


def predict(
    model: SparseModel, plan: WorkPlan, config: Config, *, objectives: Sequence[Objective | Callable[..., Any]] = ()
) -> Prediction:
    """Count, time and add up. Takes about two seconds for each phase of the schedule.

    Raises:
        SmiError: the schedule leaves no patch.
    """
    batch = len(plan.batch(0)) // config.images_per_trajectory
    schedule = config.schedule(model.info.num_patches)
    starts = [0, *schedule]
    kept = [model.info.num_patches, *schedule.values()]
    flops = [count_flops(model, k) * batch for k in kept]
    seconds, measured = _time_phases(model, plan, config, len(kept), objectives)
    phases = tuple(
        PhasePrediction(*phase)
        for phase in zip(starts, [*starts[1:], config.iterations], kept, flops, seconds, strict=True)
    )
    batches_worth = len(plan.targets) / len(plan.batch(0))
    return Prediction(
        phases=phases,
        images=len(plan.targets),
        batches=plan.num_batches,
        flops=round(sum(p.iterations * p.flops for p in phases) * batches_worth),
        seconds=sum(p.iterations * p.seconds for p in phases) * batches_worth,
        memory_bytes=_estimate_memory(model, batch) if measured is None else measured,
        memory_measured=measured is not None,
        disk_bytes=_disk_bytes(model, plan, config, kept, objectives),
    )


def saved_bytes(model: SparseModel, kept: int) -> tuple[int, int]:
    """Bytes that autograd holds between forward and backward: of the weights, and of each image's activations.

    Only what is held for every image grows with the batch, so two small batches tell both apart.
    """
    one, two = (_held_bytes(model, kept, batch) for batch in (1, 2))
    return 2 * one - two, two - one


def _held_bytes(model: SparseModel, kept: int, batch: int) -> int:
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, cells = probe_inputs(model, kept, batch)
    # While the graph lives no storage is freed, so no address is counted for two.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits, _ = model(images, cells)
    del logits
    return sum(storages.values())


def _estimate_memory(model: SparseModel, batch: int) -> int:
    weights, activations = saved_bytes(model, model.info.num_patches)
    return weights + batch * (activations + _PIXEL_COPIES * 4 * prod(model.info.input_size))


def _disk_bytes(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    kept: list[int],
    objectives: Sequence[Objective | Callable[..., Any]],
) -> int:
    """Sizes of the tensors of a shard, see `smi.pool`, and of the pictures uncompressed."""
    info, images = model.info, len(plan.targets)
    pixels = prod(info.input_size)
    keep = info.num_patches // config.division if config.strategy == "rebirth" else kept[-1]
    per_image = 5 * pixels + 8 * keep + 4 * info.num_patches + 16 + 4 * info.num_classes + 4 * len(BUILT_IN)
    snapshots = sum(min(config.snapshots, len(plan.batch(b))) for b in range(plan.num_batches)) * len(kept)
    history = config.iterations * (len(Objectives(config, objectives).terms) + 1)
    return images * per_image + snapshots * pixels + plan.num_batches * 4 * history


def _time_phases(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    phases: int,
    objectives: Sequence[Objective | Callable[..., Any]],
) -> tuple[list[float], int | None]:
    """Seconds of one iteration of a full batch in each phase, and on a GPU the peak bytes of that batch.

    Runs the real loop on a schedule squeezed together. A CPU takes fewer images at a time where a full batch would be
    slow; time is proportional to images there.
    """
    on_gpu = model.device.type == "cuda"
    repeat = config.images_per_trajectory
    full = len(plan.batch(0)) // repeat

    def start(batch: int, phase_length: int, phases: int) -> Inversion:
        rebirth = config.strategy == "rebirth"
        prunings = range(1, phases if config.scheduled else 1)  # those of rebirth follow from its division
        short = config.replace(
            strategy="dense" if rebirth and phases == 1 else config.strategy,
            iterations=phase_length * phases,
            prune_at=tuple(phase_length * i for i in prunings),
            prune_ratio=config.prune_ratio[: len(prunings)],
            tolerance=0.0,
            best=False,
            snapshots=0,
        )
        targets = [target for target in plan.targets[::repeat][:batch] for _ in range(short.images_per_trajectory)]
        return Inversion(model, targets, short, objectives=objectives)

    def step(loop: Inversion) -> float:
        began = time.perf_counter()
        loop.step()
        if on_gpu:
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    batch = full
    if not on_gpu:
        loop = start(1, 2, 1)
        one_image = min(step(loop) for _ in range(2))
        batch = max(1, min(full, int(_PROBE_SECONDS / 6 / one_image)))
    loop = start(batch, 2, 1)
    one_step = min(step(loop) for _ in range(2))
    length = max(3, min(12, int(_PROBE_SECONDS / one_step)))

    loop = start(batch, length, phases)
    seconds = []
    for _ in range(phases):
        step(loop)  # prunes, and meets the new shapes for the first time
        seconds.append(statistics.median(step(loop) for _ in range(length - 1)) * full / batch)
    return seconds, torch.cuda.max_memory_allocated(model.device) if on_gpu else None
