"""One finished batch as bytes: safetensors with every tensor of its `Result`, a hash over them, and their checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from smi.errors import SmiError, reason
from smi.state import ModelInfo, Phase, Result, WorkPlan

DTYPES = {
    "images": torch.float32,
    "keep": torch.int64,
    "dropped_at": torch.int32,
    "targets": torch.int64,
    "indices": torch.int64,
    "logits": torch.float32,
    "snapshots": torch.uint8,
}
# What readers of damaged bytes raise: safetensors and torch have errors of their own, JSON may hold infinity and depth.
DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
Plain = TypeVar("Plain", ModelInfo, WorkPlan, Phase)


def check_result(result: Result, info: ModelInfo, plan: WorkPlan, batch: int) -> None:
    """Raises `ValueError` saying how `result` differs from batch `batch` of the plan."""
    if not 0 <= batch < plan.num_batches:
        raise ValueError(f"the plan has batches 0 to {plan.num_batches - 1}")
    check_rows(result, info, plan, plan.batch(batch))


def check_rows(result: Result, info: ModelInfo, plan: WorkPlan, numbers: range) -> None:
    """Raises `ValueError` saying how `result` differs from images `numbers` of the plan."""
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
        _check_tensor(name, getattr(result, name), shape, DTYPES[name])
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


def encode(result: Result, instead: dict[str, Tensor] | None = None) -> bytes:
    """A safetensors file of `result`; its metadata ``smi`` is JSON with a hash over all.

    Args:
        instead: tensors in place of the images; None leaves these.
    """
    tensors, extra = _parts(result, instead is None)
    tensors |= instead or {}
    return save(tensors, {"smi": json.dumps({**extra, "sha256": hash_of(tensors, extra)})})


def content_hash(result: Result) -> str:
    """SHA-256 over all that `result` says but what it took to make, whatever form it was read from."""
    timeless = [dataclasses.replace(phase, seconds=0.0) for phase in result.phases]
    return hash_of(*_parts(dataclasses.replace(result, phases=timeless, peak_memory=None), True))


def _parts(result: Result, images: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: getattr(result, name) for name in DTYPES if images or name != "images"}
    tensors |= {f"loss.{name}": values for name, values in result.losses.items()}
    tensors |= {f"history.{name}": values for name, values in result.history.items()}
    # safetensors refuses tensors that share memory, such as rows of one history.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    phases = [dataclasses.asdict(phase) for phase in result.phases]
    extra = {"snapshot_at": result.snapshot_at, "phases": phases, "tries": result.tries}
    # Left out where it is not known, as in what earlier versions wrote, whose hashes stay right.
    return tensors, extra if result.peak_memory is None else {**extra, "peak_memory": result.peak_memory}


def read_hash(file: Path) -> tuple[str | None, str]:
    """The hash that a shard was given when it was made (None by versions that gave none), and that of what it holds.

    Raises:
        SmiError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            extra = dict(json.loads((shard.metadata() or {})["smi"]))
        return extra.pop("sha256", None), hash_of(tensors, extra)
    except DAMAGE as error:
        raise SmiError(f"the shard {str(file)!r} cannot be read: {reason(error)}.") from None


def hash_of(tensors: dict[str, Tensor], extra: dict[str, Any]) -> str:
    """SHA-256 over `extra` and the names, shapes, dtypes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_state(state: dict[str, Any]) -> bytes:
    """A safetensors file of a half-done batch, see `smi.resumption`: its tensors, and all else as JSON with a hash."""
    tensors = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    extra = {name: value for name, value in state.items() if name not in tensors}
    return save(tensors, {"smi": json.dumps({**extra, "sha256": hash_of(tensors, extra)})})


def decode_state(data: bytes) -> dict[str, Any]:
    """What `encode_state` wrote. Raises any of `DAMAGE`."""
    tensors, extra = _parted(data)
    return {**tensors, **extra}


def _parted(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a file in memory, compared with the hash in it. Raises any of `DAMAGE`."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    extra = dict(json.loads(header["__metadata__"]["smi"]))
    if extra.pop("sha256") != hash_of(tensors, extra):
        raise ValueError("other numbers than were written")
    return tensors, extra


def decode(file: Path) -> Result:
    """The batch in a file, memory-mapped. Raises what damage makes of it: any of `DAMAGE`."""
    with safe_open(file, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
        return _assemble(tensors, json.loads((shard.metadata() or {})["smi"]))


def decode_bytes(data: bytes, images: Callable[[dict[str, Tensor]], Tensor] | None = None) -> Result:
    """The result in the bytes that `encode` made, compared with the hash in them. Raises any of `DAMAGE`.

    Args:
        images: makes those of a result that was encoded without them, of its tensors.
    """
    tensors, extra = _parted(data)
    if images is not None:
        tensors["images"] = images(tensors)
    return _assemble(tensors, extra)


def _assemble(tensors: dict[str, Tensor], extra: dict[str, Any]) -> Result:
    at = extra["snapshot_at"]
    if not isinstance(at, list) or not all(isinstance(t, int) for t in at):
        raise ValueError("snapshot_at is not a list of iterations")
    fields: dict[str, Any] = {name: tensors[name] for name in DTYPES}
    return Result(
        **fields,
        losses={name.removeprefix("loss."): values for name, values in tensors.items() if name.startswith("loss.")},
        history={name.removeprefix("history."): v for name, v in tensors.items() if name.startswith("history.")},
        snapshot_at=at,
        phases=[build(Phase, phase) for phase in extra["phases"]],
        tries=int(extra.get("tries", 1)),
        peak_memory=None if extra.get("peak_memory") is None else int(extra["peak_memory"]),
    )


def build(kind: type[Plain], data: Any) -> Plain:
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
        if items[-1] is Ellipsis and items[0] is not str:  # perhaps a million: by their types, of which there are few
            return set(map(type, value)) <= ({int, float} if items[0] is float else {items[0]})
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(value) == len(items) and all(map(_fits, value, items))
    if isinstance(value, str):
        value.encode()  # half a surrogate pair, which JSON may hold, raises what a damaged file does
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)
