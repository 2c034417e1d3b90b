"""From a work plan to a finished pool: the missing batches in order, each written as soon as it is done."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smi.augment import seed_of
from smi.checks import check_fit
from smi.errors import SmiError
from smi.inversion import Inversion
from smi.logs import peak_memory
from smi.objectives import Objective, Objectives
from smi.pool import PoolWriter
from smi.state import Result, joined
from smi.workers import Workers

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.state import WorkPlan
    from smi.time_left import TimeLeft


_TRIES = 3  # seeds that a batch is tried with


@dataclass(frozen=True)
class RunSummary:
    """What one call of `run` did.

    Attributes:
        path: the pool.
        images_done, batches_done: made by this call.
        images_found, batches_found: already in the pool when it was opened.
        images_left, batches_left: still missing; both 0 when the pool is complete.
        seconds: wall-clock time of this call.
        batches_begun: of those left, half done in the pool as of now, to be gone on with.
    """

    path: Path
    images_done: int
    batches_done: int
    images_found: int
    batches_found: int
    images_left: int
    batches_left: int
    seconds: float
    batches_begun: int = 0

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
    save_every: float = 300.0,
    objectives: Sequence[Objective | Callable[..., Any]] = (),
    time_left: TimeLeft | None = None,
    on_open: Callable[[list[int]], None] | None = None,
    on_iteration: Callable[[int, Inversion], None] | None = None,
    on_batch: Callable[[int, Result, float], None] | None = None,
) -> RunSummary:
    """Make the batches of `plan` that the pool at `out` lacks; calling it again goes on where it stopped.

    Whatever interrupts it, the pool stays valid. The batch in hand is put aside half done, and the next call goes on
    with it; a kill without notice loses what was done of it since it was last saved. Every batch is a function of the
    model, the config and its image numbers alone, so that an interrupted pool ends up the same, bit for bit on a device
    of the same kind.

    Args:
        overwrite: start over when `out` already holds a pool.
        join: share the batches with other runs on the same folder that join too; they may come and go. What a dead one
            had in hand is taken over, and the call returns when nothing is left to do, by anyone.
        shard: (i, n) makes the batches i, i + n, i + 2 n, ... alone.
        time_budget: seconds, after which the batch in hand is put aside, or finished if it is made in halves for want
            of memory; an iteration is done in any case. None: no limit.
        save_every: seconds between two savings of the batch in hand, which is about four times as large as its images;
            batches that take less are never saved before they are done.
        objectives: further terms of the loss, as for `Inversion`. The pool remembers what they are
            (`smi.Objective.identity`); of a function that does not describe itself, the name and the weight alone.
        time_left: learns which batches are missing and, where runs join, how far the others are; of iterations and
            batches it has to be told by the hooks.
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
    terms = Objectives(config, objectives)
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
            out,
            model.info,
            config,
            plan,
            device=model.where,
            objectives=terms.identity,
            overwrite=overwrite,
            alone=not workers.others(),
        )
        found = set(mine) & set(writer.present)
        missing = [batch for batch in mine if batch not in found]
        if time_left is not None:
            time_left.begin(missing, workers if join else None, lambda: set(mine) - set(writer.present))
        if on_open is not None:
            on_open(missing)
        done: list[int] = []
        deadline = math.inf if time_budget is None else started + time_budget
        for batch in _to_do(writer, workers, mine, join, deadline):
            batch_started = time.monotonic()
            if done and batch_started >= deadline:
                break
            aside = _Aside(writer, workers, batch, save_every, deadline)
            try:
                result = invert_batch(model, plan, config, batch, objectives, on_iteration, aside=aside)
            except _Late:
                workers.release(batch)
                break
            mine_still = workers.holds(batch)
            if mine_still:
                try:
                    writer.write(batch, result)
                except KeyboardInterrupt:
                    writer.write(batch, result)  # what takes moments, where a whole batch would be lost
                    raise
            workers.release(batch)
            seconds = time.monotonic() - batch_started
            if not mine_still:  # another took this run for dead, and makes the batch
                continue
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
        batches_begun=len(left & set(writer.begun)),
    )


class _Late(Exception):
    """The time is over, and the batch in hand put aside."""


class _Aside:
    """Keeps the batch in hand from time to time, and where a run is stopped.

    Attributes:
        tries: seed that it is tried with, from 0.
    """

    def __init__(self, writer: PoolWriter, workers: Workers, batch: int, every: float, deadline: float) -> None:
        self._writer, self._workers, self._batch = writer, workers, batch
        self._every, self._deadline = every, deadline
        self._saved = time.monotonic()
        self._state = writer.take_up(batch)
        tries = 0 if self._state is None else self._state.pop("tries", 0)
        self.tries = tries if type(tries) is int and 0 <= tries < _TRIES else 0

    def begin(self, loop: Inversion) -> None:
        """Go on from what was put aside, if it was, the first time."""
        state, self._state = self._state, None
        if state is None:
            return
        try:
            loop.load_state_dict(state)
        except SmiError as error:  # of another backend or version
            warnings.warn(f"batch {self._batch} is begun anew: {error}", stacklevel=2)

    def iteration(self, loop: Inversion) -> None:
        """An iteration is done: save it if it is time. Raises `_Late` when all time is over."""
        now = time.monotonic()
        late = now >= self._deadline and not loop.done
        if late or now - self._saved >= self._every:
            self._saved = now
            self.keep(loop)
        if late:
            raise _Late

    def keep(self, loop: Inversion) -> None:
        """Save `loop`, if no iteration is half done and the batch is still this run's. A full disk only warns."""
        if not loop.between or loop.iteration == loop.resumed_at or not self._workers.holds(self._batch):
            return
        try:
            self._writer.put_aside(self._batch, {**loop.state_dict(), "tries": self.tries})
        except SmiError as error:
            warnings.warn(f"batch {self._batch} is not put aside, and would be begun anew: {error}", stacklevel=2)


def _to_do(writer: PoolWriter, workers: Workers, batches: range, join: bool, deadline: float) -> Iterator[int]:
    """Batches to make, each claimed for this run; where runs join it waits for others' should their owners die."""
    if not join:
        present = set(writer.present)
        yield from (batch for batch in batches if batch not in present and workers.take(batch))
        return
    while True:
        present = set(writer.present)
        missing = [batch for batch in batches if batch not in present]
        if not missing:
            return
        batch = workers.pick(missing, writer.has)
        if batch is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(workers.wait(), left))
        else:
            yield batch


def invert_batch(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    batch: int,
    objectives: Sequence[Objective | Callable[..., Any]] = (),
    on_iteration: Callable[[int, Inversion], None] | None = None,
    *,
    aside: _Aside | None = None,
) -> Result:
    """Batch `batch` of the plan; arguments as for `run`.

    Where the images come out with values that are not finite, from another seed, a function of the config's and of the
    try, so that any worker finds the same; `Result.tries` tells. Where a GPU's memory does not suffice, in halves,
    where images do not depend on each other, so that it changes nothing.

    Raises:
        SmiError: not finite for the third time, or no memory and images that depend on their batch.
    """
    indices = list(plan.batch(batch))
    report = None if on_iteration is None else functools.partial(on_iteration, batch)
    for tries in range(0 if aside is None else aside.tries, _TRIES):
        seeded = config.replace(seed=seed_of(config.seed, tries + 1))
        if aside is not None:
            aside.tries = tries
        result = _invert(model, plan, seeded, indices, objectives, report, aside)
        if result.images.isfinite().all() and result.logits.isfinite().all():
            peak = peak_memory(model.device)
            return dataclasses.replace(result, tries=tries + 1, peak_memory=peak, config=config.resolved())
        warnings.warn(f"batch {batch} has values that are not finite; it is made anew from another seed.", stacklevel=2)
    raise SmiError(
        f"batch {batch} has values that are not finite, from {_TRIES} seeds. Use a smaller learning rate than "
        f"{config.learning_rate:g}, or precision fp32 or bf16."
    )


def _invert(
    model: SparseModel,
    plan: WorkPlan,
    config: Config,
    indices: list[int],
    objectives: Sequence[Objective | Callable[..., Any]],
    report: Callable[[Inversion], None] | None,
    aside: _Aside | None,
) -> Result:
    targets = [plan.targets[i] for i in indices]
    try:
        return _watched(Inversion(model, targets, config, indices=indices, objectives=objectives), report, aside)
    except torch.OutOfMemoryError as error:
        shortage = str(error).split(". ")[0]
    resolved, repeat = config.resolved(), config.images_per_trajectory
    if len(indices) < 2 * repeat:
        raise SmiError(f"one image is too much for the memory of {model.device}: {shortage}.")
    meets = {
        "norms or augmentation over the batch": (resolved.norm, resolved.augment_per) != ("image", "image"),
        "a tolerance for the batch's mean": resolved.tolerance > 0,
        "objectives of your own, which see all of it,": bool(objectives),
    }
    if any(meets.values()):
        raise SmiError(
            f"{len(indices)} images are too much for the memory of {model.device}: {shortage}. Use a smaller "
            f"batch_size: with {next(what for what, holds in meets.items() if holds)} it is part of the meaning, so it "
            f"stays here."
        )
    torch.cuda.empty_cache()
    half = len(indices) // repeat // 2 * repeat
    warnings.warn(f"{len(indices)} images are too much for the memory: made in two halves.", stacklevel=2)
    halves = indices[:half], indices[half:]
    return joined([_invert(model, plan, config, part, objectives, report, None) for part in halves], config.snapshots)


def _watched(loop: Inversion, report: Callable[[Inversion], None] | None, aside: _Aside | None) -> Result:
    """What `loop` comes to; where it is interrupted it is put aside."""
    if aside is None:
        return loop.run(report)
    aside.begin(loop)
    if loop.done and report is not None:  # it was interrupted after its last iteration
        report(loop)

    def told(loop: Inversion) -> None:
        if report is not None:
            report(loop)
        aside.iteration(loop)

    try:
        return loop.run(told)
    except KeyboardInterrupt:
        aside.keep(loop)
        raise
