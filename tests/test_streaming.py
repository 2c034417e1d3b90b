"""Streams of pools: each image once over all processes and workers, in bounded memory, shuffled the same each time."""

from __future__ import annotations

import dataclasses
import gc
import json
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import fill_pool, make_result, open_writer
from torch import Tensor
from torch.utils.data import DataLoader

import smi
from smi.index import IndexWriter
from smi.packed import facts, members_of, pack
from smi.streaming import _shuffled
from smi.tar import END, encode_record

pytest.importorskip("pyarrow")
IMAGES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "pool"
    writer = open_writer(path, plan=smi.WorkPlan(tuple(i % 4 for i in range(IMAGES)), 50))
    for batch in writer.missing:
        writer.write(batch, make_result(batch, plan=writer.plan))
    return path


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(folder, tmp_path_factory.mktemp("stream") / "packed", shard_images=77).path


@pytest.fixture(params=["folder", "packed"])
def pool(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def numbers_in(items: list[tuple[Tensor, ...]], data: smi.SyntheticDataset) -> list[int]:
    """Which images of `data` the items are, by their pixels."""
    known = {data[i][0].numpy().tobytes(): i for i in range(len(data))}
    return [known[item[0].numpy().tobytes()] for item in items]


@pytest.fixture(scope="module")
def data(folder: Path) -> smi.SyntheticDataset:
    return smi.SyntheticDataset(folder)


def test_in_order_it_is_the_dataset(pool: Path, folder: Path) -> None:
    expected = smi.SyntheticDataset(folder, fill="noise")
    items = list(smi.stream(pool, fill="noise"))
    assert len(items) == IMAGES
    for i in (0, 49, 50, 77, 299):
        assert all(torch.equal(a, b) for a, b in zip(items[i], expected[i], strict=True))


@pytest.mark.parametrize("shuffle", [0, 32])
@pytest.mark.parametrize("processes", [1, 3, 7])
def test_every_image_once_over_all_processes(
    pool: Path, data: smi.SyntheticDataset, shuffle: int, processes: int
) -> None:
    parts = [smi.stream(pool, shuffle=shuffle, part=(rank, processes)) for rank in range(processes)]
    found = [numbers_in(list(part), data) for part in parts]
    assert sorted(number for part in found for number in part) == list(range(IMAGES))
    assert [len(part) for part in found] == [len(part) for part in parts]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert ([number for part in found for number in part] == list(range(IMAGES))) is (shuffle == 0)


def test_every_image_once_over_all_workers(packed: Path, data: smi.SyntheticDataset) -> None:
    found = []
    for rank in range(2):
        loader = DataLoader(smi.stream(packed, shuffle=8, part=(rank, 2)), batch_size=None, num_workers=2)
        found += numbers_in(list(loader), data)
    assert sorted(found) == list(range(IMAGES))


def test_the_order_is_of_seed_epoch_and_part(pool: Path, data: smi.SyntheticDataset) -> None:
    stream = smi.stream(pool, shuffle=50, seed=3)
    first, again = (numbers_in(list(stream), data) for _ in range(2))
    assert first == again
    stream.set_epoch(1)
    assert numbers_in(list(stream), data) != first
    assert numbers_in(list(smi.stream(pool, shuffle=50, seed=4)), data) != first
    # Uniform enough: images of the first and of the second half are found in both halves.
    assert 0.25 < np.mean(np.array(first[: IMAGES // 2]) < IMAGES // 2) < 0.75


@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_buffer_gives_each_item_once_and_is_never_exceeded(size: int) -> None:
    taken = 0

    def items() -> object:
        nonlocal taken
        while taken < 50:
            taken += 1
            yield taken

    given = []
    for item in _shuffled(items(), size, np.random.default_rng(0)):  # type: ignore[arg-type]
        given.append(item)
        assert taken - len(given) <= size
    assert sorted(given) == list(range(1, 51))


def synthetic(folder: Path, images: int) -> Path:
    """`images` images in a packed pool, whose tar file repeats a few hundred bytes of record under as many keys."""
    made = smi.open_pool(fill_pool(folder / "source"))
    small = pack(made, folder / "packed", shard_images=images)
    said = json.loads((folder / "packed" / "packed.json").read_text())
    said["plan"] = {"targets": [0] * images, "batch_size": 1}
    (folder / "packed" / "packed.json").write_text(json.dumps(said))
    one = next(small.rows(0, 1))[0]
    offset = 0
    with open(small.path / "shard-000000.tar", "wb") as shard, IndexWriter(small.path / "index.parquet") as index:
        for number in range(images):
            same = dataclasses.replace(one, indices=torch.tensor([number]))
            record = encode_record(f"{number:08d}", members_of(same, made, "float32"))
            shard.write(record)
            place = {"shard": 0, "key": f"{number:08d}", "offset": offset, "length": len(record), "sha256": bytes(32)}
            index.add(place | facts(same, made))
            offset += len(record)
        shard.write(END)
    return small.path


def test_memory_is_that_of_the_buffer(tmp_path: Path) -> None:
    """As many bytes and as many living images with 400 as with 40, though ten times as many pass through."""
    peaks, most = [], []
    for images in (40, 400):
        path = synthetic(tmp_path / str(images), images)
        read = (path / "shard-000000.tar").stat().st_size
        stream = smi.stream(path, shuffle=16)
        for _ in zip(stream, range(20), strict=False):  # what is imported and cached at first use
            pass
        gc.collect()
        living: weakref.WeakSet[Tensor] = weakref.WeakSet()
        count, highest = 0, 0
        tracemalloc.start()
        for image, *_ in stream:
            living.add(image)
            count, highest = count + 1, max(highest, len(living))
            del image
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == images
        most.append(highest)
    assert max(most) <= 17
    assert peaks[1] < peaks[0] + 100_000 < read / 10


def test_what_cannot_be_streamed_is_said(packed: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ({"part": (2, 2)}, r"part is \(2, 2\); expected \(0, 2\) to \(1, 2\)"),
        ({"shuffle": -1}, "shuffle is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"fill": "blakc"}, "Did you mean 'black'"),
    ):
        with pytest.raises(smi.SmiError, match=said):
            smi.stream(packed, **arguments)  # type: ignore[arg-type]
    open_writer(tmp_path)
    with pytest.raises(smi.SmiError, match="no finished batch"):
        smi.stream(tmp_path)
