#!/usr/bin/env python
"""A thousand runs on one pool, in simulated time: is anything lost or made twice, and what does the file system bear?

    python -m benchmarks.simulate

The rules are not modelled: every simulated run is a `smi.workers.Workers` on a real folder, that claims, shows life,
takes over and leaves as it does at work. Simulated are the clocks (each run's own counts from where it likes, up to one
second in a hundred may be missing), the time that a batch takes, and what goes wrong: runs are killed and replaced by
new ones after a while, fall asleep with a batch in hand and wake up, are many times slower than others, or leave in
good order. Each run is on a host of its own, so life is known by signs of life alone. Writes one JSON file under
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, environment, write_result
from smi.workers import Workers

_CALLS = ("open", "link", "rename", "replace", "unlink", "utime", "stat", "listdir", "scandir", "mkdir", "rmdir")


@dataclass(frozen=True)
class Trouble:
    """Rates are per run and hour of its work, times in seconds."""

    killed: float = 0.5
    asleep: float = 0.2
    sleep: float = 300.0
    leaves: float = 0.2
    back_after: float = 120.0
    slow: float = 0.02  # share of runs
    slowness: float = 8.0


class Simulated(Workers):
    """A run whose clock, host and stamps are the simulation's."""

    def __init__(self, path: Path, name: str, clock: Callable[[], float], stamp: Callable[[], float]) -> None:
        super().__init__(path, together=True)
        self._host, self._clock, self._stamp = name, clock, stamp

    def begin(self) -> None:
        """As on entry, without the thread that shows life."""
        self._announce()
        self.show_life()
        self._bury()

    def end(self) -> None:
        for batch in tuple(self._claimed):
            self.release(batch)
        self._bury()
        self._leave()

    def show_life(self) -> None:
        self._touch(self._mine)

    @property
    def beat_every(self) -> float:
        return self._patience / 6

    def _touch(self, file: Path) -> None:
        os.utime(file, (self._stamp(),) * 2)


class Simulation:
    """Events in order of time; all of one run happen at once, as far as others can see."""

    def __init__(self, folder: Path, runs: int, batches: int, seconds: float, ramp: float, trouble: Trouble, seed: int):
        self.folder, self.batches, self.seconds, self.trouble = folder, batches, seconds, trouble
        self.random, self.now, self.began = random.Random(seed), 0.0, time.time()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.made: dict[int, float] = {}
        self.counts: Counter[str] = Counter()
        self.worked = self.wasted = 0.0
        self.ended = 0.0
        self.hosts = itertools.count()
        for _ in range(runs):
            self.at(self.random.uniform(0, ramp), self.join)

    def at(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), what))

    def run(self) -> None:
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()

    def join(self) -> None:
        if len(self.made) < self.batches:
            Run(self)


class Run:
    """One simulated process from its start to its end."""

    def __init__(self, simulation: Simulation) -> None:
        self.s, draw, trouble = simulation, simulation.random, simulation.trouble
        offset, drift = draw.uniform(-1e6, 1e6), draw.uniform(0.99, 1.0)
        self.worker = Simulated(
            self.s.folder,
            f"host {next(self.s.hosts)}",
            lambda: offset + drift * self.s.now,
            lambda: self.s.began + self.s.now,
        )
        self.worker._random = random.Random(draw.random())
        self.slowness = trouble.slowness if draw.random() < trouble.slow else 1.0
        self.alive, self.sleeps_until = True, 0.0
        self.batch: int | None = None
        self.since = 0.0
        self.s.counts["joined"] += 1
        self.worker.begin()
        self.beat()
        for what, rate in ((self.die, trouble.killed), (self.sleep, trouble.asleep), (self.leave, trouble.leaves)):
            if rate:
                self.s.at(draw.expovariate(rate / 3600), what)
        self.next()

    @property
    def asleep(self) -> bool:
        return self.s.now < self.sleeps_until

    def later(self, delay: float, what: Callable[[], None]) -> None:
        """Unless it is dead by then; a sleeper does it when it wakes."""

        def do() -> None:
            if self.alive and self.asleep:
                self.s.at(self.sleeps_until - self.s.now, do)
            elif self.alive:
                what()

        self.s.at(delay, do)

    def beat(self) -> None:
        with contextlib.suppress(OSError):  # taken for dead: as the thread does, say nothing
            self.worker.show_life()
        self.later(self.worker.beat_every, self.beat)

    def next(self) -> None:
        s = self.s
        missing = [batch for batch in range(s.batches) if batch not in s.made]
        s.counts["listings of shards"] += 1
        if not missing:
            self.gone()
            self.worker.end()
            return
        self.batch = self.worker.pick(missing, s.made.__contains__)
        if self.batch is None:
            self.later(self.worker.wait(), self.next)
            return
        self.since = s.now
        self.later(s.seconds * self.slowness * s.random.lognormvariate(0, 0.2), self.finish)

    def finish(self) -> None:
        assert self.batch is not None
        s, batch = self.s, self.batch
        if self.worker.holds(batch):
            s.counts["made twice"] += batch in s.made
            s.made.setdefault(batch, s.now)
            s.worked += s.now - self.since
        else:
            s.counts["given up, because others had taken over"] += 1
            s.wasted += s.now - self.since
        self.worker.release(batch)
        self.batch = None
        self.next()

    def gone(self) -> None:
        self.alive = False
        self.s.ended = self.s.now

    def die(self) -> None:
        if self.alive:
            self.s.counts["killed"] += 1
            if self.batch is not None:
                self.s.wasted += self.s.now - self.since
            self.gone()
            self.s.at(self.s.random.expovariate(1 / self.s.trouble.back_after), self.s.join)

    def sleep(self) -> None:
        if self.alive:
            self.s.counts["asleep"] += 1
            self.sleeps_until = self.s.now + self.s.random.expovariate(1 / self.s.trouble.sleep)

    def leave(self) -> None:
        if self.alive and not self.asleep:
            self.s.counts["left"] += 1
            if self.batch is not None:
                self.s.wasted += self.s.now - self.since
            self.gone()
            self.worker.end()
            self.s.at(self.s.random.expovariate(1 / self.s.trouble.back_after), self.s.join)


@contextmanager
def counted(simulation: Simulation) -> Iterator[dict[int, Counter[str]]]:
    """Calls to the file system by whole minute of simulated time."""
    found: dict[int, Counter[str]] = {}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            found.setdefault(int(simulation.now // 60), Counter())[name] += 1
            return call(*args, **options)

        return wrapped

    before = {name: getattr(os, name) for name in _CALLS}
    for name, call in before.items():
        setattr(os, name, counting(name, call))
    try:
        yield found
    finally:
        for name, call in before.items():
            setattr(os, name, call)


def simulate(
    runs: int, batches: int, seconds: float, ramp: float = 600.0, trouble: Trouble | None = None, seed: int = 0
) -> dict[str, Any]:
    """What became of so many runs that make so many batches of so many seconds; they begin within `ramp` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(Path(folder), runs, batches, seconds, ramp, trouble or Trouble(), seed)
        with counted(simulation) as calls:
            simulation.run()
        left = sorted(name for name in os.listdir(folder) for name in os.listdir(Path(folder) / name))
    minutes = [sum(of.values()) / 60 for _, of in sorted(calls.items())]
    begun = int(ramp // 60) + 1
    steady = sorted(minutes[begun : max(begun + 1, len(minutes) - 5)]) or [0.0]
    return {
        "runs": runs,
        "batches": batches,
        "seconds_a_batch": seconds,
        "lost": batches - len(simulation.made),
        "counts": {key: simulation.counts[key] for key in sorted(simulation.counts)},
        "hours": simulation.ended / 3600,
        "done_after_hours": max(simulation.made.values(), default=0.0) / 3600,
        "wasted_share": simulation.wasted / max(simulation.worked + simulation.wasted, 1e-9),
        "calls_a_second": {
            "most": max(minutes, default=0.0),
            "while beginning": sum(minutes[:begun]) / max(len(minutes[:begun]), 1),
            "at work": steady[len(steady) // 2],
        },
        "calls": dict(sum(calls.values(), Counter())),
        "left_behind": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--batches-each", type=int, default=20, help="batches for each run")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    rows = []
    for runs in args.runs:
        began = time.monotonic()
        rows.append(simulate(runs, runs * args.batches_each, args.seconds, seed=args.seed))
        print(f"{runs} runs: {rows[-1]} ({time.monotonic() - began:.0f} s)", flush=True)
    record = {"benchmark": "simulation", "seed": args.seed, "trouble": vars(Trouble()), "rows": rows}
    record["environment"] = environment(torch.device("cpu"))
    print(f"written to {write_result(args.out, 'simulation', record)}")


if __name__ == "__main__":
    main()
