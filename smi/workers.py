"""Who is at work on a pool: one run, or several that share its batches; none disturbs another, none is waited for dead.

    POOL/workers/3f2a91c0.json    a run: host, process, its turn; touched every few seconds while it lives
    POOL/workers/3f2a91c0.name    the run's name, of which every claim is a link, so that no claim is ever half-made
    POOL/workers/00012.claim      the batch that a run has in hand, with the run's name in it
    POOL/workers/00012.3f2a91c0   who of all that saw this run dead, with that claim, takes it over, for a moment
    POOL/workers/swept            when the files of dead runs were looked for last, where runs are many
    POOL/workers/3f2a91c0.told    how fast a run is, for estimates of the time left; nothing depends on it

A run is dead when its process is gone, on this host, or, on another, when its file was not touched for a while. Ages
are differences of times that the file system itself gave, so that no clock has to agree with another; where a clock is
set back, one's own count of seconds without a sign of life decides. Turns are taken as in Lamport's bakery (CACM 17,
1974), so that of two runs that begin together one sees the other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from smi.errors import SmiError
from smi.files import atomic_write, read_bytes, remove_temps, writing

FOLDER = "workers"
_NAME = re.compile(r"[0-9a-f]{8}")
_PROCESS = re.compile(r"\d{1,10}@\d{0,20}", re.ASCII)
_MANY = 20  # runs, from which on not each sweeps the folder as it comes and goes
_SWEPT = "swept"  # file whose time says when the last did
_CLAIM = re.compile(r"\d{5,}\.claim")
_NEAR = 2  # so many free batches for each that is in hand are near: runs stay together, and seldom want the same
_TRIES = 4  # batches that a run tries to claim before it looks anew
_LOOK_AGAIN = 2.0  # seconds, while all that is left is in other runs' hands; more where runs are many
_HEIR = re.compile(r"\d{5,}\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Worker:
    """A run as its file tells of it; `process` tells it from a later process of the same number.

    `since` is the number of its turn, about the time when it began, and None while it looks for one.
    """

    name: str
    host: str
    process: str
    together: bool
    since: float | None


class Told(NamedTuple):
    """What a run tells those that share its pool: its batch, seconds of a whole one, and seconds until it is free."""

    batch: int
    each: float
    free: float


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
        self._token = self._folder / f"{self.name}.name"
        self._told = self._folder / f"{self.name}.told"
        self._seen: dict[str, tuple[float, float]] = {}  # name -> time of its file, and when that was seen first
        self._host, self._clock, self._random = _host(), time.monotonic, random.Random(self.name)
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="smi-worker")
        self._claimed: set[int] = set()

    def __enter__(self) -> Workers:
        mine = self._announce()
        self._bury()
        others = self.others()
        while any(other.since is None for other in others):
            time.sleep(0.01)
            others = self.others()
        for other in others:
            earlier = other.since is not None and (other.since, other.name) < (mine, self.name)
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
        found, now = [], functools.cache(self._now)
        for file in sorted(self._folder.glob("*.json")):
            worker = _read(file)
            if worker is not None and worker.name != self.name and self._lives(worker, file, now):
                found.append(worker)
        return found

    def tell(self, mine: Told) -> None:
        """Let the others know how fast this run is; where it cannot be written they do without."""
        with contextlib.suppress(OSError):
            atomic_write(self._told, json.dumps(mine).encode())

    def told(self) -> list[Told | None]:
        """What the others have told, as of now; None for those that have not."""
        return [self._heard(self._folder / f"{other.name}.told") for other in self.others()]

    def _heard(self, file: Path) -> Told | None:
        try:
            batch, each, free = json.loads(read_bytes(file, 4096))
            ago = max(0.0, self._now() - file.stat().st_mtime)
            told = Told(int(batch), float(each), max(0.0, float(free) - ago))
        except (OSError, ValueError, TypeError, RecursionError, OverflowError):
            return None
        return told if math.isfinite(told.free) and 0 < told.each < math.inf else None

    def _announce(self) -> float:
        """Be seen, then take a turn later than all that are seen. Returns the turn."""
        me = Worker(self.name, self._host, _process(os.getpid()), self._together, None)
        with writing(self._folder):
            while True:
                self._folder.mkdir(parents=True, exist_ok=True)
                try:
                    atomic_write(self._token, self.name.encode())
                    atomic_write(self._mine, json.dumps(asdict(me)).encode())
                    turns = [other.since for other in self.others() if other.since is not None]
                    last = max([self._mine.stat().st_mtime, *turns])
                    mine = math.nextafter(last, math.inf)
                    atomic_write(self._mine, json.dumps(asdict(replace(me, since=mine))).encode())
                    return mine
                except FileNotFoundError:  # another that left took the folder, which was empty, with it
                    continue

    def _bury(self) -> None:
        """Remove the files of dead runs; nobody holds what they claimed. Where runs are many, not each time."""
        if not self._due():
            return
        with contextlib.suppress(FileNotFoundError):
            remove_temps(self._folder, older=self._patience)
        runs: dict[Path, list[Path]] = {}
        now = functools.cache(self._now)
        for file in self._folder.glob("*"):
            if file.suffix in (".json", ".name", ".told"):
                runs.setdefault(file.with_suffix(".json"), []).append(file)
        for told, files in runs.items():
            for file in () if self._stays(told, files[0], now) else files:
                with contextlib.suppress(OSError):
                    os.unlink(file)

    def _due(self) -> bool:
        """Whether to look through the files of all runs: among many, where nobody did a moment ago."""
        if sum(name.endswith(".json") for name in self._names()) <= _MANY:
            return True
        swept = self._folder / _SWEPT
        with contextlib.suppress(OSError):
            if abs(self._now() - swept.stat().st_mtime) < self._patience / 2:
                return False
        with contextlib.suppress(OSError):
            swept.touch()
            self._touch(swept)
        return True

    def _stays(self, told: Path, file: Path, now: Callable[[], float]) -> bool:
        """Whether `file` belongs to a run that lives, or may be about to begin; `told` says which it is, if there."""
        worker = _read(told)
        if worker is None:
            return self._young(file, now)
        return worker.name == self.name or self._lives(worker, told, now)

    def _young(self, file: Path, now: Callable[[], float]) -> bool:
        """Whether an unfinished file may yet be finished."""
        try:
            return abs(now() - file.stat().st_mtime) < self._patience
        except OSError:
            return False

    def pick(self, missing: Sequence[int], made: Callable[[int], bool]) -> int | None:
        """One of the missing batches for this run to make, or None if others have all of them in hand.

        Of many runs each looks at a few claims alone, drawn at random: those of the dead come last, when no batch is
        free any more, and what a look costs does not grow with the runs.

        Args:
            made: whether a batch has been made by now.
        """
        left = list(missing)
        while left:
            claimed = self._claims()
            free = [batch for batch in left if batch not in claimed]
            tried = free[: _NEAR * (len(claimed) + 1)] or left
            for batch in self._random.sample(tried, min(_TRIES, len(tried))):
                if self.take(batch):
                    if not made(batch):
                        return batch
                    self.release(batch)
                    left.remove(batch)
            if not free:
                return None
        return None

    def wait(self) -> float:
        """Seconds before it is worth while to look again, should `pick` have found none."""
        among = sum(name.endswith(".json") for name in self._names())
        return min(_LOOK_AGAIN * (1 + among / 10), self._patience / 2) * self._random.uniform(0.75, 1.25)

    def _claims(self) -> set[int]:
        """Batches that somebody claims, living or dead."""
        return {int(name[:-6]) for name in self._names() if _CLAIM.fullmatch(name)}

    def _names(self) -> list[str]:
        with writing(self._folder), contextlib.suppress(FileNotFoundError):
            return os.listdir(self._folder)
        return []

    def take(self, batch: int) -> bool:
        """Whether this run may make the batch: no living run has it in hand."""
        claim = self._claim(batch)
        with writing(self._folder):
            if not self._seize(claim):
                return False
        self._claimed.add(batch)
        return True

    def _seize(self, claim: Path) -> bool:
        """Write this run's name into a claim, if no living run's is in it.

        What the dead left is replaced, never removed, and by one run alone, the one whose name is in the heir's file,
        which is claimed likewise. For between a look at a claim and the deed another may have put its own name there.
        """
        try:
            self._link(claim)
            return True
        except FileExistsError:
            dead = _holder(claim)
        if self._held(claim):
            return False
        heir = claim.with_suffix(f".{dead or '00000000'}")
        if not self._seize(heir):
            return False
        with contextlib.suppress(FileNotFoundError):  # swept away by the last of all that it knew of
            if claim.exists() and _holder(claim) == dead:
                os.replace(heir, claim)
                return True
            os.unlink(heir)  # another was through with it
        return False

    def _link(self, claim: Path) -> None:
        try:
            os.link(self._token, claim)
        except FileExistsError:
            raise
        except FileNotFoundError:  # this run slept so long that others took it for dead
            self._announce()
            os.link(self._token, claim)
        except OSError as error:  # no links here; what a kill leaves half-made is held until it is old
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            with open(claim, "x") as file:
                file.write(self.name)

    def holds(self, batch: int) -> bool:
        """Whether the batch is still this run's; a run that slept through its time may have lost it."""
        return _holder(self._claim(batch)) == self.name

    def release(self, batch: int) -> None:
        if self.holds(batch):
            with contextlib.suppress(OSError):
                os.unlink(self._claim(batch))
        self._claimed.discard(batch)

    def _claim(self, batch: int) -> Path:
        return self._folder / f"{batch:05d}.claim"

    def _held(self, claim: Path) -> bool:
        name = _holder(claim)
        if name == "":  # made a moment ago
            return self._young(claim, self._now)
        if name is None:  # released meanwhile, or none of ours
            return False
        file = self._folder / f"{name}.json"
        worker = _read(file)
        return worker is not None and self._lives(worker, file, self._now)

    def _lives(self, worker: Worker, file: Path, now: Callable[[], float]) -> bool:
        if worker.host == self._host:
            return worker.process == _process(int(worker.process.split("@")[0]))
        try:
            touched = file.stat().st_mtime
        except OSError:
            return False
        if self._seen.get(worker.name, (None, 0.0))[0] != touched:
            self._seen[worker.name] = touched, self._clock()
        silent = self._clock() - self._seen[worker.name][1]
        return now() - touched < self._patience and silent < self._patience

    def _now(self) -> float:
        """The file system's time."""
        with writing(self._folder):
            try:
                self._touch(self._mine)
            except FileNotFoundError:  # this run slept so long that others took it for dead
                self._announce()
            return self._mine.stat().st_mtime

    def _touch(self, file: Path) -> None:
        os.utime(file)

    def _beat(self) -> None:
        while not self._over.wait(self._patience / 6):
            with contextlib.suppress(OSError):
                self._touch(self._mine)

    def _leave(self) -> None:
        with contextlib.suppress(OSError, SmiError):
            if self._due() and not self.others():  # claims that are left are the dead's, of batches that they finished
                for file in self._folder.glob("*"):
                    if (_CLAIM.fullmatch(file.name) or _HEIR.fullmatch(file.name)) and not self._held(file):
                        os.unlink(file)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._folder / _SWEPT)
        for file in (self._told, self._token, self._mine):
            with contextlib.suppress(OSError):
                os.unlink(file)
        with contextlib.suppress(OSError):
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
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        # The killed stay in the table until their parent asks for them, which in a container may be never.
        return "" if state[0] in "ZX" else f"{number}@{state[19]}"
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
    """The run that the file tells of, or None for a file that tells of none."""
    try:
        worker = Worker(**json.loads(read_bytes(file, 4096)))
        told = [worker.name, worker.host, worker.process, worker.together]
        if list(map(type, told)) != [str, str, str, bool] or f"{worker.name}.json" != file.name:
            return None
        if not _NAME.fullmatch(worker.name) or not _PROCESS.fullmatch(worker.process):
            return None
        if worker.since is not None and not (type(worker.since) in (int, float) and math.isfinite(worker.since)):
            return None
    except (OSError, ValueError, TypeError, RecursionError, OverflowError):
        return None
    return worker


def _holder(claim: Path) -> str | None:
    """The name in a claim, nothing if it is not there yet, or None for no claim."""
    try:
        name = read_bytes(claim, 64).decode()
    except (OSError, ValueError):
        return None
    return name if not name or _NAME.fullmatch(name) else None
