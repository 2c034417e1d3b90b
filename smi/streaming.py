"""A pool of any size as a stream of images: each process and each worker reads its own part, from front to back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from smi.augment import ORDER
from smi.augment import stream as random_stream
from smi.dataset import Fill, make_item, open_filled
from smi.errors import SmiError
from smi.pool import Pool

Item = tuple[Tensor, Tensor, Tensor, Tensor]
_T = TypeVar("_T")
_RUN = 16  # images read in a row when they are shuffled


def stream(
    pool: Pool | str | Path,
    *,
    fill: Fill = "as-is",
    transform: Callable[..., Any] | None = None,
    shuffle: int = 0,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> PoolStream:
    """The images present in a pool of either form, see `PoolStream`."""
    return PoolStream(pool, fill=fill, transform=transform, shuffle=shuffle, seed=seed, part=part)


class PoolStream(IterableDataset[Item]):
    """The images present in a pool, each once in an epoch over all processes and workers, for a ``DataLoader``.

    Items are those of `smi.SyntheticDataset`. The images are divided into one stretch for each worker of each process;
    stretches differ by one image at most, so that processes may have to stop one step early together. Memory of a
    packed pool is that of one record, of the items in the buffer, and of 28 bytes of index for each image; of a folder
    of shards, one batch is mapped at a time.

    Args:
        pool: a pool or its folder, in either form.
        fill: what dropped patches show, see `smi.dataset.fill_dropped`.
        transform: as for `smi.SyntheticDataset`.
        shuffle: items in the shuffle buffer; 0 gives the images in order. Stretches of 16 images are read in random
            order, and each image then takes the place of a random one in the buffer.
        seed: of that order, together with the epoch and the part.
        part: (rank, processes); default that of ``torch.distributed`` where it is at work, else (0, 1).

    Raises:
        SmiError: the pool is empty or unusable, `fill` unknown, `shuffle` or `seed` negative, `part` impossible; a
            damaged record when it is reached.
    """

    def __init__(
        self,
        pool: Pool | str | Path,
        *,
        fill: Fill = "as-is",
        transform: Callable[..., Any] | None = None,
        shuffle: int = 0,
        seed: int = 0,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.pool = open_filled(pool, fill)
        self.fill, self.transform, self.shuffle, self.seed = fill, transform, shuffle, seed
        # Asked here, because a worker process has no process group.
        self.part = _where() if part is None else part
        self._epoch = 0
        rank, processes = self.part
        if not 0 <= rank < processes:
            raise SmiError(f"part is {self.part}; expected (0, {processes}) to ({processes - 1}, {processes}).")
        for name, value in (("shuffle", shuffle), ("seed", seed)):
            if value < 0:
                raise SmiError(f"{name} is {value}; expected 0 or more.")

    def __len__(self) -> int:
        """Images of this process."""
        return len(self._stretch(0, 1))

    def set_epoch(self, epoch: int) -> None:
        """Another order for the iterators made from now on. Persistent workers of a ``DataLoader`` do not see it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self._stretch(number, workers)
        draw = random_stream(self.seed, ORDER, self._epoch, self.part[0] * workers + number)
        items = self._items(mine, draw)
        return _shuffled(items, self.shuffle, draw) if self.shuffle else items

    def _stretch(self, worker: int, workers: int) -> range:
        """The images of one worker of this process."""
        rank, processes = self.part
        number, parts = rank * workers + worker, processes * workers
        return range(len(self.pool) * number // parts, len(self.pool) * (number + 1) // parts)

    def _items(self, mine: range, draw: np.random.Generator) -> Iterator[Item]:
        starts = np.arange(mine.start, mine.stop, _RUN if self.shuffle else max(len(mine), 1))
        if self.shuffle:
            draw.shuffle(starts)
        for start in starts.tolist():
            stop = min(start + _RUN, mine.stop) if self.shuffle else mine.stop
            for result, row in self.pool.rows(start, stop):
                yield make_item(result, row, self.pool, self.fill, self.transform)


def _shuffled(items: Iterable[_T], size: int, draw: np.random.Generator) -> Iterator[_T]:
    """Every item once; between reading and giving it, it waits among `size` others."""
    buffer: list[_T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draw.integers(size))
        given, buffer[place] = buffer[place], item
        yield given
    while buffer:
        place = int(draw.integers(len(buffer)))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


def _where() -> tuple[int, int]:
    at_work = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if at_work else (0, 1)
