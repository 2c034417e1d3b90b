"""Looking after pools: is every byte what was written, putting parts together, and what is there."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smi.errors import SmiError
from smi.files import atomic_write, writing
from smi.pool import Pool, PoolWriter, picture_names, read_hash, shard_path
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

    Args:
        on_batch: called with the batches read and those present.

    Raises:
        SmiError: no pool, or a damaged manifest.
    """
    pool = Pool(path)
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


def merge(parts: Sequence[str | Path], out: str | Path) -> Pool:
    """Put the batches of `parts`, pools of one plan (as ``--shard`` makes them), into the pool `out`.

    Files are linked where the file system can, else copied; the parts stay as they are. Calling it again goes on.

    Raises:
        SmiError: no parts, parts of different plans, a damaged shard, or a batch that two parts hold differently.
    """
    if not parts:
        raise SmiError("no pools were given to merge; name at least one.")
    pools = [Pool(part) for part in parts]
    first = pools[0]
    for other in pools[1:]:
        for what in ("info", "config", "plan"):
            if getattr(other, what) != getattr(first, what):
                raise SmiError(
                    f"{str(other.path)!r} and {str(first.path)!r} differ in their {_names[what]}; only parts of one "
                    f"plan can be put together."
                )
    _check_doubles(pools)
    with Workers(Path(out)):
        writer = PoolWriter(out, first.info, first.config, first.plan, device=str(first.manifest["device"]))
        for pool in pools:
            for batch in pool.batches:
                if batch not in writer.present:
                    _take(pool, batch, writer.path)
    return Pool(out)


_names = {"info": "model", "config": "config", "plan": "work plan"}


def _check_doubles(pools: Sequence[Pool]) -> None:
    for batch, times in Counter(batch for pool in pools for batch in pool.batches).items():
        if times > 1:
            holders = [pool for pool in pools if batch in pool.batches]
            hashes = {read_hash(shard_path(pool.path, batch))[1] for pool in holders}
            if len(hashes) > 1:
                raise SmiError(
                    f"{str(holders[0].path)!r} and {str(holders[1].path)!r} hold different images in batch {batch}; "
                    f"delete that shard in one of them."
                )


def _take(pool: Pool, batch: int, out: Path) -> None:
    result = pool.load(batch)
    stored, found = read_hash(shard_path(pool.path, batch))
    if stored not in (None, found):
        raise SmiError(f"the shard {str(shard_path(pool.path, batch))!r} holds other numbers than were written.")
    with writing(out, shard_path(pool.path, batch).stat().st_size):
        for name in picture_names(pool.info, result):
            if (pool.path / "png" / name).is_file():
                _link(pool.path / "png" / name, out / "png" / name)
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
    """What is there, JSON-serialisable: images of each class, agreement, time, bytes.

    Raises:
        SmiError: no pool, or a damaged shard.
    """
    pool = Pool(path)
    classes: Counter[str] = Counter()
    agreeing, seconds, flops = 0, 0.0, 0
    retried = []
    for batch, result in zip(pool.batches, pool, strict=True):
        if result.tries > 1:
            retried.append(batch)
        classes.update(pool.info.label(target) for target in result.targets.tolist())
        agreeing += int((result.logits.argmax(1) == result.targets).sum())
        seconds += sum(phase.seconds for phase in result.phases)
        flops += sum(phase.flops for phase in result.phases)
    sizes = {kind: sum(f.stat().st_size for f in (pool.path / kind).glob("*")) for kind in ("shards", "png")}
    images = sum(classes.values())
    return {
        "path": str(pool.path),
        "model": pool.info.name,
        "config": dataclasses.asdict(pool.config),
        "images": images,
        "planned": len(pool.plan.targets),
        "batches": len(pool.batches),
        "retried": retried,
        "classes": dict(classes),
        "teacher_agreement": agreeing / images if images else None,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "flops": flops,
        "bytes": sizes,
    }
