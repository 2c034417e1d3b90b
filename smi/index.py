"""The index of a packed pool: a Parquet file with a row for each image, by which one is read without a search.

| column | | |
|---|---|---|
| key | string | name of the sample in its tar file |
| index | int64 | image number in the work plan, ascending |
| shard | int32 | n, for ``shard-<n as six digits>.tar`` |
| offset, length | int64 | where its bytes lie there, headers and padding included |
| class | int32 | target |
| label | string | readable name of the class |
| seed | int64 | that it was inverted from |
| kept | float32 | share of patches that were kept |
| agreement | bool | whether the teacher's first choice is the target |
| confidence | float32 | the teacher's softmax of the target |
| tries | int32 | seeds that its batch took |
| sha256 | 32 bytes | of those bytes in the tar file |
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smi.errors import SmiError, reason
from smi.shard import DAMAGE
from smi.tar import BLOCK, MAX_RECORD

NAME = "index.parquet"
_GROUP = 65536  # rows of a row group
_ROW = 4096  # bytes that a row may take
_TYPES = {
    "key": "string",
    "index": "int64",
    "shard": "int32",
    "offset": "int64",
    "length": "int64",
    "class": "int32",
    "label": "string",
    "seed": "int64",
    "kept": "float32",
    "agreement": "bool_",
    "confidence": "float32",
    "tries": "int32",
    "sha256": "binary",
}
_PLACE = ("index", "shard", "offset", "length")


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


class IndexWriter:
    """Writes the rows it is given to `path`, which a context leaves whole; memory is that of one row group."""

    def __init__(self, path: Path) -> None:
        pyarrow, parquet = _pyarrow()
        self._schema = _schema(pyarrow)
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd", write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """A value for each column."""
        self._rows.append(row)
        if len(self._rows) == _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            pyarrow, _ = _pyarrow()
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


class Index:
    """Where the images of a packed pool lie: four columns, 28 bytes for each image, and no Python object for any.

    Args:
        path: the Parquet file; the tar files lie beside it.
        images: how many the work plan has.

    Attributes:
        numbers: (images,) int64 image numbers, ascending.
        shards: (images,) int32.
        offsets, lengths: (images,) int64.

    Raises:
        SmiError: no pyarrow; no such file, damaged, of another form, or it points outside of a shard or of the plan.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        with self._reading() as file:
            self.numbers, self.shards, self.offsets, self.lengths = self._read(file, images)
            self._check(images)

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> NDArray[Any]:
        """(images,) values of a column of numbers. Raises `SmiError` if it is damaged."""
        with self._reading() as file:
            return np.asarray(file.read(columns=[name], use_threads=False)[name].to_numpy())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row with all its columns, in order. Raises `SmiError` where a page is damaged."""
        with self._reading() as file:
            for batch in file.iter_batches(1024, use_threads=False):
                yield from batch.to_pylist()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        """The file, and one sentence for whatever is wrong with it."""
        pyarrow, parquet = _pyarrow()
        try:
            regular_size(self.path)
            with parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                yield file
        except SmiError:
            raise
        except (*DAMAGE, MemoryError, pyarrow.lib.ArrowException) as error:
            raise SmiError(
                f"the index {str(self.path)!r} is damaged ({reason(error)}); restore it from a copy, or pack the pool "
                f"again."
            ) from None

    @staticmethod
    def _read(file: Any, images: int) -> list[NDArray[Any]]:
        pyarrow, _ = _pyarrow()
        wanted, found, rows = _schema(pyarrow), file.schema_arrow, file.metadata.num_rows
        if not found.equals(wanted):
            raise ValueError(f"its columns are {', '.join(found.names)[:200]}, or of other types than expected")
        if not 0 < rows <= images:
            raise ValueError(f"it has {rows} rows for {images} planned images")
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        if sum(group.total_byte_size for group in groups) > _ROW * rows + _GROUP:
            raise ValueError("it unpacks to more than an index can have")
        table = file.read(columns=list(_PLACE), use_threads=False)
        if len(table) != rows or any(table[name].null_count for name in _PLACE):
            raise ValueError("it has empty cells")
        return [table[name].to_numpy() for name in _PLACE]

    def _check(self, images: int) -> None:
        numbers, shards, offsets, lengths = self.numbers, self.shards, self.offsets, self.lengths
        if numbers[0] < 0 or numbers[-1] >= images or (np.diff(numbers) <= 0).any():
            raise ValueError(f"its image numbers do not ascend within 0 to {images - 1}")
        if shards[0] != 0 or not np.isin(np.diff(shards), (0, 1)).all():
            raise ValueError("its shards are not counted from 0")
        if (offsets < 0).any() or (lengths <= 0).any() or (lengths > MAX_RECORD).any():
            raise ValueError("it has places that no image can have")
        if (offsets % BLOCK).any() or (lengths % BLOCK).any():
            raise ValueError("it has places that are not whole blocks")
        first = np.flatnonzero(np.diff(shards, prepend=-1))
        ends = np.maximum.reduceat(offsets + lengths, first)
        for shard, end in enumerate(ends.tolist()):
            file = self.path.with_name(shard_name(shard))
            size = regular_size(file)
            if end > size:
                raise ValueError(f"it points to byte {end} of {file.name}, which has {size}: one of the two is cut off")


def regular_size(file: Path) -> int:
    """Its bytes. Raises `ValueError` for what would hang or never end, such as a pipe or a device."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is not a file")
    return status.st_size


def _schema(pyarrow: ModuleType) -> Any:
    types = {name: getattr(pyarrow, kind)() for name, kind in _TYPES.items()} | {"sha256": pyarrow.binary(32)}
    return pyarrow.schema([pyarrow.field(name, kind, nullable=False) for name, kind in types.items()])


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SmiError(
            "packed pools need pyarrow, which is not installed: pip install 'sparse-model-inversion[pool]'."
        ) from None
    return pyarrow, pyarrow.parquet
