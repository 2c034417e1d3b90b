"""The synthetic data set on disk: one shard for each batch of the work plan, written so that no moment can break it.

    POOL/manifest.json                model, resolved config, work plan, versions
    POOL/shards/00000.safetensors     one finished batch, every tensor of its `Result`
    POOL/png/000000_airplane.png      one picture for each image, for people
    POOL/unfinished/                  half-done batches that a run was stopped in
    POOL/workers/                     while runs are at work on it: who they are, see `smi.workers`

The rename of a finished shard is the commit point: a batch without a shard has not been made, and resuming makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import itertools
import json
import os
import re
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smi.config import Config
from smi.errors import SmiError, reason
from smi.files import TEMP, atomic_write, check_inside, read_bytes, remove_temps, sync_folder, writing
from smi.provenance import versions
from smi.shard import DAMAGE, build, check_result, decode, decode_state, encode, encode_state, read_hash
from smi.state import ModelInfo, Result, WorkPlan

FORMAT, FORMAT_VERSION = "smi-pool", 1
UNFINISHED = "unfinished"  # folder of half-done batches
PACKED = "packed.json"  # manifest of the other form, see `smi.packed`
_SHARD = re.compile(r"\d{5,}\.safetensors")
_PICTURE = re.compile(r"\d{6,}_[a-z0-9-]+\.png")
_LARGEST_MANIFEST = 1 << 28  # bytes: of some ten million images


class PoolWriter:
    """Adds finished batches to the pool at `path`, which is made where there is none and resumed where it is the same.

    Args:
        path: folder; parents are made.
        info, config, plan, objectives: what the pool is; one that is there already must have been made with the same.
            ``objectives`` are the terms of the loss beyond the config's, see `smi.objectives.Objectives.identity`.
        device: where it is made, for the record only.
        overwrite: start over. Only files named as a pool names them are removed, and only from a pool.
        alone: whether no other run writes to it; then what interrupted ones left behind is removed.

    Raises:
        SmiError: the folder is another pool, holds something else, cannot be written, or the disk is full; the plan or
            the geometry of `info` is impossible.
    """

    def __init__(
        self,
        path: str | Path,
        info: ModelInfo,
        config: Config,
        plan: WorkPlan,
        *,
        device: str,
        objectives: Sequence[str] = (),
        overwrite: bool = False,
        alone: bool = True,
    ) -> None:
        self.path, self.info, self.config, self.plan = Path(path), info, config.resolved(), plan
        self.objectives = tuple(objectives)
        try:
            check_plan(info, plan)
        except ValueError as error:
            raise SmiError(f"no pool can be made: {error}.") from None
        with writing(self.path):
            os.makedirs(self.path, exist_ok=True)
            files = [file for file in os.listdir(self.path) if not TEMP.fullmatch(file) and file != "workers"]
        exists = "manifest.json" in files
        if PACKED in files:
            raise SmiError(
                f"{str(self.path)!r} is a packed pool, to which nothing is added; unpack it with `smi pool merge "
                f"{self.path} --out FOLDER` and go on there, or choose another folder."
            )
        if files and not exists:
            raise SmiError(
                f"{str(self.path)!r} is not a pool and not empty: it holds {sorted(files)[0]!r}. Choose another folder."
            )
        if exists and overwrite:
            read_manifest(self.path)
        elif exists:
            there = Pool(self.path)
            self._check_same(there)
            self.info = there.info  # a pool keeps the names of its classes
        with writing(self.path):
            if alone:
                self._clean(overwrite)
            if overwrite or not exists:
                atomic_write(self.path / "manifest.json", json.dumps(self._manifest(device), indent=1).encode())
            for folder in ("shards", "png", UNFINISHED):
                if folder != UNFINISHED:  # which comes and goes
                    os.makedirs(self.path / folder, exist_ok=True)
                if os.path.islink(self.path / folder):
                    raise SmiError(
                        f"{str(self.path / folder)!r} is a link, which may lead out of the pool; move the pool to "
                        f"where it leads, or choose another folder."
                    )
            sync_folder(self.path)

    @property
    def present(self) -> list[int]:
        """Numbers of the batches that are made, in order, as of now."""
        return _present(self.path, self.plan)

    def has(self, batch: int) -> bool:
        """Whether the batch is made, as of now."""
        return shard_path(self.path, batch).exists()

    @property
    def missing(self) -> list[int]:
        """Numbers of the batches still to be made, in order."""
        present = set(self.present)
        return [batch for batch in range(self.plan.num_batches) if batch not in present]

    @property
    def begun(self) -> list[int]:
        """Numbers of the batches put aside half done, in order, as of now."""
        return _begun(self.path)

    def write(self, batch: int, result: Result) -> None:
        """Commit one finished batch; once this returns it survives a crash, and before that it leaves no trace.

        Raises:
            SmiError: `result` is not batch `batch` of the plan, the disk is full, or the folder cannot be written.
        """
        try:
            check_result(result, self.info, self.plan, batch)
        except ValueError as error:
            raise SmiError(f"the result does not fit batch {batch} of the pool {str(self.path)!r}: {error}.") from None
        pictures = [encode_png(picture) for picture in to_pixels(result.images, self.info)]
        shard = encode(result)
        with writing(self.path, len(shard) + sum(map(len, pictures))):
            for name, picture in zip(picture_names(self.info, result), pictures, strict=True):
                atomic_write(self.path / "png" / name, picture)
            sync_folder(self.path / "png")
            atomic_write(shard_path(self.path, batch), shard)
            sync_folder(self.path / "shards")
            self._drop_aside(batch)

    def put_aside(self, batch: int, state: dict[str, Any]) -> None:
        """Keep a half-done batch for whoever goes on with it; a new state replaces the old one.

        Args:
            state: tensors, and what JSON can hold.

        Raises:
            SmiError: the disk is full, or the folder cannot be written.
        """
        data = encode_state(state)
        with writing(self.path, len(data)):
            while True:
                os.makedirs(self.path / UNFINISHED, exist_ok=True)
                try:
                    return atomic_write(self._aside(batch), data)
                except FileNotFoundError:  # another run took the folder, which was empty, with its last state
                    continue

    def take_up(self, batch: int) -> dict[str, Any] | None:
        """The state that `put_aside` kept, None where there is none; a damaged one is dropped with a warning."""
        file = self._aside(batch)
        try:
            check_inside(self.path, file)
            return decode_state(read_bytes(file, os.lstat(file).st_size))
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            warnings.warn(f"{str(file)!r} is damaged ({reason(error)}); the batch is begun anew.", stacklevel=2)
            self._drop_aside(batch)
            return None

    def _aside(self, batch: int) -> Path:
        return self.path / UNFINISHED / f"{batch:05d}.safetensors"

    def _drop_aside(self, batch: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._aside(batch))
            os.rmdir(self.path / UNFINISHED)  # goes with the last

    def _check_same(self, pool: Pool) -> None:
        for part in ("info", "config", "plan"):
            ours, theirs = getattr(self, part), getattr(pool, part)
            for field in dataclasses.fields(ours):
                new, old = getattr(ours, field.name), getattr(theirs, field.name)
                if field.compare and new != old:
                    raise SmiError(
                        f"the pool {str(self.path)!r} was made with {_difference(field.name, old, new)}; "
                        f"choose another folder, or start it over with overwrite (--overwrite)."
                    )
        if self.objectives != pool.objectives:
            losses = _different_losses(pool.objectives, self.objectives)
            raise SmiError(
                f"the pool {str(self.path)!r} was made with {losses}; give "
                f"the same losses in the same order, choose another folder, or start it over with overwrite "
                f"(--overwrite)."
            )

    def _clean(self, overwrite: bool) -> None:
        """Remove what interrupted writes left behind; on `overwrite` also the batches, while the manifest stays: a
        kill in the middle leaves a smaller pool, not a folder that is none."""
        owned = {".": None, "shards": _SHARD, "png": _PICTURE, UNFINISHED: _SHARD}
        for name, own in owned.items():
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink():
                remove_temps(folder)
                for file in os.listdir(folder) if own else []:
                    done = name == UNFINISHED and (self.path / "shards" / file).exists()
                    if own and own.fullmatch(file) and (overwrite or done):
                        os.unlink(folder / file)
        with contextlib.suppress(OSError):
            os.rmdir(self.path / UNFINISHED)

    def _manifest(self, device: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": dataclasses.asdict(self.info),
            "config": self.config.to_dict(),
            "objectives": list(self.objectives),
            "plan": dataclasses.asdict(self.plan),
            "versions": versions(),
            "device": device,
        }


class Pool:
    """A pool for reading, as it was when it was opened; its length is the number of images present.

    Attributes:
        path: the folder.
        manifest: what ``manifest.json`` says.
        info, config, plan: the same as values.
        objectives: terms of the loss beyond the config's; none in pools of versions that did not record them.
        batches: numbers of the batches present, in order.

    Raises:
        SmiError: no such folder, not a pool, damaged, or written by a newer version.
    """

    _manifest, _format = "manifest.json", FORMAT

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, self._manifest, self._format)
        try:
            self.info = build(ModelInfo, self.manifest["model"])
            self.config = Config.from_dict(self.manifest["config"])
            self.plan = build(WorkPlan, self.manifest["plan"])
            self.objectives = _texts("objectives", self.manifest.get("objectives", []))
            check_plan(self.info, self.plan)
            for key, kind in (("created", str), ("device", str), ("versions", dict)):
                if not isinstance(self.manifest[key], kind):
                    raise ValueError(f"{key} is {str(self.manifest[key])[:60]!r}")
        except DAMAGE as error:
            raise _damaged_manifest(self.path / self._manifest, error) from None
        self.batches = self._find()

    def _find(self) -> list[int]:
        return _present(self.path, self.plan)

    @property
    def complete(self) -> bool:
        return len(self.batches) == self.plan.num_batches

    @property
    def begun(self) -> list[int]:
        """Numbers of the missing batches that were put aside half done, in order, as of now."""
        return [batch for batch in _begun(self.path) if batch not in self.batches]

    def __len__(self) -> int:
        return self.ends[-1] if self.batches else 0

    def load(self, batch: int) -> Result:
        """Read one batch. The tensors are memory-mapped copy-on-write: pages are read when they are used.

        Raises:
            SmiError: the batch has not been made, or its shard is truncated or otherwise damaged.
        """
        file = shard_path(self.path, batch)
        self._check_present(batch)
        try:
            check_inside(self.path, file)
            result = decode(file)
            check_result(result, self.info, self.plan, batch)
        except PermissionError as error:
            raise SmiError(f"cannot read the shard {str(file)!r}: {reason(error)}.") from None
        except DAMAGE as error:
            raise SmiError(
                f"the shard {str(file)!r} is damaged ({reason(error)}); delete it and run the same command again: "
                f"only this batch is made anew."
            ) from None
        return result

    def load_verified(self, batch: int) -> Result:
        """Read one batch, every byte of it.

        Raises:
            SmiError: as `load`, or it is not what its hash says (where there is one) that was written.
        """
        result = self.load(batch)
        stored, found = read_hash(shard_path(self.path, batch))
        if stored not in (None, found):
            raise SmiError(
                f"the shard {str(shard_path(self.path, batch))!r} holds other numbers than were written; delete it and "
                f"run the same command again."
            )
        return result

    def rows(self, start: int, stop: int, *, verified: bool = False) -> Iterator[tuple[Result, int]]:
        """Images `start` to `stop` of those present, in order: each a result that has it, and its row there.

        Args:
            verified: read with `load_verified`.
        """
        for at in range(bisect_right(self.ends, start), len(self.batches)):
            first = self.ends[at - 1] if at else 0
            if first >= stop:
                return
            result = self.load_verified(self.batches[at]) if verified else self.load(self.batches[at])
            for row in range(max(start, first), min(stop, self.ends[at])):
                yield result, row - first

    @functools.cached_property
    def ends(self) -> list[int]:
        """How many images are present up to and with each batch of `batches`."""
        return list(itertools.accumulate(len(self.plan.batch(batch)) for batch in self.batches))

    def _check_present(self, batch: int) -> None:
        at = bisect_left(self.batches, batch)
        if self.batches[at : at + 1] != [batch]:
            raise SmiError(f"the pool {str(self.path)!r} has no batch {batch}; it has {len(self.batches)} batches.")

    def __iter__(self) -> Iterator[Result]:
        """The batches present, in order, one in memory at a time."""
        return map(self.load, self.batches)


def to_pixels(images: Tensor, info: ModelInfo) -> Tensor:
    """(..., C, H, W) float32, normalised -> uint8 pictures: clipped to [0, 1], then rounded to 256 levels."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (info.mean, info.std))
    return (images * std + mean).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def picture_names(info: ModelInfo, result: Result) -> list[str]:
    """File names of the pictures of a batch."""
    pairs = zip(result.indices.tolist(), result.targets.tolist(), strict=True)
    return [f"{index:06d}_{slug(info.label(target)) or target}.png" for index, target in pairs]


def encode_png(picture: Tensor) -> bytes:
    """(C, H, W) uint8, C = 1 or 3 -> a PNG file."""
    channels = picture.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(channels if len(picture) == 3 else channels[..., 0]).save(file, "PNG")
    return file.getvalue()


def slug(label: str) -> str:
    """A label as part of a file name: a-z, 0-9 and ``-`` only, at most 60 characters, perhaps none."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-")


def shard_path(path: Path, batch: int) -> Path:
    return path / "shards" / f"{batch:05d}.safetensors"


def _present(path: Path, plan: WorkPlan) -> list[int]:
    """Numbers of the plan's batches that have a shard, in order."""
    try:
        files = set(os.listdir(path / "shards"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SmiError(f"cannot read {str(path / 'shards')!r}: {reason(error)}.") from None
    return [batch for batch in range(plan.num_batches) if f"{batch:05d}.safetensors" in files]


def _begun(path: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return sorted(int(file[:-12]) for file in os.listdir(path / UNFINISHED) if _SHARD.fullmatch(file))
    return []


def read_manifest(path: Path, name: str = "manifest.json", format: str = FORMAT) -> dict[str, Any]:
    """What the manifest `name` of the folder `path` says. Raises `SmiError` where it is not one of that format."""
    file = path / name
    try:
        manifest = json.loads(read_bytes(file, _LARGEST_MANIFEST).decode())
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(path):
            raise SmiError(f"{str(path)!r} is not a pool: it has no {name}. Name the folder of one.") from None
        raise SmiError(f"there is no pool at {str(path)!r}; expected a folder that an inversion has filled.") from None
    except OSError as error:
        raise SmiError(f"cannot read {str(file)!r}: {reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise _damaged_manifest(file, error) from None
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise SmiError(f"{str(path)!r} is not a pool: its {name} is of another program. Choose another folder.")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise _damaged_manifest(file, ValueError(f"format_version is {version!r}"))
    if version > FORMAT_VERSION:
        raise SmiError(
            f"the pool {str(path)!r} has format version {version}, this program reads up to {FORMAT_VERSION}; "
            f"upgrade sparse-model-inversion."
        )
    return manifest


def _damaged_manifest(file: Path, error: Exception) -> SmiError:
    return SmiError(
        f"the manifest {str(file)!r} is damaged ({reason(error)}); restore it from a copy, or use another folder."
    )


def _different_losses(old: Sequence[str], new: Sequence[str]) -> str:
    """Says the losses of a pool and of this run, for a message."""
    theirs, ours = (" + ".join(losses) or "none of its own" for losses in (old, new))
    return f"the losses {theirs}, this run has {ours}"


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} is {str(value)[:60]}, expected a list of texts")
    return tuple(value)


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, tuple) and isinstance(new, tuple) and max(len(old), len(new)) > 8:
        if len(old) != len(new):
            return f"{len(old)} {name}, this run has {len(new)}"
        at = next(i for i in range(len(old)) if old[i] != new[i])
        return _difference(f"{name}[{at}]", old[at], new[at])
    return f"{name} {old!r}, this run has {new!r}"


def check_plan(info: ModelInfo, plan: WorkPlan) -> None:
    """Raises `ValueError` for what no inversion could have made."""
    channels, *size = info.input_size
    if channels not in (1, 3) or len(info.mean) != channels or len(info.std) != channels or min(info.std) <= 0:
        raise ValueError(f"{channels} channels with mean {info.mean} and std {info.std} are not an image of 1 or 3")
    if min(info.grid) < 1 or [cells * pixels for cells, pixels in zip(info.grid, info.patch_size, strict=True)] != size:
        raise ValueError(f"{info.grid} patches of {info.patch_size} pixels do not fill an image of {tuple(size)}")
    if info.class_names and len(info.class_names) != info.num_classes:
        raise ValueError(f"there are {len(info.class_names)} class names for {info.num_classes} classes")
    if plan.batch_size < 1 or not plan.targets:
        raise ValueError(f"the plan has {len(plan.targets)} images in batches of {plan.batch_size}")
    if not 0 <= min(plan.targets) <= max(plan.targets) < info.num_classes:
        raise ValueError(f"the plan has targets outside the classes 0 to {info.num_classes - 1}")
