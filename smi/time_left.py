"""How long a run will still take, from what its iterations have cost so far.

An iteration of r images with K patches costs a + b r f(K) seconds, where f counts operations (`smi.flops`): a is what
every iteration costs whatever it feeds, b the time of an operation. Both are fitted to the iterations seen, so that the
cheaper phases that come later are told before they come.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from smi.workers import Told

if TYPE_CHECKING:
    from smi.config import Config
    from smi.inversion import Inversion
    from smi.state import WorkPlan

_FIXED = 0.05  # share of a dense iteration's cost that a is thought to be before two phases tell
_BELIEF = 4.0  # how firmly: as many iterations' worth of evidence
_LOOK_EVERY = 5.0  # seconds between two looks at what joined runs tell
_FEW = 20  # runs that are looked at so often; of more each looks the less, or the file system would do nothing else


class Team(Protocol):
    """Other runs on the same pool, see `smi.workers.Workers`."""

    def tell(self, mine: Told) -> None: ...

    def told(self) -> list[Told | None]: ...


class Pace:
    """Least squares for a and b of: seconds = a x iterations + b x work, over any number of stretches of iterations.

    A stretch of n iterations and work w has the weight n / w^2: noise of an iteration is in proportion to its work, and
    independent of its neighbours'. One phase alone cannot tell a from b, so a / (a + b) is believed to be about a
    twentieth until it is contradicted. Neither is below 0.
    """

    def __init__(self) -> None:
        # Sums over stretches of weight times products; work is in units of a dense iteration's.
        self._nn = _BELIEF * (1 - _FIXED) ** 2
        self._nw = -_BELIEF * (1 - _FIXED) * _FIXED
        self._ww = _BELIEF * _FIXED**2
        self._ny = self._wy = 0.0

    def add(self, iterations: int, work: float, seconds: float) -> None:
        weight = iterations / work**2
        self._nn += weight * iterations**2
        self._nw += weight * iterations * work
        self._ww += weight * work**2
        self._ny += weight * iterations * seconds
        self._wy += weight * work * seconds

    def seconds(self, iterations: int, work: float) -> float:
        """What so many iterations of so much work in all will take."""
        a, b = self._fitted()
        return a * iterations + b * work

    def _fitted(self) -> tuple[float, float]:
        determinant = self._nn * self._ww - self._nw**2
        a = (self._ny * self._ww - self._wy * self._nw) / determinant
        b = (self._wy * self._nn - self._ny * self._nw) / determinant
        if a < 0:
            return 0.0, self._wy / self._ww
        if b < 0:
            return self._ny / self._nn, 0.0
        return a, b


class TimeLeft:
    """The seconds that a run still takes; told of iterations and batches as they are done, asked at any time.

    Batches that converge before their last iteration end sooner than is told here.

    Args:
        plan, config: what is made.
        num_patches: of the model.
        flops: operations of an iteration of one image that feeds so many patches; None takes them for proportional to
            patches.
        clock: seconds.
    """

    def __init__(
        self,
        plan: WorkPlan,
        config: Config,
        num_patches: int,
        flops: Callable[[int], float] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._repeat, self._clock = plan, config.images_per_trajectory, clock
        self._config, self._num_patches, self._flops = config, num_patches, flops or float
        self._pace, self._seen = Pace(), False
        self._missing: set[int] = set()
        self._images_missing = 0
        self._batch: int | None = None
        self._mark = (0.0, 0)  # when was which iteration of the batch in hand done
        self._gaps = (0, 0.0)  # how many and how long between the last iteration of a batch and the first of the next
        self._team: Team | None = None
        self._missing_now: Callable[[], Collection[int]] = lambda: self._missing
        self._looked = -math.inf
        self._others: list[Told | None] = []
        self._waiting = 0  # batches that are missing and in nobody's hands

    @classmethod
    def of(cls, loop: Inversion) -> TimeLeft:
        """For the one batch of `loop`."""
        from smi.flops import count_flops
        from smi.state import WorkPlan

        model, images = loop.model, len(loop.indices) * loop.config.images_per_trajectory
        plan = WorkPlan((0,) * images, images)
        left = cls(plan, loop.config, model.info.num_patches, lambda kept: count_flops(model, kept))
        left.begin([0])
        return left

    def begin(
        self, missing: Sequence[int], team: Team | None = None, missing_now: Callable[[], Collection[int]] | None = None
    ) -> None:
        """The run starts with these batches to do.

        Args:
            team: other runs that share them; `missing_now` then says which are not on disk yet.
        """
        if missing:
            _ = self._work  # counted before time is, and not at all where nothing is to do
        self._missing = set(missing)
        self._images_missing = sum(len(self._plan.batch(batch)) for batch in missing)
        self._team, self._mark = team, (self._clock(), 0)
        self._missing_now = missing_now or self._missing_now

    def iteration(self, batch: int, iterations: int, rows: int) -> None:
        """So many iterations of the batch are done, of `rows` images (trajectories) at a time, and waited for."""
        now, (then, before) = self._clock(), self._mark
        if batch == self._batch and iterations >= before:
            if iterations == before:
                return
            self._pace.add(iterations - before, rows * (self._work[iterations] - self._work[before]), now - then)
            self._seen = True
        else:
            if self._seen:
                number, seconds = self._gaps
                gap = now - then - self._cost(batch, 0, iterations)
                self._gaps = number + 1, seconds + max(gap, 0.0)
            self._batch = batch
            self._look_soon()
        self._mark = now, iterations
        self._look()

    def batch(self, batch: int, seconds: float) -> None:
        """A batch of this run is on disk, after so many seconds."""
        if batch not in self._missing:  # told of already
            return
        if batch != self._batch or not self._seen:  # nobody told of its iterations, or of the last alone
            last = len(self._work) - 1
            self._pace.add(last, self._rows(batch) * self._work[last], seconds)
            self._seen, self._mark = True, (self._clock(), 0)
        self._missing.discard(batch)
        self._images_missing -= len(self._plan.batch(batch))
        self._batch = None
        self._look_soon()
        self._look()

    @property
    def seconds(self) -> float | None:
        """Until all is done, by this run and those that share its batches; None before anything is measured."""
        if not self._seen:
            return None
        if self._team is None:
            return max(0.0, self._free() + self._rest())
        self._look()
        each, ago = self._each(), self._clock() - self._looked
        others = [(one.each, max(0.0, one.free - ago)) if one else (each, each) for one in self._others]
        return _together([(each, max(0.0, self._free())), *others], self._waiting)

    @property
    def images_per_second(self) -> float | None:
        """Whole images that this run makes in a second, at the pace measured so far."""
        return len(self._plan.batch(0)) / self._each() if self._seen else None

    @functools.cached_property
    def _work(self) -> list[float]:
        """Of one image up to every iteration; a dense iteration of a whole batch is 1."""
        schedule, kept, fed = self._config.schedule(self._num_patches), self._num_patches, []
        for t in range(self._config.iterations):
            kept = schedule.get(t, kept)
            fed.append(kept)
        operations = {kept: self._flops(kept) for kept in dict.fromkeys(fed)}
        full = operations[self._num_patches] * self._rows(0)
        return [0.0, *itertools.accumulate(operations[kept] / full for kept in fed)]

    def _rows(self, batch: int) -> int:
        """Trajectories of a batch."""
        return len(self._plan.batch(batch)) // self._repeat

    def _cost(self, batch: int, start: int, stop: int) -> float:
        return self._pace.seconds(stop - start, self._rows(batch) * (self._work[stop] - self._work[start]))

    def _gap(self) -> float:
        number, seconds = self._gaps
        return seconds / number if number else 0.0

    def _each(self) -> float:
        """Seconds of a whole batch."""
        return max(self._cost(0, 0, len(self._work) - 1) + self._gap(), 1e-9)

    def _free(self) -> float:
        """Seconds until the batch in hand is done; below 0 after it, by as much as is gone since."""
        then, done = self._mark
        left = 0.0 if self._batch is None else self._cost(self._batch, done, len(self._work) - 1)
        return left - (self._clock() - then)

    def _rest(self) -> float:
        """Seconds of the missing batches but the one in hand, by this run alone."""
        images, batches, last = self._images_missing, len(self._missing), len(self._work) - 1
        if self._batch in self._missing:
            images, batches = images - len(self._plan.batch(self._batch)), batches - 1
        whole = self._pace.seconds(last * batches, images / self._repeat * self._work[last])
        return whole + batches * self._gap()

    def _look_soon(self) -> None:
        if len(self._others) <= _FEW:
            self._looked = -math.inf

    def _look(self) -> None:
        """Now and then, and whenever a batch begins or ends: tell joined runs of this one, and see how far they are."""
        now, every = self._clock(), _LOOK_EVERY * max(1.0, len(self._others) / _FEW) ** 2
        if self._team is None or not self._seen or now - self._looked < every:
            return
        self._looked = now
        if self._batch is not None:
            self._team.tell(Told(self._batch, self._each(), max(0.0, self._free())))
        missing = set(self._missing_now()) - {self._batch}
        self._others = self._team.told()
        # What one had in hand may be on disk by now, and another begun: then that one is among the waiting still.
        taken = sum(one is None or one.batch in missing for one in self._others)
        self._waiting = max(0, len(missing) - taken)


def _together(runs: Sequence[tuple[float, float]], batches: int) -> float:
    """Seconds until `batches` waiting ones are done by runs that each take the next as soon as they are free.

    Args:
        runs: seconds that each takes for a batch, and until it is free.
    """
    # By bisection: the earliest moment by which all have been begun, which is before 0 where none waits.
    low, high = -1.0, max(free for _, free in runs) + batches * min(each for each, _ in runs)
    for _ in range(60):
        moment = (low + high) / 2
        begun = sum(_begun(each, free, moment) for each, free in runs)
        low, high = (low, moment) if begun >= batches else (moment, high)
    return max(free + _begun(each, free, high) * each for each, free in runs)


def _begun(each: float, free: float, moment: float) -> int:
    """Batches that one run has begun until `moment`."""
    return math.floor((moment - free) / each) + 1 if moment >= free else 0
