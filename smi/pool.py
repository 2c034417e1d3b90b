"""The synthetic data set on disk: one shard for each batch of the work plan, written so that no moment can break it.

    POOL/manifest.json                model, resolved config, work plan, versions
    POOL/shards/00000.safetensors     one finished batch, every tensor of its `Result`
    POOL/png/000000_airplane.png      one picture for each image, for people
    POOL/workers/                     while runs are at work on it: who they are, see `smi.workers`

The rename of a finished shard is the commit point: a batch without a shard has not been made, and resuming makes it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smi._version import __version__
from smi.config import Config
from smi.errors import SmiError
from smi.files import TEMP, atomic_write, check_inside, read_bytes, remove_temps, sync_folder, writing
from smi.state import ModelInfo, Phase, Result, WorkPlan

FORMAT, FORMAT_VERSION = "smi-pool", 1
_SHARD = re.compile(r"\d{5,}\.safetensors")
_PICTURE = re.compile(r"\d{6,}_[a-z0-9-]+\.png")
_DTYPES = {
    "images": torch.float32,
    "keep": torch.int64,
    "dropped_at": torch.int32,
    "targets": torch.int64,
    "indices": torch.int64,
    "logits": torch.float32,
    "snapshots": torch.uint8,
}
_LARGEST_MANIFEST = 1 << 28  # bytes: of some ten million images
# What readers of damaged bytes raise: safetensors and torch have errors of their own, JSON may hold infinity and depth.
_DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
_Plain = TypeVar("_Plain", ModelInfo, WorkPlan, Phase)


class PoolWriter:
    """Adds finished batches to the pool at `path`, which is made where there is none and resumed where it is the same.

    Args:
        path: folder; parents are made.
        info, config, plan: what the pool is; a pool that is there already must have been made with the same.
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
        overwrite: bool = False,
        alone: bool = True,
    ) -> None:
        self.path, self.info, self.config, self.plan = Path(path), info, config.resolved(), plan
        try:
            check_plan(info, plan)
        except ValueError as error:
            raise SmiError(f"no pool can be made: {error}.") from None
        with writing(self.path):
            os.makedirs(self.path, exist_ok=True)
            files = [file for file in os.listdir(self.path) if not TEMP.fullmatch(file) and file != "workers"]
        exists = "manifest.json" in files
        if files and not exists:
            raise SmiError(
                f"{str(self.path)!r} is not a pool and not empty: it holds {sorted(files)[0]!r}. Choose another folder."
            )
        if exists and overwrite:
            _read_manifest(self.path)
        elif exists:
            self._check_same(Pool(self.path))
        with writing(self.path):
            if alone:
                self._clean(overwrite)
            if overwrite or not exists:
                atomic_write(self.path / "manifest.json", json.dumps(self._manifest(device), indent=1).encode())
            for folder in ("shards", "png"):
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

    @property
    def missing(self) -> list[int]:
        """Numbers of the batches still to be made, in order."""
        present = set(self.present)
        return [batch for batch in range(self.plan.num_batches) if batch not in present]

    def write(self, batch: int, result: Result) -> None:
        """Commit one finished batch; once this returns it survives a crash, and before that it leaves no trace.

        Raises:
            SmiError: `result` is not batch `batch` of the plan, the disk is full, or the folder cannot be written.
        """
        try:
            _check_result(result, self.info, self.plan, batch)
        except ValueError as error:
            raise SmiError(f"the result does not fit batch {batch} of the pool {str(self.path)!r}: {error}.") from None
        pictures = [encode_png(picture) for picture in to_pixels(result.images, self.info)]
        shard = _encode_shard(result)
        with writing(self.path, len(shard) + sum(map(len, pictures))):
            for name, picture in zip(picture_names(self.info, result), pictures, strict=True):
                atomic_write(self.path / "png" / name, picture)
            sync_folder(self.path / "png")
            atomic_write(shard_path(self.path, batch), shard)
            sync_folder(self.path / "shards")

    def _check_same(self, pool: Pool) -> None:
        for part in ("info", "config", "plan"):
            ours, theirs = getattr(self, part), getattr(pool, part)
            for field in dataclasses.fields(ours):
                new, old = getattr(ours, field.name), getattr(theirs, field.name)
                if new != old:
                    raise SmiError(
                        f"the pool {str(self.path)!r} was made with {_difference(field.name, old, new)}; "
                        f"choose another folder, or start it over with overwrite (--overwrite)."
                    )

    def _clean(self, overwrite: bool) -> None:
        """Remove what interrupted writes left behind; on `overwrite` also the batches, while the manifest stays: a
        kill in the middle leaves a smaller pool, not a folder that is none."""
        for folder, own in ((self.path, None), (self.path / "shards", _SHARD), (self.path / "png", _PICTURE)):
            if folder.is_dir() and not folder.is_symlink():
                remove_temps(folder)
                for file in os.listdir(folder) if overwrite and own else []:
                    if own and own.fullmatch(file):
                        os.unlink(folder / file)

    def _manifest(self, device: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": dataclasses.asdict(self.info),
            "config": self.config.to_dict(),
            "plan": dataclasses.asdict(self.plan),
            "versions": {
                "smi": __version__,
                "torch": str(torch.__version__),
                "timm": importlib.metadata.version("timm"),
                "python": platform.python_version(),
            },
            "device": device,
        }


class Pool:
    """A pool for reading, as it was when it was opened; its length is the number of images present.

    Attributes:
        path: the folder.
        manifest: what ``manifest.json`` says.
        info, config, plan: the same as values.
        batches: numbers of the batches present, in order.

    Raises:
        SmiError: no such folder, not a pool, damaged, or written by a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        try:
            self.info = build(ModelInfo, self.manifest["model"])
            self.config = Config.from_dict(self.manifest["config"])
            self.plan = build(WorkPlan, self.manifest["plan"])
            check_plan(self.info, self.plan)
            for key, kind in (("created", str), ("device", str), ("versions", dict)):
                if not isinstance(self.manifest[key], kind):
                    raise ValueError(f"{key} is {str(self.manifest[key])[:60]!r}")
        except _DAMAGE as error:
            raise _damaged_manifest(self.path, error) from None
        self.batches = _present(self.path, self.plan)

    @property
    def complete(self) -> bool:
        return len(self.batches) == self.plan.num_batches

    def __len__(self) -> int:
        return sum(len(self.plan.batch(batch)) for batch in self.batches)

    def load(self, batch: int) -> Result:
        """Read one batch. The tensors are memory-mapped copy-on-write: pages are read when they are used.

        Raises:
            SmiError: the batch has not been made, or its shard is truncated or otherwise damaged.
        """
        file = shard_path(self.path, batch)
        if batch not in self.batches:
            raise SmiError(f"the pool {str(self.path)!r} has no batch {batch}; it has {len(self.batches)} batches.")
        try:
            check_inside(self.path, file)
            result = _decode_shard(file)
            _check_result(result, self.info, self.plan, batch)
        except _DAMAGE as error:
            raise SmiError(
                f"the shard {str(file)!r} is damaged ({_reason(error)}); delete it and run the same command again: "
                f"only this batch is made anew."
            ) from None
        return result

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
        raise SmiError(f"cannot read {str(path / 'shards')!r}: {_reason(error)}.") from None
    return [batch for batch in range(plan.num_batches) if shard_path(path, batch).name in files]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(read_bytes(file, _LARGEST_MANIFEST).decode())
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(path):
            raise SmiError(f"{str(path)!r} is not a pool: it has no manifest.json. Name the folder of one.") from None
        raise SmiError(f"there is no pool at {str(path)!r}; expected a folder that an inversion has filled.") from None
    except OSError as error:
        raise SmiError(f"cannot read {str(file)!r}: {_reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise _damaged_manifest(path, error) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SmiError(f"{str(path)!r} is not a pool: its manifest.json is of another program. Choose another folder.")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise _damaged_manifest(path, ValueError(f"format_version is {version!r}"))
    if version > FORMAT_VERSION:
        raise SmiError(
            f"the pool {str(path)!r} has format version {version}, this program reads up to {FORMAT_VERSION}; "
            f"upgrade sparse-model-inversion."
        )
    return manifest


def _damaged_manifest(path: Path, error: Exception) -> SmiError:
    return SmiError(
        f"the manifest {str(path / 'manifest.json')!r} is damaged ({_reason(error)}); restore it from a copy, "
        f"or use another folder."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def build(kind: type[_Plain], data: Any) -> _Plain:
    """The dataclass from JSON data. Raises `ValueError` or `TypeError` for a missing, unknown or ill-typed field."""
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__} is not a mapping")
    fields: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in data.items()}
    value = kind(**fields)
    for name, hint in get_type_hints(kind).items():
        if not _fits(getattr(value, name), hint):
            raise ValueError(f"{name} is {str(getattr(value, name))[:60]!r}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, tuple):
            return False
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(value) == len(items) and all(map(_fits, value, items))
    if isinstance(value, str):
        value.encode()  # half a surrogate pair, which JSON may hold, raises what a damaged file does
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


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


def _check_result(result: Result, info: ModelInfo, plan: WorkPlan, batch: int) -> None:
    """Raises `ValueError` saying how `result` differs from batch `batch` of the plan."""
    if not 0 <= batch < plan.num_batches:
        raise ValueError(f"the plan has batches 0 to {plan.num_batches - 1}")
    numbers = plan.batch(batch)
    images, patches = len(numbers), info.num_patches
    shapes: dict[str, tuple[int | None, ...]] = {
        "images": (images, *info.input_size),
        "keep": (images, None),
        "dropped_at": (images, patches),
        "targets": (images,),
        "indices": (images,),
        "logits": (images, info.num_classes),
        "snapshots": (len(result.snapshot_at), None, *info.input_size),
    }
    for name, shape in shapes.items():
        _check_tensor(name, getattr(result, name), shape, _DTYPES[name])
    for name, values in result.losses.items():
        _check_tensor(f"loss {name}", values, (images,), torch.float32)
    for name, values in result.history.items():
        _check_tensor(f"history {name}", values, (None,), torch.float32)
    if result.indices.tolist() != list(numbers):
        raise ValueError(f"its images are not {numbers.start} to {numbers.stop - 1}")
    if result.targets.tolist() != [plan.targets[i] for i in numbers]:
        raise ValueError("its targets are not those of the plan")
    if ((result.keep < 0) | (result.keep >= patches)).any() or (result.keep.diff(dim=1) <= 0).any():
        raise ValueError(f"keep is not ascending within 0 to {patches - 1}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    fits = len(shape) == tensor.ndim and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        want = "x".join("?" if size is None else str(size) for size in shape)
        have = "x".join(map(str, tensor.shape))
        raise ValueError(f"{name} is {have} {tensor.dtype}, expected {want} {dtype}")


def _encode_shard(result: Result) -> bytes:
    tensors = {name: getattr(result, name) for name in _DTYPES}
    tensors |= {f"loss.{name}": values for name, values in result.losses.items()}
    tensors |= {f"history.{name}": values for name, values in result.history.items()}
    # safetensors refuses tensors that share memory, such as rows of one history.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    phases = [dataclasses.asdict(phase) for phase in result.phases]
    extra: dict[str, Any] = {"snapshot_at": result.snapshot_at, "phases": phases, "tries": result.tries}
    return save(tensors, {"smi": json.dumps({**extra, "sha256": _hash(tensors, extra)})})


def read_hash(file: Path) -> tuple[str | None, str]:
    """The hash that a shard was given when it was made (None by versions that gave none), and that of what it holds.

    Raises:
        SmiError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            extra = dict(json.loads((shard.metadata() or {})["smi"]))
        return extra.pop("sha256", None), _hash(tensors, extra)
    except _DAMAGE as error:
        raise SmiError(f"the shard {str(file)!r} cannot be read: {_reason(error)}.") from None


def _hash(tensors: dict[str, Tensor], extra: dict[str, Any]) -> str:
    """SHA-256 over `extra` and the names, shapes, dtypes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _decode_shard(file: Path) -> Result:
    with safe_open(file, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
        extra = json.loads((shard.metadata() or {})["smi"])
    at = extra["snapshot_at"]
    if not isinstance(at, list) or not all(isinstance(t, int) for t in at):
        raise ValueError("snapshot_at is not a list of iterations")
    return Result(
        **{name: tensors[name] for name in _DTYPES},
        losses={name.removeprefix("loss."): values for name, values in tensors.items() if name.startswith("loss.")},
        history={name.removeprefix("history."): v for name, v in tensors.items() if name.startswith("history.")},
        snapshot_at=at,
        phases=[build(Phase, phase) for phase in extra["phases"]],
        tries=int(extra.get("tries", 1)),
    )
