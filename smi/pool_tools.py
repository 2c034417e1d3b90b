"""Looking after pools: is every byte what was written, putting parts together, and what is there."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smi.errors import SmiError
from smi.files import atomic_write, writing
from smi.index import NAME, shard_name
from smi.packed import LESS, PackedPool, decode_png, members_of, open_pool, scan
from smi.pool import Pool, PoolWriter, picture_names, shard_path, to_pixels
from smi.shard import content_hash, read_hash
from smi.state import ROWS, Result, WorkPlan
from smi.tar import Record
from smi.workers import Workers


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        batches, images: present and whole.
        missing: batches of the plan that have not been made.
        unhashed: batches of a version that stored no hash, whole as far as their form tells.
        problems: one sentence for each thing that is wrong.
    """

    batches: int
    images: int
    missing: int
    unhashed: int
    problems: list[str]


def verify(path: str | Path, on_batch: Callable[[int, int], None] | None = None) -> Verification:
    """Read every batch, compare it with the hash that was stored when it was made, and look for its pictures.

    Of a packed pool every image is compared with its row of the index, with its own hash, and its picture, class and
    JSON with what they must be of these pixels.

    Args:
        on_batch: called with the batches read and those present; of a packed pool with its tar files.

    Raises:
        SmiError: no pool, or a damaged manifest.
    """
    pool = open_pool(path)
    if isinstance(pool, PackedPool):
        return _verify_packed(pool, on_batch)
    problems: list[str] = []
    whole = images = unhashed = 0
    there = set(os.listdir(pool.path / "png")) if (pool.path / "png").is_dir() else set()
    for number, batch in enumerate(pool.batches):
        try:
            result = pool.load(batch)
            stored, found = read_hash(shard_path(pool.path, batch))
        except SmiError as error:
            problems.append(str(error))
            continue
        if stored is None:
            unhashed += 1
        elif stored != found:
            problems.append(
                f"the shard {str(shard_path(pool.path, batch))!r} holds other numbers than were written; delete it and "
                f"run the same command again."
            )
            continue
        for name, values in (("images", result.images), ("logits", result.logits)):
            if not values.isfinite().all():
                problems.append(f"batch {batch} has {name} that are not finite.")
        lost = [name for name in picture_names(pool.info, result) if name not in there]
        if lost:
            problems.append(f"batch {batch} lacks {len(lost)} of its pictures, {lost[0]!r} for one.")
        whole, images = whole + 1, images + len(result.images)
        if on_batch is not None:
            on_batch(number + 1, len(pool.batches))
    return Verification(whole, images, pool.plan.num_batches - len(pool.batches), unhashed, problems)


def _verify_packed(pool: PackedPool, on_shard: Callable[[int, int], None] | None) -> Verification:
    problems: list[str] = []
    bad: set[int] = set()
    images, shards = 0, int(pool.index.shards[-1]) + 1
    stray = {file.name for file in pool.path.glob("shard-*.tar")} - {shard_name(shard) for shard in range(shards)}
    problems += [f"{name} is none of the tar files of the index; remove it." for name in sorted(stray)]
    try:
        for shard, listed in itertools.groupby(pool.index.rows(), itemgetter("shard")):
            for number, found in _compared(pool, shard, listed):
                if found:
                    said = f"{shard_name(shard)}: {found}"
                    if problems[-1:] != [said]:  # once for all images of a tar file that cannot be read on
                        problems.append(said)
                    bad.add(number // pool.plan.batch_size)
                else:
                    images += 1
            if on_shard is not None:
                on_shard(shard + 1, shards)
    except SmiError as error:  # the index
        problems.append(str(error))
    return Verification(len(pool.batches) - len(bad), images, pool.plan.num_batches - len(pool.batches), 0, problems)


def _compared(pool: PackedPool, shard: int, listed: Iterator[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Each image of a tar file, and what is wrong with it, or nothing."""
    scanned = scan(pool.path / shard_name(shard), pool, pool.pixels)
    for row in listed:
        try:
            found, one, record = next(scanned)
        except (SmiError, StopIteration) as error:
            said = str(error) or "it ends too early."
            yield from ((missing["index"], said) for missing in itertools.chain([row], listed))
            return
        yield row["index"], _difference(row, found) or _wrong(pool, one, record)
    try:
        if next(scanned, None) is not None:
            yield row["index"], f"image {row['index']} is not the last one, which the index says."
    except SmiError as error:
        yield row["index"], str(error)


def _difference(row: dict[str, Any], found: dict[str, Any]) -> str:
    for name, value in found.items():
        same = row[name] == (float(np.float32(value)) if isinstance(value, float) else value)
        if not same and value == value:  # a confidence that is not finite may be NaN
            here, there = (x.hex() if isinstance(x, bytes) else repr(x) for x in (value, row[name]))
            return f"image {row['index']} has {name} {here}, and the index says {there}."
    return ""


def _wrong(pool: PackedPool, one: Result, record: Record) -> str:
    """What the members of an image that could be read have wrong."""
    for name, values in (("pixels", one.images), ("logits", one.logits)):
        if not values.isfinite().all():
            return f"image {record.key} has {name} that are not finite."
    expected = members_of(one, pool, pool.pixels)
    for name in ("cls", "json"):
        if record.members[name] != expected[name]:
            return f"{record.key}.{name} says something else than {record.key}.safetensors."
    try:
        same = torch.equal(decode_png(record.members["png"], pool.info), to_pixels(one.images[0], pool.info))
    except ValueError as error:
        return f"image {record.key}: {error}."
    return "" if same else f"{record.key}.png shows something else than {record.key}.safetensors."


def merge(parts: Sequence[str | Path], out: str | Path) -> Pool:
    """Put the batches of `parts`, pools of one plan (as ``--shard`` makes them) in any form, into the pool `out`.

    `out` is a folder of shards, so that one packed part is unpacked. Files of such folders are linked where the file
    system can, else copied; the parts stay as they are. Calling it again goes on.

    Raises:
        SmiError: no parts, parts of different plans, a damaged shard, a batch that two parts hold differently, or a
            packed part that holds pictures alone.
    """
    if not parts:
        raise SmiError("no pools were given to merge; name at least one.")
    pools = [open_pool(part) for part in parts]
    first = pools[0]
    for other in pools:
        for what in _names:
            if getattr(other, what) != getattr(first, what):
                raise SmiError(
                    f"{str(other.path)!r} and {str(first.path)!r} differ in their {_names[what]}; only parts of one "
                    f"plan can be put together."
                )
        if isinstance(other, PackedPool) and other.pixels in LESS:
            raise SmiError(
                f"the packed pool {str(other.path)!r} holds {LESS[other.pixels]}; name the pool that it was made of, "
                f"or pack that with pixels of float32."
            )
    _check_doubles(pools)
    with Workers(Path(out)):
        where = str(first.manifest["device"])
        writer = PoolWriter(out, first.info, first.config, first.plan, device=where, objectives=first.objectives)
        present = set(writer.present)
        for pool in pools:
            for batch in pool.batches:
                if batch not in present:
                    _take(pool, batch, writer)
                    present.add(batch)
    return Pool(out)


_names = {"info": "model", "config": "config", "plan": "work plan", "objectives": "losses"}


def _check_doubles(pools: Sequence[Pool]) -> None:
    seen: dict[int, Pool] = {}
    for pool in pools:
        for batch in pool.batches:
            other = seen.setdefault(batch, pool)
            if other is not pool and content_hash(other.load(batch)) != content_hash(pool.load(batch)):
                raise SmiError(
                    f"{str(other.path)!r} and {str(pool.path)!r} hold different images in batch {batch}; "
                    f"delete that shard in one of them."
                )


def _take(pool: Pool, batch: int, writer: PoolWriter) -> None:
    result, out = pool.load_verified(batch), writer.path
    if isinstance(pool, PackedPool):
        writer.write(batch, result)
        return
    with writing(out, shard_path(pool.path, batch).stat().st_size):
        names = (picture_names(info, result) for info in (pool.info, writer.info))  # labels may differ
        for theirs, ours in zip(*names, strict=True):
            if (pool.path / "png" / theirs).is_file():
                _link(pool.path / "png" / theirs, out / "png" / ours)
        _link(shard_path(pool.path, batch), shard_path(out, batch))


def _link(source: Path, target: Path) -> None:
    """`target` is there, whole, or not at all."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        atomic_write(target, source.read_bytes())


def stats(path: str | Path) -> dict[str, Any]:
    """What is there, in either form, JSON-serialisable: images of each class, agreement, time, bytes.

    Raises:
        SmiError: no pool, or a damaged shard.
    """
    pool = open_pool(path)
    classes: Counter[str] = Counter()
    agreeing, seconds, flops = 0, 0.0, 0
    retried = []
    results, kinds = iter(pool), {"shards": "shards/*", "png": "png/*"}
    if isinstance(pool, PackedPool):  # the index has counted, and of each batch the first image says the rest
        classes, agreeing = _counted(pool)
        starts = np.searchsorted(pool.index.numbers, np.array(pool.batches) * pool.plan.batch_size)
        results, kinds = map(pool.load_row, starts.tolist()), {"shards": "shard-*.tar", "index": NAME}
    for batch, result in zip(pool.batches, results, strict=True):
        if result.tries > 1:
            retried.append(batch)
        if not isinstance(pool, PackedPool):
            classes.update(pool.info.label(target) for target in result.targets.tolist())
            agreeing += int((result.logits.argmax(1) == result.targets).sum())
        seconds += sum(phase.seconds for phase in result.phases)
        flops += sum(phase.flops for phase in result.phases)
    sizes = {kind: sum(file.stat().st_size for file in pool.path.glob(names)) for kind, names in kinds.items()}
    total = sum(classes.values())
    return {
        "path": str(pool.path),
        "model": pool.info.name,
        "config": dataclasses.asdict(pool.config),
        "images": total,
        "planned": len(pool.plan.targets),
        "batches": len(pool.batches),
        "retried": retried,
        "classes": dict(classes),
        "teacher_agreement": agreeing / total if total else None,
        "seconds": seconds,
        "images_per_second": total / seconds if seconds else None,
        "flops": flops,
        "bytes": sizes,
    }


def _counted(pool: PackedPool) -> tuple[Counter[str], int]:
    """Images of each label, and those that the teacher agrees to, as the index has them."""
    targets = pool.index.column("class")
    if targets.min() < 0 or targets.max() >= pool.info.num_classes:
        raise SmiError(f"the index {str(pool.index.path)!r} names classes that the model lacks; pack the pool again.")
    classes: Counter[str] = Counter()
    for target, images in enumerate(np.bincount(targets).tolist()):
        if images:
            classes[pool.info.label(target)] += images  # two classes may share a label
    return classes, int(pool.index.column("agreement").sum())


class FirstImages(Pool):
    """The first images of a pool, as a pool of their own to read; nothing is copied.

    Of a batch that is cut, seconds and operations of its phases are shared out evenly over its images.

    Args:
        path: the pool.
        images: how many, at most those that are there in a row from the first.

    Raises:
        SmiError: not a pool, fewer images than asked for, or a number that divides the images of a trajectory.
    """

    def __init__(self, path: str | Path, images: int) -> None:
        super().__init__(path)
        self._whole = Pool(path)
        repeat = self.config.images_per_trajectory
        if images < 1 or images % repeat:
            raise SmiError(f"the first {images} images were asked for; expected a multiple of {repeat}, from {repeat}.")
        self.plan = WorkPlan(self.plan.targets[:images], self.plan.batch_size)
        self.batches = list(range(self.plan.num_batches))
        if len(self) != images or not {*self.batches} <= {*self._whole.batches}:
            raise SmiError(f"the pool {str(path)!r} does not hold its first {images} images; make them first.")
        self.manifest = {**self.manifest, "plan": dataclasses.asdict(self.plan)}

    def load(self, batch: int) -> Result:
        """The images of a batch that are among the first."""
        whole, wanted = self._whole.load(batch), len(self.plan.batch(batch))
        made = len(whole.targets)
        phases = [
            dataclasses.replace(phase, seconds=phase.seconds * wanted / made, flops=phase.flops * wanted // made)
            for phase in whole.phases
        ]
        rows = {name: getattr(whole, name)[:wanted] for name in ROWS}
        losses = {name: values[:wanted] for name, values in whole.losses.items()}
        shown = whole.snapshots[:, :wanted]
        return dataclasses.replace(whole, **rows, losses=losses, snapshots=shown, phases=phases)
