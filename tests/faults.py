"""Faults at every call to the file system: the process is killed there, or the disk is full from there on."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "open", "utime", "listdir")


class Counted:
    """Lets `after` calls to the file system through; in the place of each later one `fault` is called.

    Only calls on paths below `folder` count, and those on open files. Of what was written before a call of fsync half
    is cut off, should that be the one.
    """

    def __init__(self, folder: Path, after: int, fault: Callable[[], None], calls: tuple[str, ...] = _CALLS) -> None:
        self.left, self.hit, self._folder, self._fault = after, False, str(folder), fault
        for name in calls:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        builtins.open = self._wrapped("open", builtins.open)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and len(args) > 1 and (args[1] == os.O_RDONLY or args[1] in ("r", "rb"))
            ours = name == "fsync" or str(args[0]).startswith(self._folder)
            if ours and not reads:
                if self.left == 0:
                    self.hit = True
                    if name == "fsync":
                        os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                    self._fault()
                else:
                    self.left -= 1
            return None if name == "fsync" else call(*args, **kwargs)  # slow, and a kill is no loss of power

        return counted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_process(act: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> int:
    """Exit code of a process that does `act`, or minus the number of the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(60)
        prepare()
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_everywhere(folder: Path, act: Callable[[], Any], step: int = 1) -> Iterator[int]:
    """Does `act` in process after process, each killed `step` calls later, until one gets through."""
    for after in range(0, 2000, step):
        code = in_process(act, lambda after=after: Counted(folder, after, kill))  # type: ignore[misc]
        if code == 0:
            return
        assert code == -signal.SIGKILL, f"ended with {code} at call {after}"
        yield after
    raise AssertionError("never got through")
