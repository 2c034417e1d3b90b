"""Who is at work on a pool: one run, or several that share its batches; none disturbs another, none is waited for dead.

    POOL/workers/3f2a91c0.json    a run: host, process, since when; touched every few seconds while it lives
    POOL/workers/00012.claim      the batch that a run has in hand, with the run's name in it

A run is dead when its process is gone, on this host, or, on another, when its file was not touched for a while. Ages
are differences of times that the file system itself gave, so that no clock has to agree with another.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from smi.errors import SmiError
from smi.pool import writing

FOLDER = "workers"


@dataclass(frozen=True)
class Worker:
    """A run as its file tells of it; `process` tells it from a later process of the same number."""

    name: str
    host: str
    process: str
    together: bool
    since: float


class Workers:
    """This run among those on the pool at `path`; a context that announces it and takes its leave.

    Args:
        together: share the batches with other runs that do so too; otherwise be the only one.
        patience: seconds after which a run on another host that shows no life is dead.

    Raises:
        SmiError: on entry, if another run is at work and one of the two will not share.
    """

    def __init__(self, path: Path, *, together: bool = False, patience: float = 60.0) -> None:
        self._path, self._folder, self._patience, self._together = path, path / FOLDER, patience, together
        self.name = secrets.token_hex(4)
        self._mine = self._folder / f"{self.name}.json"
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="smi-worker")
        self._claimed: set[int] = set()

    def __enter__(self) -> Workers:
        me = self._announce()
        self._bury()
        for other in self.others():
            earlier = (other.since, other.name) < (me.since, me.name)
            if earlier and not (other.together and self._together):
                self._leave()
                raise SmiError(
                    f"another run is at work on {str(self._path)!r} (process {other.process.split('@')[0]} on "
                    f"{other.host}). Wait for it or stop it; runs of smi invert share work if all have --join."
                )
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._pulse.join()
        for batch in tuple(self._claimed):
            self.release(batch)
        self._bury()
        self._leave()

    def others(self) -> list[Worker]:
        """Runs that live, but for this one."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            worker = _read(file)
            if worker is not None and worker.name != self.name and self._lives(worker, file):
                found.append(worker)
        return found

    def _announce(self) -> Worker:
        with writing(self._folder):
            while True:
                self._folder.mkdir(parents=True, exist_ok=True)
                try:
                    self._mine.touch()
                    since = self._mine.stat().st_mtime
                    me = Worker(self.name, _host(), _process(os.getpid()), self._together, since)
                    self._mine.write_text(json.dumps(asdict(me)))
                    return me
                except FileNotFoundError:  # another that left took the folder, which was empty, with it
                    continue

    def _bury(self) -> None:
        """Remove the files of dead runs; nobody holds what they claimed."""
        for file in self._folder.glob("*.json"):
            worker = _read(file)
            if worker is not None and worker.name != self.name and not self._lives(worker, file):
                with contextlib.suppress(OSError):
                    os.unlink(file)

    def take(self, batch: int) -> bool:
        """Whether this run may make the batch: no living run has it in hand."""
        claim = self._claim(batch)
        with writing(self._folder):
            for _ in range(2):
                try:
                    with open(claim, "x") as file:
                        file.write(self.name)
                except FileExistsError:
                    if self._held(claim):
                        return False
                    with contextlib.suppress(FileNotFoundError):  # of the dead; of several that see it one moves it
                        os.rename(claim, claim.with_suffix(f".{self.name}"))
                        os.unlink(claim.with_suffix(f".{self.name}"))
                else:
                    self._claimed.add(batch)
                    return True
        return False

    def holds(self, batch: int) -> bool:
        """Whether the batch is still this run's; a run that slept through its time may have lost it."""
        try:
            return self._claim(batch).read_text() == self.name
        except OSError:
            return False

    def release(self, batch: int) -> None:
        if self.holds(batch):
            with contextlib.suppress(OSError):
                os.unlink(self._claim(batch))
        self._claimed.discard(batch)

    def _claim(self, batch: int) -> Path:
        return self._folder / f"{batch:05d}.claim"

    def _held(self, claim: Path) -> bool:
        try:
            name = claim.read_text()
        except OSError:
            return False  # released meanwhile
        if not name:  # made a moment ago
            return True
        file = self._folder / f"{name}.json"
        worker = _read(file)
        return worker is not None and self._lives(worker, file)

    def _lives(self, worker: Worker, file: Path) -> bool:
        if worker.host == _host():
            return worker.process == _process(int(worker.process.split("@")[0]))
        try:
            return self._now() - file.stat().st_mtime < self._patience
        except OSError:
            return False

    def _now(self) -> float:
        """The file system's time."""
        with writing(self._folder):
            try:
                os.utime(self._mine)
                return self._mine.stat().st_mtime
            except FileNotFoundError:  # this run slept so long that others took it for dead
                return self._announce().since

    def _beat(self) -> None:
        while not self._over.wait(self._patience / 6):
            with contextlib.suppress(OSError):
                os.utime(self._mine)

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._mine)
            os.rmdir(self._folder)  # only if this was the last


def _host() -> str:
    """Name of the host, and of its boot where the system tells: after a restart no process of before lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()


def _process(number: int) -> str:
    """``number@start``, or ``number@`` where the system does not tell starts, or nothing if there is none."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
        return f"{number}@{text.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return f"{number}@"


def _read(file: Path) -> Worker | None:
    try:
        return Worker(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
