"""How an inversion tells of its progress: a bar in a terminal, lines in a log, JSON objects for a program."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smi.time_left import TimeLeft

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.inversion import Inversion
    from smi.state import ModelInfo, Result, WorkPlan


LINE_EVERY = 10.0  # seconds between two lines of a log


@contextlib.contextmanager
def progress(what: str, *, silent: bool = False, every: float | None = None) -> Iterator[Callable[..., None]]:
    """Of work that is no inversion, on stderr: a bar in a terminal, elsewhere a line now and then.

    Args:
        silent: tell nothing.
        every: seconds before the first line and between two; None is `LINE_EVERY`.

    Yields:
        a function of what is done, the total, and a word on it.
    """
    console, last, wait = Console(stderr=True), time.monotonic(), LINE_EVERY if every is None else every
    if console.is_terminal and not silent:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, said=what: bar.update(task, completed=done, total=total, description=said)
        return

    def line(done: int, total: int, said: str = what) -> None:
        nonlocal last
        if not silent and time.monotonic() - last >= wait:
            console.print(f"{done}/{total} {said}", markup=False, highlight=False, soft_wrap=True)
            last = time.monotonic()

    yield line


class Reporter:
    """Base: counts work in patches fed, and asks for losses only now and then.

    Reading a loss waits for the device; `every` seconds between two readings keep that from being felt. Beyond them one
    is made as each batch begins and ends, so that the estimate of the time left knows what lies between batches.
    """

    every = 0.25

    def __init__(self, info: ModelInfo, plan: WorkPlan, config: Config, left: TimeLeft | None = None) -> None:
        self.info, self.plan, self.config = info, plan, config
        self.left = left or TimeLeft(plan, config, info.num_patches)
        self._batch: int | None = None
        schedule, kept = config.schedule(info.num_patches), info.num_patches
        self._work = [0]
        for t in range(config.iterations):
            kept = schedule.get(t, kept)
            self._work.append(self._work[-1] + kept)
        self.total = self.finished = 0
        self._skipped = 0  # of the batch in hand, what an earlier run has done of it
        self._began = self._told = time.monotonic()

    def open(self, missing: list[int]) -> None:
        """The run starts, with these batches to do."""
        self.total = sum(len(self.plan.batch(b)) for b in missing) * self._work[-1]
        self._began = time.monotonic()

    def iteration(self, batch: int, loop: Inversion) -> None:
        """One iteration is done."""
        due = time.monotonic() - self._told >= self.every
        skipped = len(self.plan.batch(batch)) * self._work[loop.resumed_at]
        self.total += self._skipped - skipped  # a second try does all of it
        self._skipped = skipped
        if not (due or loop.done or batch != self._batch):
            return
        self._batch, losses = batch, loop.latest()  # from here on the clock counts all that is done
        self.left.iteration(batch, loop.iteration, len(loop.indices))
        if due:
            self._told = time.monotonic()
            done = self.finished + len(self.plan.batch(batch)) * self._work[loop.iteration] - self._skipped
            self.tell(batch, loop, losses, done, self._told - self._began)

    def batch(self, batch: int, result: Result, seconds: float) -> None:
        """One batch is on disk."""
        self.finished += len(self.plan.batch(batch)) * self._work[-1] - self._skipped
        self._skipped = 0
        self.left.batch(batch, seconds)
        self.tell_batch(batch, result, seconds)

    def rate(self, done: int, elapsed: float) -> float:
        """Images per second, unfinished ones counted by their share."""
        return done / self._work[-1] / max(elapsed, 1e-9)

    def remaining(self) -> str:
        """The time left, for people."""
        seconds = self.left.seconds
        return "" if seconds is None else f"{duration(seconds)} left"

    def tell(self, batch: int, loop: Inversion, losses: dict[str, float], done: int, elapsed: float) -> None:
        """`done` of `total` patches have been fed in `elapsed` seconds."""

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        """A batch is on disk."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class BarReporter(Reporter):
    """One bar over the whole run."""

    def __init__(
        self, console: Console, info: ModelInfo, plan: WorkPlan, config: Config, left: TimeLeft | None = None
    ) -> None:
        super().__init__(info, plan, config, left)
        wide = console.width >= 110  # all of it in one line, or the parts that matter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28 if wide else 8),
            *([TaskProgressColumn(), TimeElapsedColumn()] if wide else []),
            TextColumn("{task.fields[detail]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, detail="", left="")

    def open(self, missing: list[int]) -> None:
        super().open(missing)
        self._progress.update(self._task, total=max(self.total, 1))

    def tell(self, batch: int, loop: Inversion, losses: dict[str, float], done: int, elapsed: float) -> None:
        kept = loop.keep.shape[1]
        detail = (
            f"{loop.iteration}/{self.config.iterations} loss {losses['total']:.3f} "
            f"{kept} patches {self.rate(done, elapsed):.2f} img/s"
        )
        name = f"batch {batch + 1}/{self.plan.num_batches}"
        self._progress.update(
            self._task, completed=done, total=max(self.total, 1), description=name, detail=detail, left=self.remaining()
        )

    def tell_batch(self, batch: int, result: Result, seconds: float) -> None:
        self._progress.update(self._task, completed=self.finished, left=self.remaining())

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class LineReporter(Reporter):
    """A plain line every few seconds and one for each batch, for logs."""

    every = 5.0

    def __init__(
        self, console: Console, info: ModelInfo, plan: WorkPlan, config: Config, left: TimeLeft | None = None
    ) -> None:
        super().__init__(info, plan, config, left)
        self._console = console

    def tell(self, batch: int, loop: Inversion, losses: dict[str, float], done: int, elapsed: float) -> None:
        self._line(
            f"batch {batch + 1}/{self.plan.num_batches}  iteration {loop.iteration}/{self.config.iterations}  "
            f"loss {losses['total']:.3f}  {loop.keep.shape[1]} patches  "
            f"{self.rate(done, elapsed):.2f} images/s  {self.remaining()}"
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
        from smi.logs import batch_facts

        left = self.left.seconds
        emit(
            "batch",
            batch=batch,
            indices=result.indices.tolist(),
            **batch_facts(result, seconds),
            seconds_left=None if left is None else round(left, 1),
        )


def make_reporter(as_json: bool, model: SparseModel, plan: WorkPlan, config: Config) -> Reporter:
    """JSON objects if wanted, a bar in a terminal, lines elsewhere."""
    from smi.flops import count_flops

    left = TimeLeft(plan, config, model.info.num_patches, lambda kept: count_flops(model, kept))
    if as_json:
        return JsonReporter(model.info, plan, config, left)
    console = Console(stderr=True)
    kind = BarReporter if console.is_terminal else LineReporter
    return kind(console, model.info, plan, config, left)


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
