"""What readers of files do with any bytes: an error of ours or none, never another, never a file outside the folder.

    python tests/fuzz.py manifest -max_total_time=60      # by atheris, guided by coverage: pip install atheris

``make fuzz`` runs every target for a while. tests/test_fuzz.py runs the same functions on damaged files by hypothesis.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pools import CONFIG, INFO, fill_pool
from torch import nn

import smi
from smi import logs, packed, tar, transfer
from smi.cli_words import parse_classes, parse_duration, parse_numbers, parse_setting, parse_shard
from smi.pool import Pool
from smi.pool_tools import verify
from smi.workers import Told, Workers


class Target:
    """A reader of one file, and that file as it should be.

    Attributes:
        good: bytes that are read without an error.
        read: reads other bytes in their place. Raises nothing but `smi.SmiError`.
    """

    def __init__(self, good: bytes, read: Callable[[bytes], None]) -> None:
        self.good, self._read = good, read

    def read(self, data: bytes) -> None:
        with contextlib.suppress(smi.SmiError):
            self._read(data)


def in_place(file: Path, read: Callable[[], Any]) -> Target:
    """`read` looks at `file`, which gets other bytes before."""

    def put(data: bytes) -> None:
        file.write_bytes(data)
        read()

    return Target(file.read_bytes(), put)


def config(folder: Path) -> Target:
    CONFIG.save(folder / "config.yaml")
    return in_place(folder / "config.yaml", lambda: smi.Config.load(folder / "config.yaml"))


def manifest(folder: Path) -> Target:
    pool = fill_pool(folder / "pool")
    return in_place(pool / "manifest.json", lambda: Pool(pool).load(0))


def shard(folder: Path) -> Target:
    pool = fill_pool(folder / "pool")

    def read() -> None:
        verify(pool)
        Pool(pool).load(0)

    return in_place(pool / "shards/00000.safetensors", read)


def _packed(folder: Path, name: str) -> Target:
    out = folder / "packed"
    smi.pack(fill_pool(folder / "pool"), out)

    def read() -> None:
        verify(out)
        smi.open_pool(out).load(0)

    return in_place(out / name, read)


def archive(folder: Path) -> Target:
    """Of a packed pool, whose index knows the hash of every record."""
    return _packed(folder, "shard-000000.tar")


def index(folder: Path) -> Target:
    return _packed(folder, packed.NAME)


def records(folder: Path) -> Target:
    """Of a tar file that no index vouches for."""
    out = folder / "packed"
    smi.pack(fill_pool(folder / "pool"), out)

    def read(data: bytes) -> None:
        with contextlib.suppress(ValueError):  # which its callers turn into a sentence
            list(tar.records(io.BytesIO(data)))

    return Target((out / "shard-000000.tar").read_bytes(), read)


def claim(folder: Path) -> Target:
    """What another run left: never an error, and the batch is to be had when its holder is gone."""
    pool = fill_pool(folder / "pool")
    with Workers(pool, together=True) as other:
        other.take(2)
        good = (pool / "workers" / f"{other.name}.json").read_bytes()

    def read(data: bytes) -> None:
        (pool / "workers").mkdir(exist_ok=True)
        (pool / "workers/0123abcd.json").write_bytes(data)
        (pool / "workers/00002.claim").write_bytes(data[:8])
        with Workers(pool, together=True) as mine:
            mine.take(2)
        shutil.rmtree(pool / "workers", ignore_errors=True)

    return Target(good, read)


def told(folder: Path) -> Target:
    """What another run tells of its pace, from which nothing but an estimate comes."""
    other, mine = Workers(folder, together=True), Workers(folder, together=True)
    other.__enter__(), mine.__enter__()
    other.tell(Told(2, 10.0, 4.0))

    def read() -> None:
        (heard,) = mine.told()
        assert heard is None or (heard.each > 0 and 0 <= heard.free < math.inf)

    return in_place(folder / "workers" / f"{other.name}.told", read)


def log(folder: Path) -> Target:
    """Of a run that was killed: whatever is refused stays as it is, and to all else lines can be added."""
    file = folder / "log"
    with logs.Log(file) as made:
        made.open([0, 1])
        made.open([1])

    def read() -> None:
        before = logs.read_log(file)
        with contextlib.closing(logs.JsonLines(file)) as sink:
            sink.write([{"event": "start"}])
        assert logs.read_log(file) == [*before, {"event": "start"}]

    return in_place(file, read)


def checkpoint(folder: Path) -> Target:
    """Of a student between two epochs."""
    student = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    identity = {"seed": 1}
    curve = [transfer.Epoch(0.5, 0.5, 0.5)]
    (folder / transfer._LAST).write_bytes(transfer._checkpoint(student, optimizer, curve, identity))
    fresh = torch.optim.AdamW(student.parameters())
    return in_place(folder / transfer._LAST, lambda: transfer._resume(folder, identity, student, fresh))


def quantization(folder: Path) -> Target:
    """What stands beside a quantized network; the network itself is not there."""
    good = (
        b'{"format": "smi-quantized", "format_version": 1, "weights": 4, "activations": 8, "model": {"name": "m"}, '
        b'"data": {"mean": [0.5], "std": [0.25], "input_size": [3, 8, 8]}}'
    )

    def read(data: bytes) -> None:
        (folder / "quantization.json").write_bytes(data)
        smi.load_quantized(folder)

    return Target(good, read)


def options(_: Path) -> Target:
    calls = (parse_duration, parse_shard, parse_setting, lambda t: parse_numbers("--x", t))

    def read(data: bytes) -> None:
        text = data.decode(errors="replace")
        for call in (*calls, lambda t: parse_setting(f"tv2={t}"), lambda t: parse_classes(t, INFO)):
            with contextlib.suppress(smi.SmiError):
                call(text)

    return Target(b"1h30m 1/4 tv2=0.5 0-3,7", read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    found.__name__: found
    for found in (config, manifest, shard, archive, index, records, claim, told, log, checkpoint, quantization, options)
}


@contextlib.contextmanager
def alone(name: str) -> Iterator[tuple[Target, Callable[[], None]]]:
    """The target in a folder of its own, and a check that nothing appeared outside of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "in", "side")
        folder.mkdir(parents=True)
        made = TARGETS[name](folder)

        def check() -> None:
            assert [p.name for p in Path(place).iterdir()] == ["in"], "a file outside of the folder"
            assert [p.name for p in Path(place, "in").iterdir()] == ["side"], "a file outside of the folder"

        yield made, check


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        print(*TARGETS)
        return
    import atheris

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"name one of {', '.join(TARGETS)}, then options of libFuzzer such as -max_total_time=60.")
    with alone(name) as (target, check), tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "good").write_bytes(target.good)

        def once(data: bytes) -> None:
            target.read(data)
            check()

        for module in [found for known, found in sys.modules.items() if known.split(".")[0] == "smi"]:
            for function in vars(module).values():
                if isinstance(function, types.FunctionType):
                    atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
