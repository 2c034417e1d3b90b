"""The time left as it is told, against simulated runs whose clock, cost and noise are known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import smi
from smi.time_left import Pace, TimeLeft, _together
from smi.workers import Told

PATCHES = 196
PAPER = smi.Config(batch_size=8)
DENSE = smi.Config(strategy="dense", iterations=400, batch_size=8)
FAST = smi.Config(iterations=400, prune_at=(20, 40, 80, 120), batch_size=8)


class Machine:
    """One run: an iteration of r images with K patches takes (fixed + r K / 8 / 196) seconds, give or take 10 %."""

    def __init__(self, config: smi.Config, plan: smi.WorkPlan, fixed: float, seed: int, slow: float = 1.0) -> None:
        self.now, self._noise, self._fixed, self._slow = 0.0, random.Random(seed), fixed, slow
        self._plan, self._config = plan, config
        self.left = TimeLeft(plan, config, PATCHES, clock=lambda: self.now)

    def batch(self, batch: int, end: float = 3.0) -> Iterator[float]:
        """Its iterations; yields the time whenever a reporter would have told of it, every 10 seconds or so."""
        schedule, kept, told = self._config.schedule(PATCHES), PATCHES, -1e9
        rows, last = len(self._plan.batch(batch)), self._config.iterations
        for t in range(last):
            kept = schedule.get(t, kept)
            noise = max(0.2, self._noise.gauss(1, 0.1))
            self.now += self._slow * noise * (self._fixed + rows * kept / 8 / PATCHES)
            if t in (0, last - 1) or self.now - told > 10:
                told = self.now
                self.left.iteration(batch, t + 1, rows)
                yield self.now
        self.now += end
        self.left.batch(batch, self.now)


def wrong(told: list[tuple[float, float | None]], end: float) -> list[str]:
    """Estimates after the first twentieth that are off by more than 20 % of what was left, or 1 % of the whole."""
    assert len(told) > 100
    late = [(now, left) for now, left in told if now >= 0.05 * end]
    assert late
    return [
        f"at {now / end:.1%} {left:.0f} s, really {end - now:.0f} s"
        for now, left in late
        if left is None or abs(left - (end - now)) > max(0.2 * (end - now), 0.01 * end)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fixed", [0.0, 0.05, 0.2, 0.5, 2.0])
@pytest.mark.parametrize(
    ("config", "images", "missing"),
    [
        pytest.param(PAPER, 8, None, id="the paper's schedule, one batch"),
        pytest.param(PAPER, 20, None, id="three batches, the last one short"),
        pytest.param(DENSE, 24, None, id="dense"),
        pytest.param(FAST, 160, [3, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19], id="resumed"),
    ],
)
def test_alone(config: smi.Config, images: int, missing: list[int] | None, fixed: float, seed: int) -> None:
    plan = smi.WorkPlan((0,) * images, 8)
    machine = Machine(config, plan, fixed, seed)
    missing = list(range(plan.num_batches)) if missing is None else missing
    machine.left.begin(missing)
    assert machine.left.seconds is None
    told = [(now, machine.left.seconds) for batch in missing for now in machine.batch(batch)]
    assert machine.left.seconds == 0
    assert not wrong(told, machine.now)


class Board:
    """What joined runs tell each other, at the time of the one that acts."""

    def __init__(self, batches: int) -> None:
        self.missing, self.waiting = set(range(batches)), list(range(batches))
        self.paces: dict[int, tuple[Told, float]] = {}
        self.machines: list[Machine] = []

    def seat(self, number: int) -> Any:
        def tell(mine: Told) -> None:
            self.paces[number] = mine, self.machines[number].now

        def told() -> list[Told | None]:
            found: list[Told | None] = []
            for other in range(len(self.machines)):
                mine, then = self.paces.get(other, (None, 0.0))
                if other != number:
                    found.append(mine and mine._replace(free=mine.free - (self.machines[number].now - then)))
            return found

        return SimpleNamespace(tell=tell, told=told)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fixed", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("batches", [12, 40])
def test_three_workers_of_which_one_is_slow(batches: int, fixed: float, seed: int) -> None:
    plan, board = smi.WorkPlan((0,) * 8 * batches, 8), Board(batches)
    for number, slow in enumerate((1.0, 1.1, 3.0)):
        board.machines.append(Machine(FAST, plan, fixed, 10 * seed + number, slow))
        board.machines[-1].left.begin(range(batches), board.seat(number), lambda: board.missing)

    def work(machine: Machine) -> Iterator[float]:
        while board.waiting:
            batch = board.waiting.pop(0)
            yield from machine.batch(batch)
            board.missing.discard(batch)

    told: list[tuple[float, float | None]] = []
    going = {number: work(machine) for number, machine in enumerate(board.machines)}
    while going:
        number = min(going, key=lambda n: board.machines[n].now)
        now = next(going[number], None)
        if now is None:
            del going[number]
        else:
            told.append((now, board.machines[number].left.seconds))
    assert not wrong(told, max(machine.now for machine in board.machines))


def test_waiting_batches_go_to_whoever_is_free() -> None:
    def by_hand(runs: list[tuple[float, float]], batches: int) -> float:
        free = [each_free[1] for each_free in runs]
        for _ in range(batches):
            first = free.index(min(free))
            free[first] += runs[first][0]
        return max(free)

    draw = random.Random(0)
    for _ in range(200):
        runs = [(draw.uniform(1, 9), draw.uniform(0, 9)) for _ in range(draw.randint(1, 4))]
        batches = draw.randint(0, 30)
        assert _together(runs, batches) == pytest.approx(by_hand(runs, batches), rel=1e-9), (runs, batches)


@pytest.mark.parametrize(("fixed", "each"), [(3.0, 2.0), (0.0, 2.0), (3.0, 0.0)])
def test_both_costs_are_found_once_two_phases_were_seen(fixed: float, each: float) -> None:
    pace = Pace()
    for iterations, work in ((5000, 5000.0), (5000, 1000.0)):
        pace.add(iterations, work, fixed * iterations + each * work)
    assert pace.seconds(10, 3.0) == pytest.approx(10 * fixed + 3 * each, rel=0.01, abs=0.05)


@pytest.mark.parametrize("seen", [False, True])
def test_batches_whose_iterations_nobody_watches_count_whole(seen: bool) -> None:
    """Nor those that are heard of only when all their iterations are done, as in one CUDA graph of few."""
    left = TimeLeft(smi.WorkPlan((0,) * 40, 8), FAST, PATCHES, clock=lambda: 0.0)
    left.begin(range(5))
    for batch, seconds in enumerate((60.0, 80.0)):
        if seen and batch == 0:
            left.iteration(batch, 400, 8)
        left.batch(batch, seconds)
    assert left.seconds == pytest.approx(3 * 70)
    assert left.images_per_second == pytest.approx(8 / 70)
