"""Samples in tar files, in WebDataset's convention: members ``KEY.EXT`` that lie together are one sample.

The convention is that of https://github.com/webdataset/webdataset; the format is POSIX.1-1988 ``ustar``, of which only
plain files without a folder in their name are written and accepted: nothing is ever unpacked to a disk, and a link, a
device, a name that leaves its folder or an extension of the format is refused where it stands.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_RECORD = 2**28  # bytes; more than any image needs, and all that a reader ever takes into memory
_NAME = re.compile(r"([0-9]{8,12})\.([a-z]{1,16})")


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard.

    Attributes:
        key: what its members share, digits.
        offset, length: bytes in the shard, headers and padding included.
        sha256: of those bytes.
        members: what follows the dot of each member -> its bytes.
    """

    key: str
    offset: int
    length: int
    sha256: bytes
    members: dict[str, bytes]


def encode_record(key: str, members: Mapping[str, bytes]) -> bytes:
    """The members of a sample as part of a tar file, in order of name; the same members give the same bytes.

    Raises:
        ValueError: the name of a member that could not be read again, or more than `MAX_RECORD` bytes.
    """
    parts = []
    for kind, data in sorted(members.items()):
        if not _NAME.fullmatch(f"{key}.{kind}"):
            raise ValueError(f"{f'{key}.{kind}'!r} is no name of a member")
        header = tarfile.TarInfo(f"{key}.{kind}")
        header.size = len(data)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]
    record = b"".join(parts)
    if len(record) > MAX_RECORD:
        raise ValueError(f"image {key} takes {len(record)} bytes, more than {MAX_RECORD}")
    return record


def records(file: BinaryIO) -> Iterator[Record]:
    """The samples from where `file` stands to the end of the archive, or to that of the file; one in memory at a time.

    Raises:
        ValueError: anything but plain files named as above, keys that do not ascend, a member twice, a checksum that
            is wrong, a size that is not there or above `MAX_RECORD`, bytes after the end of the archive.
    """
    key, members, digest, offset, place = "", dict[str, bytes](), hashlib.sha256(), 0, 0
    while header := _header(file):
        name, kind = _name(header)
        if name != key:
            if key and int(name) <= int(key):
                raise ValueError(f"sample {name} follows sample {key}: double, or out of order")
            if members:
                yield Record(key, offset, place - offset, digest.digest(), members)
            key, members, digest, offset = name, {}, hashlib.sha256(), place
        if kind in members:
            raise ValueError(f"member {header.name!r} is there twice")
        padded = -(-header.size // BLOCK) * BLOCK
        if header.size < 0 or place + BLOCK + padded - offset > MAX_RECORD:
            raise ValueError(f"member {header.name!r} declares {header.size} bytes")
        data = file.read(padded)
        if len(data) < padded:
            raise ValueError(f"member {header.name!r} is cut off")
        digest.update(header.raw)
        digest.update(data)
        members[kind] = data[: header.size]
        place += BLOCK + padded
    if members:
        yield Record(key, offset, place - offset, digest.digest(), members)


class _Header(tarfile.TarInfo):
    raw: bytes


def _header(file: BinaryIO) -> _Header | None:
    """The next one; None at the end of the archive, behind which nothing may follow, or of the file."""
    block = file.read(BLOCK)
    if not block:
        return None
    if block.count(0) == BLOCK:
        # A tar file is a number of blocks, of which programs fill up the last twenty.
        rest = file.read(20 * BLOCK)
        if rest.count(0) != len(rest) or file.read(1):
            raise ValueError("something follows the end of the archive")
        return None
    try:
        header = _Header.frombuf(block, "ascii", "strict")
    except tarfile.TarError as error:
        raise ValueError(f"a header is damaged: {error}") from None
    header.raw = block
    return header


def _name(header: _Header) -> tuple[str, str]:
    """Key and kind of a member."""
    match = _NAME.fullmatch(header.name)
    if header.type != tarfile.REGTYPE or match is None or header.linkname:
        raise ValueError(f"member {header.name[:80]!r} is not a plain file named like 00000000.png")
    return match[1], match[2]
