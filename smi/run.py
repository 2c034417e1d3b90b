"""From a work plan to a finished pool: the missing batches in order, each written as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smi.inversion import Inversion, check_fit
from smi.objectives import Objectives
from smi.pool import PoolWriter

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.state import Result, WorkPlan


@dataclass(frozen=True)
class RunSummary:
    """What one call of `run` did.

    Attributes:
        path: the pool.
        images_done, batches_done: made by this call.
        images_found, batches_found: already in the pool when it was opened.
        images_left, batches_left: still missing; both 0 when the pool is complete.
        seconds: wall-clock time of this call.
    """

    path: Path
    images_done: int
    batches_done: int
    images_found: int
    batches_found: int
    images_left: int
    batches_left: int
    seconds: float

    @property
    def complete(self) -> bool:
        return self.batches_left == 0


def run(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    out: str | Path,
    *,
    overwrite: bool = False,
    time_budget: float | None = None,
    objectives: Sequence[Callable[..., Any]] = (),
    on_open: Callable[[list[int]], None] | None = None,
    on_iteration: Callable[[int, Inversion], None] | None = None,
    on_batch: Callable[[int, Result, float], None] | None = None,
) -> RunSummary:
    """Make the batches of `plan` that the pool at `out` lacks; calling it again goes on where it stopped.

    Whatever interrupts it, the pool stays valid and loses at most the batch in flight; every batch is a function of
    the model, the config and its image numbers alone, so that an interrupted pool ends up the same, bit for bit.

    Args:
        overwrite: start over when `out` already holds a pool.
        time_budget: seconds; a batch that would end later, judged by the slowest one finished, is not started. One
            batch is made in any case. None: no limit.
        objectives: further terms of the loss, as for `Inversion`.
        on_open: called once with the numbers of the missing batches, before the first starts.
        on_iteration: called again and again (see `Inversion.run`) with the batch number and the loop object; reading
            losses from it may wait for the device.
        on_batch: called when a batch is safely on disk with its number, its result and its seconds.

    Raises:
        SmiError: the config does not fit the model, or `out` is another pool, is not a pool, or cannot be written.
    """
    started = time.monotonic()
    # What the first batch would refuse must not leave an empty pool behind.
    check_fit(model, config)
    Objectives(config, objectives)
    writer = PoolWriter(out, model.info, config, plan, device=model.where, overwrite=overwrite)
    missing = list(writer.missing)
    if on_open is not None:
        on_open(missing)

    def images(batches: Sequence[int]) -> int:
        return sum(len(plan.batch(b)) for b in batches)

    done: list[int] = []
    seconds_per_image = 0.0
    for batch in missing:
        batch_started = time.monotonic()
        expected = batch_started - started + seconds_per_image * len(plan.batch(batch))
        if done and time_budget is not None and expected > time_budget:
            break
        result = invert_batch(model, plan, config, batch, objectives, on_iteration)
        writer.write(batch, result)
        seconds = time.monotonic() - batch_started
        seconds_per_image = max(seconds_per_image, seconds / len(plan.batch(batch)))
        done.append(batch)
        if on_batch is not None:
            on_batch(batch, result, seconds)

    left = missing[len(done) :]
    return RunSummary(
        path=Path(out),
        images_done=images(done),
        batches_done=len(done),
        images_found=len(plan.targets) - images(missing),
        batches_found=plan.num_batches - len(missing),
        images_left=images(left),
        batches_left=len(left),
        seconds=time.monotonic() - started,
    )


def invert_batch(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    batch: int,
    objectives: Sequence[Callable[..., Any]] = (),
    on_iteration: Callable[[int, Inversion], None] | None = None,
) -> Result:
    """Batch `batch` of the plan; arguments as for `run`."""
    indices = plan.batch(batch)
    targets = [plan.targets[i] for i in indices]
    loop = Inversion(model, targets, config, indices=indices, objectives=objectives)
    return loop.run(None if on_iteration is None else lambda inversion: on_iteration(batch, inversion))
