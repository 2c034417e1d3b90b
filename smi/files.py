"""Files that are whole or not there, whatever interrupts the writing, and files that are read whatever they hold."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Container, Iterator
from pathlib import Path

from smi.errors import SmiError

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

TEMP = re.compile(r"\.smi-tmp-[0-9a-f]{8}-.+")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Says in one line, as `SmiError`, why nothing could be written to `path`.

    Args:
        wanted: bytes that are about to be written, for the message of a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            problem = (
                f"the disk that holds {str(path)!r} is full{_room(path, wanted)}; free some space and run the same "
                f"command again."
            )
        else:
            reason = error.strerror or error
            problem = f"cannot write to {str(path)!r}: {reason}; choose a folder that you may write to."
        raise SmiError(problem) from error


def _room(path: Path, wanted: int | None) -> str:
    if wanted is None:
        return ""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("."))
    try:
        free = f", and {shutil.disk_usage(there).free / 1e6:.1f} MB are free"
    except OSError:
        free = ""
    return f": {max(wanted, 50_000) / 1e6:.1f} MB are wanted{free}"


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` is, at any moment, what it was or all of `data`."""
    with atomic_file(path) as temp, open(temp, "xb") as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path`, safely on the disk, if the context is left without error."""
    temp = path.with_name(f".smi-tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temp
        with open(temp, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise


def remove_temps(folder: Path, older: float = 0.0) -> None:
    """Remove what `atomic_write` left in `folder` when it was killed.

    Args:
        older: seconds since they were touched, where another process may be writing there.
    """
    for name in os.listdir(folder) if folder.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):
            if TEMP.fullmatch(name) and (not older or time.time() - os.lstat(folder / name).st_mtime > older):
                os.unlink(folder / name)


def check_own(folder: Path, what: str, marks: Container[str]) -> None:
    """Raises `SmiError` where `folder` holds files and none named in `marks`: they are somebody's, and no `what`."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # of which the writing will tell
        names = sorted(name for name in os.listdir(folder) if not TEMP.fullmatch(name))
        if names and not any(name in marks for name in names):
            raise SmiError(f"{str(folder)!r} holds {names[0]!r} and no {what}; choose another folder.")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable where the file system can; where it cannot, its files are whole all the same."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put_folder(temp: Path, out: Path, *, replace: bool = True) -> None:
    """Rename `temp` to `out`; what was there goes only when the new one is in its place, and then if `replace`.

    Raises:
        SmiError: there is a folder by now that is not to be replaced.
    """
    if not replace:
        try:
            os.rename(temp, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise SmiError(f"{str(out)!r} was made by another run meanwhile; choose another folder.") from None
    elif out.exists():
        old = out.with_name(f".{out.name}.smi-old-{secrets.token_hex(4)}")
        os.rename(out, old)
        try:
            os.rename(temp, out)
        except BaseException:
            os.rename(old, out)
            raise
    else:
        os.rename(temp, out)
    _remove_beside(out, "old")


@contextlib.contextmanager
def temp_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to fill for `put_folder`, after those that killed runs left there are removed."""
    _remove_beside(out, "tmp")
    temp = out.with_name(f".{out.name}.smi-tmp-{secrets.token_hex(4)}")
    os.makedirs(temp)
    try:
        with _locked(temp):
            yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _remove_beside(out: Path, kind: str) -> None:
    stale = re.compile(re.escape(f".{out.name}.smi-{kind}") + "(-[0-9a-f]{8})?")
    for name in os.listdir(out.parent) if out.parent.is_dir() else []:
        if stale.fullmatch(name):
            with _locked(out.parent / name) as free, contextlib.suppress(FileNotFoundError):
                if free:
                    shutil.rmtree(out.parent / name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether nobody else fills the folder, which is this process's for the while, where the system has such locks."""
    free, handle = True, -1
    try:
        with contextlib.suppress(OSError):  # some network file systems have none
            handle = os.open(folder, os.O_RDONLY)
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
        yield free
    finally:
        if handle >= 0:
            os.close(handle)


def read_bytes(file: Path, most: int) -> bytes:
    """What the plain file holds.

    Raises:
        OSError: it cannot be read, or is none: a pipe or a device would be waited for, or never end.
        ValueError: it has more than `most` bytes.
    """
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(file))
        with open(handle, "rb", closefd=False) as opened:
            data = opened.read(most + 1)
    finally:
        os.close(handle)
    if len(data) > most:
        raise ValueError(f"it is larger than {most / 1e6:g} MB")
    return data


def check_inside(folder: Path, file: Path) -> None:
    """Raises `OSError` where a part of `file` below `folder` is a link, which may lead anywhere, or no plain file."""
    parts = file.relative_to(folder).parts
    for depth in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:depth])
        mode = os.lstat(place).st_mode
        if not (stat.S_ISREG(mode) if depth == len(parts) else stat.S_ISDIR(mode)):
            kind = "link" if stat.S_ISLNK(mode) else "file" if stat.S_ISREG(mode) else "thing of another kind"
            wanted = "plain file" if depth == len(parts) else "folder"
            raise OSError(errno.EINVAL, f"{place.name} is a {kind}, expected a {wanted}", str(place))
