"""How an inversion tells of its progress: a bar in a terminal, lines in a log, JSON objects for a program."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from smi.config import Config
    from smi.inversion import Inversion
    from smi.state import ModelInfo, Result, WorkPlan


class Reporter:
    """Base: counts work in patches fed, to which time is nearly proportional, and asks for losses only now and then.

    Reading a loss waits for the device; `every` seconds between two readings keep that from being felt.
    """

    every = 0.25

    def __init__(self, info: ModelInfo, plan: WorkPlan, config: Config) -> None:
        self.info, self.plan, self.config = info, plan, config
        schedule, kept = config.schedule(info.num_patches), info.num_patches
        self._work = [0]
        for t in range(config.iterations):
            kept = schedule.get(t, kept)
            self._work.append(self._work[-1] + kept)
        self.total = self.finished = self.images = 0
        self._began = self._told = time.monotonic()

    def open(self, missing: list[int]) -> None:
        """The run starts, with these batches to do."""
        self.images = sum(len(self.plan.batch(b)) for b in missing)
        self.total = self.images * self._work[-1]
        self._began = time.monotonic()

    def iteration(self, batch: int, loop: Inversion) -> None:
        """One iteration is done."""
        now = time.monotonic()
        if now - self._told < self.every:
            return
        self._told = now
        done = self.finished + len(self.plan.batch(batch)) * self._work[loop.iteration]
        self.tell(batch, loop, done, now - self._began)

    def batch(self, batch: int, result: Result, seconds: float) -> None:
        """One batch is on disk."""
        self.finished += len(self.plan.batch(batch)) * self._work[-1]
        self.tell_batch(batch, result, seconds)

    def rate(self, done: int, elapsed: float) -> float:
        """Images per second, unfinished ones counted by their share."""
        return self.images * done / max(self.total, 1) / max(elapsed, 1e-9)

    def tell(self, batch: int, loop: Inversion, done: int, elapsed: float) -> None:
        """`done` of `total` patches have been fed in `elapsed` seconds."""

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        """A batch is on disk."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class BarReporter(Reporter):
    """One bar over the whole run."""

    def __init__(self, console: Console, info: ModelInfo, plan: WorkPlan, config: Config) -> None:
        super().__init__(info, plan, config)
        wide = console.width >= 110  # all of it in one line, or the parts that matter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28 if wide else 8),
            *([TaskProgressColumn(), TimeElapsedColumn()] if wide else []),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, detail="")

    def open(self, missing: list[int]) -> None:
        super().open(missing)
        self._progress.update(self._task, total=max(self.total, 1))

    def tell(self, batch: int, loop: Inversion, done: int, elapsed: float) -> None:
        kept = loop.keep.shape[1]
        detail = (
            f"{loop.iteration}/{self.config.iterations} loss {loop.latest()['total']:.3f} "
            f"{kept} patches {self.rate(done, elapsed):.2f} img/s"
        )
        name = f"batch {batch + 1}/{self.plan.num_batches}"
        self._progress.update(self._task, completed=done, description=name, detail=detail)

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        self._progress.update(self._task, completed=self.finished)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class LineReporter(Reporter):
    """A plain line every few seconds and one for each batch, for logs."""

    every = 5.0

    def __init__(self, console: Console, info: ModelInfo, plan: WorkPlan, config: Config) -> None:
        super().__init__(info, plan, config)
        self._console = console

    def tell(self, batch: int, loop: Inversion, done: int, elapsed: float) -> None:
        left = elapsed * (self.total - done) / max(done, 1)
        self._line(
            f"batch {batch + 1}/{self.plan.num_batches}  iteration {loop.iteration}/{self.config.iterations}  "
            f"loss {loop.latest()['total']:.3f}  {loop.keep.shape[1]} patches  "
            f"{self.rate(done, elapsed):.2f} images/s  {duration(left)} left"
        )

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        self._line(f"batch {batch + 1}/{self.plan.num_batches}  done in {duration(seconds)}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class JsonReporter(Reporter):
    """One object for each finished batch."""

    def iteration(self, batch: int, loop: Inversion) -> None:
        return None

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        emit(
            "batch",
            batch=batch,
            indices=result.indices.tolist(),
            seconds=round(seconds, 3),
            kept=result.keep.shape[1],
            teacher_agreement=(result.logits.argmax(1) == result.targets).float().mean().item(),
            losses={name: values.mean().item() for name, values in result.losses.items()},
        )


def emit(event: str, **values: Any) -> None:
    """One JSON object on one line of stdout, there at once."""
    print(json.dumps({"event": event, **values}), flush=True)


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
