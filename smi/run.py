"""From a work plan to a finished pool: the missing batches in order, each written as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smi.errors import SmiError
from smi.inversion import Inversion, check_fit
from smi.objectives import Objectives
from smi.pool import PoolWriter
from smi.workers import Workers

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.state import Result, WorkPlan


_LOOK_AGAIN = 2.0  # seconds, while all that is left is in other runs' hands


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
    join: bool = False,
    shard: tuple[int, int] | None = None,
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
        join: share the batches with other runs on the same folder that join too; they may come and go. What a dead one
            had in hand is taken over, and the call returns when nothing is left to do, by anyone.
        shard: (i, n) makes the batches i, i + n, i + 2 n, ... alone.
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
    if join and overwrite:
        raise SmiError("join and overwrite exclude each other: the others' batches would go. Leave one of them out.")
    part, parts = shard or (0, 1)
    if not 0 <= part < parts:
        raise SmiError(f"shard is {part}/{parts}; expected 0/{parts} to {parts - 1}/{parts}.")
    mine = range(part, plan.num_batches, parts)

    def images(batches: Iterable[int]) -> int:
        return sum(len(plan.batch(b)) for b in batches)

    with Workers(Path(out), together=join) as workers:
        writer = PoolWriter(
            out, model.info, config, plan, device=model.where, overwrite=overwrite, alone=not workers.others()
        )
        found = set(mine) & set(writer.present)
        if on_open is not None:
            on_open([batch for batch in mine if batch not in found])
        done: list[int] = []
        seconds_per_image = 0.0
        for batch in _to_do(writer, workers, mine, join):
            batch_started = time.monotonic()
            expected = batch_started - started + seconds_per_image * len(plan.batch(batch))
            if done and time_budget is not None and expected > time_budget:
                break
            result = invert_batch(model, plan, config, batch, objectives, on_iteration)
            if workers.holds(batch):
                writer.write(batch, result)
            workers.release(batch)
            seconds = time.monotonic() - batch_started
            seconds_per_image = max(seconds_per_image, seconds / len(plan.batch(batch)))
            done.append(batch)
            if on_batch is not None:
                on_batch(batch, result, seconds)
        left = set(mine) - set(writer.present)
    return RunSummary(
        path=Path(out),
        images_done=images(done),
        batches_done=len(done),
        images_found=images(found),
        batches_found=len(found),
        images_left=images(left),
        batches_left=len(left),
        seconds=time.monotonic() - started,
    )


def _to_do(writer: PoolWriter, workers: Workers, batches: range, join: bool) -> Iterator[int]:
    """Batches to make, each claimed for this run; waits for those in other hands, should their owners die."""
    while True:
        present = set(writer.present)
        missing = [batch for batch in batches if batch not in present]
        claimed = False
        for batch in missing:
            if workers.take(batch):
                if batch in writer.present:  # made and released since we looked
                    workers.release(batch)
                    continue
                claimed = True
                yield batch
        if not missing or not join:
            return
        if not claimed:
            time.sleep(_LOOK_AGAIN)


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
