"""A pool for the world: tar files that WebDataset reads and a Parquet index, written once and read from anywhere.

    FOLDER/packed.json             the manifest of the pool that was packed, and how it was
    FOLDER/shard-000000.tar        for each image KEY.png, KEY.cls, KEY.json and KEY.safetensors, see `smi.tar`
    FOLDER/index.parquet           a row for each image, see `smi.index`; written last: without it nothing is packed

KEY is the image number as eight digits. ``KEY.safetensors`` is the `Result` of one image as `smi.shard` encodes it; the
first image of a batch has the batch's histories, snapshots and phases with it, so that nothing of a pool is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smi.augment import seed_of
from smi.errors import SmiError, did_you_mean, reason
from smi.files import TEMP, atomic_file, atomic_write, sync_folder, writing
from smi.index import NAME, Index, IndexWriter, regular_size, shard_name
from smi.pool import FORMAT_VERSION, PACKED, Pool, encode_png, read_manifest, to_pixels
from smi.shard import DAMAGE, check_rows, decode_bytes, encode
from smi.state import ROWS, ModelInfo, Result, WorkPlan
from smi.tar import END, Record, encode_record, records
from smi.workers import Workers

Pixels = Literal["float32", "kept", "png"]  # each holds all that the next one does
LESS = {"kept": "kept patches alone", "png": "pictures alone, rounded to 256 levels"}
MANIFEST, FORMAT = PACKED, "smi-packed-pool"
_SHARD = re.compile(r"shard-\d{6,}\.tar")
_MEMBERS = {"cls", "json", "png", "safetensors"}


class PackedPool(Pool):
    """A packed pool for reading, with all that a `Pool` has; opening it reads four columns of the index.

    Raises:
        SmiError: no pyarrow; no such folder, not packed or not to the end, damaged, or written by a newer version.
    """

    _manifest, _format = MANIFEST, FORMAT

    def _find(self) -> list[int]:
        self.pixels: Pixels = self.manifest.get("pixels", "")
        if self.pixels not in get_args(Pixels):
            raise SmiError(f"the manifest {str(self.path / MANIFEST)!r} is damaged: pixels is {self.pixels!r}.")
        if not (self.path / NAME).exists():
            raise SmiError(
                f"the packed pool {str(self.path)!r} has no {NAME}: it was not packed to the end. Run the same command "
                f"again, or restore the file from a copy."
            )
        images, size = len(self.plan.targets), self.plan.batch_size
        self.index = Index(self.path / NAME, images)
        batches, counts = np.unique(self.index.numbers // size, return_counts=True)
        if (counts != np.minimum(size, images - batches * size)).any():
            raise SmiError(f"the index {str(self.path / NAME)!r} lacks images of a batch; restore it from a copy.")
        return list(batches.tolist())

    def __len__(self) -> int:
        return len(self.index)

    def load(self, batch: int) -> Result:
        self._check_present(batch)
        numbers = self.plan.batch(batch)
        start = int(np.searchsorted(self.index.numbers, numbers.start))
        ones = [self.load_row(start + row) for row in range(len(numbers))]
        try:
            return _joined(ones)
        except DAMAGE as error:
            raise damaged_shard(self.path / shard_name(int(self.index.shards[start])), error) from None

    load_verified = load  # every image is compared with its hash in any case

    def load_row(self, row: int) -> Result:
        """The image in row `row` of the index, alone, with what its batch has to say if it is the first of it.

        Raises:
            SmiError: it is damaged, or lies elsewhere.
        """
        file = self.path / shard_name(int(self.index.shards[row]))
        try:
            with open(file, "rb") as shard:
                shard.seek(int(self.index.offsets[row]))
                found = list(records(io.BytesIO(shard.read(int(self.index.lengths[row])))))
            if len(found) != 1 or int(found[0].key) != self.index.numbers[row]:
                raise ValueError(f"image {self.index.numbers[row]} does not lie where the index says")
            return decode_record(found[0], self.info, self.plan, self.pixels)
        except DAMAGE as error:
            raise damaged_shard(file, error) from None

    def rows(self, start: int, stop: int, *, verified: bool = False) -> Iterator[tuple[Result, int]]:
        return ((self.load_row(row), 0) for row in range(start, min(stop, len(self))))


def open_pool(path: str | Path) -> Pool:
    """The pool at `path`, in whichever form it is there: as `smi invert` fills it, or packed.

    Raises:
        SmiError: no such folder, not a pool, damaged, or written by a newer version.
    """
    return PackedPool(path) if os.path.exists(Path(path) / MANIFEST) else Pool(path)


def pack(
    pool: Pool | str | Path,
    out: str | Path,
    *,
    shard_images: int = 1000,
    pixels: Pixels = "float32",
    on_images: Callable[[int, int], None] | None = None,
) -> PackedPool:
    """Write the images present in `pool` to `out` as tar files and an index, the same bytes whenever it is called.

    A tar file and the index appear only when they are whole; calling it again goes on where it was interrupted, or
    with what the pool has more of by now. Memory is bounded by one batch of the pool and one row group of the index.
    The same bytes come of the same pool with the same versions of Pillow, safetensors and pyarrow.

    Args:
        shard_images: images in each tar file.
        pixels: ``float32`` keeps the normalised images as they were inverted beside their pictures, so that nothing is
            lost; ``kept`` their kept patches alone, and the mean is in dropped ones; ``png`` the pictures alone, whose
            pixels are clipped and rounded to 256 levels.
        on_images: called with the images packed and those present.

    Raises:
        SmiError: no pyarrow; empty or damaged pool; `out` holds something else or another pool; full disk, read-only
            folder; `shard_images` below 1, unknown `pixels`; an image of more than `smi.tar.MAX_RECORD` bytes.
    """
    pool, out = pool if isinstance(pool, Pool) else open_pool(pool), Path(out)
    _check_order(pool, shard_images, pixels)
    manifest = pool.manifest | {"format": FORMAT, "format_version": FORMAT_VERSION}
    manifest |= {"pixels": pixels, "shard_images": shard_images}
    with writing(out):
        os.makedirs(out, exist_ok=True)
    with Workers(out), writing(out):
        _prepare(out, manifest)
        with atomic_file(out / NAME) as temp, IndexWriter(temp) as index:
            numbers = _numbers(pool)
            for shard, start in enumerate(range(0, len(pool), shard_images)):
                part = numbers[start : start + shard_images].tolist()
                for row in _shard_rows(pool, start, part, out / shard_name(shard), pixels):
                    index.add({"shard": shard, **row})
                if on_images is not None:
                    on_images(start + len(part), len(pool))
        _remove_shards(out, -(-len(pool) // shard_images))
        sync_folder(out)
    return PackedPool(out)


def _check_order(pool: Pool, shard_images: int, pixels: str) -> None:
    if shard_images < 1:
        raise SmiError(f"shard_images is {shard_images}; expected at least 1 image in each tar file.")
    if pixels not in get_args(Pixels):
        raise SmiError(f"pixels is {pixels!r}.{did_you_mean(str(pixels), get_args(Pixels))}")
    order = get_args(Pixels)
    if isinstance(pool, PackedPool) and order.index(pool.pixels) > order.index(pixels):
        raise SmiError(
            f"the packed pool {str(pool.path)!r} holds {LESS[pool.pixels]}; pack the pool that it was made of."
        )
    if not len(pool):
        raise SmiError(f"the pool {str(pool.path)!r} holds no finished batch yet; run its inversion first.")
    if pool.config.seed >= 2**62:
        raise SmiError(f"the pool's seed is {pool.config.seed}; the index has room for seeds below 2**62.")


def _prepare(out: Path, manifest: dict[str, Any]) -> None:
    """Leaves what an interrupted packing of the same pool made that is whole, and the manifest."""
    files = {name for name in os.listdir(out) if name not in ("workers", "report")}
    temps = set(filter(TEMP.fullmatch, files))
    own = {name for name in files if _SHARD.fullmatch(name) or name in (MANIFEST, NAME)}
    strange = files - temps - own if MANIFEST in files else files - temps
    if strange:
        raise SmiError(f"{str(out)!r} is not a packed pool and not empty: it holds {min(strange)!r}. Choose another.")
    if MANIFEST not in files:
        atomic_write(out / MANIFEST, json.dumps(manifest).encode())
    elif read_manifest(out, MANIFEST, FORMAT) != json.loads(json.dumps(manifest)):
        raise SmiError(f"{str(out)!r} was packed from another pool or in another way; choose another folder.")
    for name in temps | {NAME}:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out / name)


def _remove_shards(out: Path, count: int) -> None:
    """Those of a time when the pool had more images."""
    for name in os.listdir(out):
        if _SHARD.fullmatch(name) and int(name[6:-4]) >= count:
            os.unlink(out / name)


def _shard_rows(pool: Pool, start: int, numbers: list[int], file: Path, pixels: Pixels) -> list[dict[str, Any]]:
    """Index rows of the tar file of images `numbers`, from the `start`-th on, which is written unless it is there."""
    if file.exists():
        # Damage is not what an interrupted packing leaves, but written anew it is gone.
        with contextlib.suppress(SmiError):
            found = [row for row, *_ in scan(file, pool, pixels)]
            if [row["index"] for row in found] == numbers:
                return found
    rows, offset = [], 0
    with atomic_file(file) as temp, open(temp, "xb") as shard:
        for result, row in pool.rows(start, start + len(numbers), verified=True):
            one = _one(result, row, pool.plan)
            try:
                data = encode_record(_key(one), members_of(one, pool, pixels))
            except ValueError as error:
                raise SmiError(
                    f"the pool {str(pool.path)!r} cannot be packed: {error}; make fewer snapshots."
                ) from None
            place = {"key": _key(one), "offset": offset, "length": len(data)}
            rows.append(place | facts(one, pool) | {"sha256": hashlib.sha256(data).digest()})
            offset += shard.write(data)
        shard.write(END)
    return rows


def scan(file: Path, pool: Pool, pixels: Pixels) -> Iterator[tuple[dict[str, Any], Result, Record]]:
    """The images of a tar file without the index: what that would say of each (but the shard), itself, and its bytes.

    Raises:
        SmiError: what a packing of `pool` cannot have written.
    """
    try:
        size, end = regular_size(file), 0
        with open(file, "rb") as shard:
            for record in records(shard):
                one = decode_record(record, pool.info, pool.plan, pixels)
                place = {"key": record.key, "offset": record.offset, "length": record.length}
                yield place | facts(one, pool) | {"sha256": record.sha256}, one, record
                end = record.offset + record.length
        if size != end + len(END):
            raise ValueError(f"it has {size} bytes where its images end at {end}")
    except DAMAGE as error:
        raise damaged_shard(file, error) from None


def decode_record(record: Record, info: ModelInfo, plan: WorkPlan, pixels: Pixels) -> Result:
    """The one image of a record. Raises any of `smi.shard.DAMAGE`."""
    if set(record.members) != _MEMBERS:
        raise ValueError(f"image {record.key} has members {', '.join(record.members)}")
    number = int(record.key)
    if number >= len(plan.targets):
        raise ValueError(f"image {number} is not among the {len(plan.targets)} of the plan")
    elsewhere: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
        "kept": lambda tensors: _from_patches(tensors.pop("patches"), tensors["keep"], info),
        "png": lambda _: _normalised(decode_png(record.members["png"], info), info)[None],
    }
    result = decode_bytes(record.members["safetensors"], elsewhere.get(pixels))
    check_rows(result, info, plan, range(number, number + 1))
    return result


def facts(one: Result, pool: Pool) -> dict[str, Any]:
    """What index and ``KEY.json`` both say of an image, the one of `one`."""
    target = int(one.targets[0])
    return {
        "index": int(one.indices[0]),
        "class": target,
        "label": pool.info.label(target),
        "seed": seed_of(pool.config.seed, one.tries),
        "kept": one.keep.shape[1] / pool.info.num_patches,
        "agreement": bool(one.logits[0].argmax() == target),
        "confidence": float(one.logits[0].softmax(0)[target]),
        "tries": one.tries,
    }


def damaged_shard(file: Path, error: Exception) -> SmiError:
    return SmiError(
        f"the tar file {str(file)!r} is damaged ({reason(error)}); restore it from a copy, or delete it and pack the "
        f"same pool to the same folder again."
    )


def decode_png(data: bytes, info: ModelInfo) -> Tensor:
    """(C, H, W) uint8 out of a PNG file. Raises `ValueError` for any other size or kind of picture."""
    channels, height, width = info.input_size
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            # Before its pixels are decoded, which may be as many as its header says.
            if (picture.size, picture.mode) != ((width, height), "RGB" if channels == 3 else "L"):
                raise ValueError(f"it is {picture.mode} of {picture.size} pixels")
            pixels = np.array(picture)
    except Exception as error:  # Pillow raises what comes: SyntaxError, zlib.error, struct.error, its own
        raise ValueError(f"a picture cannot be read: {reason(error)}") from None
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def _normalised(picture: Tensor, info: ModelInfo) -> Tensor:
    """(C, H, W) uint8 -> float32 in the model's normalised space."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (info.mean, info.std))
    return (picture.float() / 255 - mean) / std


def members_of(one: Result, pool: Pool, pixels: Pixels) -> dict[str, bytes]:
    """What follows KEY and the dot -> bytes, for the one image of `one`."""
    said = {"key": _key(one), **facts(one, pool), "keep": one.keep[0].tolist()}
    said["confidence"] = said["confidence"] if math.isfinite(said["confidence"]) else None
    instead = {}
    if pixels == "kept":
        patches = _patches(one.images, one.keep, pool.info)
        instead = {"patches": patches}
        one = dataclasses.replace(one, images=_from_patches(patches, one.keep, pool.info))
    return {
        "cls": str(said["class"]).encode(),
        "json": json.dumps(said, ensure_ascii=False).encode(),
        "png": encode_png(to_pixels(one.images[0], pool.info)),
        "safetensors": encode(one, None if pixels == "float32" else instead),
    }


def _patches(images: Tensor, keep: Tensor, info: ModelInfo) -> Tensor:
    """(B, C, H, W) and (B, K) -> (B, K, C, height, width): the pixels of the kept patches."""
    (rows, columns), (height, width) = info.grid, info.patch_size
    cells = images.unflatten(2, (rows, height)).unflatten(4, (columns, width)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return cells.gather(1, keep[:, :, None, None, None].expand(-1, -1, *cells.shape[2:]))


def _from_patches(patches: Tensor, keep: Tensor, info: ModelInfo) -> Tensor:
    """The images of which these are the kept patches, and the others the mean, which is 0. Raises any of `DAMAGE`."""
    (rows, columns), shape = info.grid, (info.input_size[0], *info.patch_size)
    if patches.shape != (*keep.shape, *shape) or patches.dtype != torch.float32:
        raise ValueError(f"patches are {tuple(patches.shape)} {patches.dtype}")
    cells = patches.new_zeros(len(keep), info.num_patches, *shape)
    cells.scatter_(1, keep[:, :, None, None, None].expand_as(patches), patches)
    return cells.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4).contiguous()


def _key(one: Result) -> str:
    return f"{int(one.indices[0]):08d}"


def _numbers(pool: Pool) -> NDArray[np.int64]:
    """(images,) numbers of the images present."""
    return np.concatenate([np.arange(r.start, r.stop) for r in map(pool.plan.batch, pool.batches)])


def _one(result: Result, row: int, plan: WorkPlan) -> Result:
    """Image `row` alone, with what the batch as a whole has to say if it is the first of it."""
    rows: dict[str, Any] = {name: getattr(result, name)[row : row + 1] for name in ROWS}
    losses = {name: values[row : row + 1] for name, values in result.losses.items()}
    if int(rows["indices"]) % plan.batch_size == 0:
        return dataclasses.replace(result, **rows, losses=losses)
    bare: dict[str, Any] = {"history": {}, "snapshots": result.snapshots[:0], "snapshot_at": [], "phases": []}
    return dataclasses.replace(result, **rows, losses=losses, **bare)


def _joined(ones: list[Result]) -> Result:
    """The batch out of its images."""
    if len({one.keep.shape[1] for one in ones}) > 1 or len({frozenset(one.losses) for one in ones}) > 1:
        raise ValueError("the images of a batch do not fit together")
    rows: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in ones]) for name in ROWS}
    losses = {name: torch.cat([one.losses[name] for one in ones]) for name in ones[0].losses}
    return dataclasses.replace(ones[0], **rows, losses=losses)
