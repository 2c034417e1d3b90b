"""A record of a run as it goes: JSON lines to read with anything, scalars for TensorBoard.

    log = smi.logs.Log("run.jsonl", tensorboard="runs/a")
    smi.invert(model, targets, config, progress=log)

Every line is an object with ``event`` (start, iteration or batch), ``time`` (seconds since 1970), ``worker`` (host and
process) and, but for start, ``step``: batch x iterations + iterations done, so that a resumed run goes on where the
numbers were, and runs that share a pool never use the same ones. A batch that a kill interrupted is made again, under
its own steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from smi.errors import SmiError, reason
from smi.files import writing
from smi.time_left import TimeLeft

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from smi.inversion import Inversion
    from smi.state import Result

Event = dict[str, Any]
_BEGINS = b'{"event"'
_LONGEST = 1 << 20  # bytes of a line


class Sink(Protocol):
    """Where events go."""

    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


class Log:
    """Hooks for `smi.invert` (the object itself is one) and `smi.run.run` (`open`, `iteration` and `batch`).

    Losses are read from the device in one go every `seconds`, never at every iteration; each `every`-th iteration and
    the last have an event all the same, since the loop keeps the losses of all. Throughput, memory and time left are
    those of the reading.

    Args:
        path: JSON lines are appended to it; what a killed run left unfinished at its end is blanked out first. Made,
            with its folder, when there is something to write.
        tensorboard: folder for TensorBoard's own files.
        every: iterations between two events.
        seconds: between two readings.
        left: what else is told of the run; without it the time left is known in `smi.invert` alone.
        worker: who writes; default host and process.

    Raises:
        SmiError: TensorBoard is not installed; later, that `path` is no log or cannot be written.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        tensorboard: str | Path | None = None,
        *,
        every: int = 20,
        seconds: float = 1.0,
        left: TimeLeft | None = None,
        worker: str | None = None,
    ) -> None:
        if every < 1:
            raise SmiError(f"every is {every}; expected a number of iterations from 1.")
        if tensorboard is not None:
            check_tensorboard()
        self._path = None if path is None else Path(path)
        self._folder = None if tensorboard is None else Path(tensorboard)
        self._every, self._seconds, self._left = every, seconds, left
        self._worker = worker or worker_name()
        self._sinks: list[Sink] | None = None
        self._batch, self._logged, self._read, self._length = -1, 0, -math.inf, 0
        self._loop: weakref.ref[Inversion] | None = None

    @property
    def _wanted(self) -> bool:
        return self._path is not None or self._folder is not None

    def open(self, missing: Sequence[int]) -> None:
        """The run starts, with these batches to do."""
        self._write([{**self._head("start"), "batches": len(missing)}])

    def iteration(self, batch: int, loop: Inversion) -> None:
        """Some iterations of the batch are done."""
        if batch != self._batch or loop.iteration < self._logged:
            self._batch, self._logged, self._read = batch, loop.resumed_at, -math.inf
        if not self._wanted or (not loop.done and time.monotonic() - self._read < self._seconds):
            return
        losses = loop.losses(self._logged)  # from here on the clock counts all that is done
        if self._left is not None:
            self._left.iteration(0 if self._loop else batch, loop.iteration, len(loop.indices))
        self._read, self._length = time.monotonic(), loop.config.iterations
        state = self._state(loop.model.device)
        last = loop.iteration if loop.done else self._length  # of a batch that converges an earlier one
        due = [t for t in range(self._logged + 1, loop.iteration + 1) if t % self._every == 0 or t == last]
        self._write(
            [
                {
                    **self._head("iteration", batch, t),
                    "kept": _fed(loop, t),
                    "losses": {name: _finite(values[t - 1 - self._logged]) for name, values in losses.items()},
                    **state,
                }
                for t in due
            ]
        )
        self._logged = loop.iteration

    def batch(self, batch: int, result: Result, seconds: float) -> None:
        """A batch is on disk, after so many seconds."""
        if not self._wanted:
            return
        if self._left is not None:
            self._left.batch(batch, seconds)
        done = len(next(iter(result.history.values())))
        self._length = self._length or done
        event = {**self._head("batch", batch, done), **batch_facts(result, seconds), "tries": result.tries}
        self._write([{**event, **self._state(None)}])

    def __call__(self, loop: Inversion) -> None:
        """`iteration` for `smi.invert`: its calls count as batches 0, 1, 2, ..."""
        if self._wanted and (self._loop is None or self._loop() is not loop):
            self._loop, self._left = weakref.ref(loop), TimeLeft.of(loop)
            self._batch, self._logged, self._read = self._batch + 1, loop.resumed_at, -math.inf
        self.iteration(self._batch, loop)

    def close(self) -> None:
        for sink in self._sinks or ():
            sink.close()
        self._sinks = None

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _head(self, event: str, batch: int | None = None, iteration: int = 0) -> Event:
        head: Event = {"event": event, "time": round(time.time(), 3), "worker": self._worker}
        if batch is not None:
            head |= {"step": batch * self._length + iteration, "batch": batch, "iteration": iteration}
        return head

    def _state(self, device: torch.device | None) -> Event:
        rate, left = (None, None) if self._left is None else (self._left.images_per_second, self._left.seconds)
        return {
            "images_per_second": None if rate is None else float(f"{rate:.4g}"),
            "peak_memory_bytes": peak_memory(device),
            "seconds_left": None if left is None else round(left, 1),
        }

    def _write(self, events: list[Event]) -> None:
        if self._sinks is None:
            self._sinks = []
            if self._path is not None:
                self._sinks.append(JsonLines(self._path))
            if self._folder is not None:
                self._sinks.append(TensorBoard(self._folder))
        for sink in self._sinks if events else ():
            sink.write(events)


class JsonLines:
    """Appends lines to a file that others may append to as well: each call is one write, of whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _mend(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, events: Sequence[Event]) -> None:
        data = "".join(f"{json.dumps(event, allow_nan=False)}\n" for event in events).encode()
        with writing(self._path, len(data)), _alone(self._file):
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)


class TensorBoard:
    """Scalars of events: ``loss/NAME``, ``run/QUANTITY`` and, of finished batches, ``batch/QUANTITY``."""

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        with writing(folder):
            self._writer: Any = SummaryWriter(str(folder))

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            for tag, value in _scalars(event):
                self._writer.add_scalar(tag, value, event["step"], walltime=event["time"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_log(path: str | Path) -> list[Event]:
    """The events of a log of JSON lines, in the order in which they were written.

    An unfinished last line, of a run that was killed or is writing now, is left out.

    Raises:
        SmiError: no such file, or a line before the last is no event.
    """
    events: list[Event] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                if line.strip() and line.endswith(b"\n"):
                    events.append(_event(line, number))
    except OSError as error:
        raise SmiError(f"cannot read the log {str(path)!r}: {reason(error)}.") from None
    except ValueError as error:
        raise SmiError(f"the log {str(path)!r} is damaged: {error}; remove that line.") from None
    return events


def check_tensorboard() -> None:
    """Raises `SmiError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SmiError(
            "TensorBoard is not installed: pip install 'sparse-model-inversion[logs]', or log JSON lines (--log FILE)."
        )


def batch_facts(result: Result, seconds: float) -> Event:
    """What a finished batch is known by: seconds, patches, agreement, losses of the final images."""
    return {
        "images": len(result.indices),
        "seconds": round(seconds, 3),
        "kept": result.keep.shape[1],
        "teacher_agreement": (result.logits.argmax(1) == result.targets).float().mean().item(),
        "losses": {name: _finite(values.mean().item()) for name, values in result.losses.items()},
    }


def worker_name() -> str:
    """Host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


def peak_memory(device: torch.device | None = None) -> int | None:
    """Bytes at the most so far: of tensors on a GPU, else resident; None where the system does not tell."""
    if device is None and torch.cuda.is_initialized():
        device = torch.device("cuda")
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fed(loop: Inversion, t: int) -> int:
    """Patches that iteration `t`, counted from 1, fed."""
    return min([k for at, k in loop.schedule.items() if at < t], default=loop.model.info.num_patches)


def _finite(value: float) -> float | None:
    """JSON knows no other numbers."""
    return value if math.isfinite(value) else None


def _mend(path: Path) -> None:
    """Blank out an unfinished last line."""
    if not path.is_file():
        raise SmiError(f"{str(path)!r} is not a plain file; choose another one for the log.")
    with open(path, "r+b") as file, _alone(file.fileno()):
        head = file.read(len(_BEGINS) + _LONGEST).lstrip()[: len(_BEGINS)]
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _LONGEST)
        file.seek(start)
        tail = file.read(size - start)
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if not _BEGINS.startswith(head) or torn == _LONGEST:
            raise SmiError(f"{str(path)!r} holds something that is not a log; choose another file.")
        if torn:
            file.seek(size - torn)
            file.write(b" " * torn)
            file.write(b"\n")
            file.flush()


@contextlib.contextmanager
def _alone(file: int) -> Iterator[None]:
    """Nobody else appends to the file or mends it meanwhile: half of a line in the making looks like a torn one."""
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
    try:
        yield
    finally:
        if locked:
            fcntl.flock(file, fcntl.LOCK_UN)


def _event(line: bytes, number: int) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError(f"line {number} is no event")
    return event


def _scalars(event: Event) -> Iterator[tuple[str, float]]:
    for name, value in {} if event["event"] == "start" else event.items():
        group = "batch" if event["event"] == "batch" else "run"
        if name == "losses":
            group = "batch/loss" if group == "batch" else "loss"
            yield from ((f"{group}/{term}", loss) for term, loss in value.items() if loss is not None)
        elif isinstance(value, (int, float)) and name not in ("time", "step", "batch", "iteration"):
            yield f"{group}/{name}", value
