"""Tiny pools made by hand, without a model: 7 images of 3 x 8 x 8 in 2 x 2 patches of 4, three batches."""

from __future__ import annotations

from pathlib import Path

import torch

from smi.config import Config
from smi.pool import PoolWriter
from smi.state import ModelInfo, Phase, Result, WorkPlan

LABELS = ("../../etc/passwd", "Great White-Shark, sp.", "a/b\\c:\0\n", "犬")
INFO = ModelInfo(
    name="hand:made",
    weights_sha256="0" * 64,
    input_size=(3, 8, 8),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    patch_size=(4, 4),
    grid=(2, 2),
    num_prefix_tokens=1,
    num_classes=4,
    ranking="class_attention",
    class_names=LABELS,
)
CONFIG = Config(iterations=6, prune_at=(2, 4), prune_ratio=(0.25, 0.3), batch_size=3, seed=5)
PLAN = WorkPlan((0, 1, 2, 3, 0, 1, 2), 3)


def make_result(batch: int, info: ModelInfo = INFO, plan: WorkPlan = PLAN) -> Result:
    """Batch `batch`: a function of its number alone, with two kept patches an image."""
    numbers = plan.batch(batch)
    count, patches = len(numbers), info.num_patches
    draw = torch.Generator().manual_seed(batch)
    keep = torch.stack([torch.randperm(patches, generator=draw)[:2].sort().values for _ in numbers])
    curves = torch.randn(2, 6, generator=draw)
    return Result(
        images=torch.randn(count, *info.input_size, generator=draw),
        keep=keep,
        dropped_at=torch.full((count, patches), 4, dtype=torch.int32).scatter_(1, keep, 6),
        targets=torch.tensor([plan.targets[i] for i in numbers]),
        indices=torch.tensor(list(numbers)),
        logits=torch.randn(count, info.num_classes, generator=draw),
        losses={"cross_entropy": torch.rand(count, generator=draw)},
        history={"cross_entropy": curves[0], "total": curves[1]},
        snapshots=torch.randint(256, (2, 1, *info.input_size), generator=draw).to(torch.uint8),
        snapshot_at=[2, 6],
        phases=[Phase(0, 2, 4, 0.5, 1000), Phase(2, 6, 2, 0.25, 10**15)],
    )


def open_writer(path: Path, **changes: object) -> PoolWriter:
    arguments = {"info": INFO, "config": CONFIG, "plan": PLAN, "device": "cpu"} | changes
    return PoolWriter(path, **arguments)  # type: ignore[arg-type]


def fill_pool(path: Path, info: ModelInfo = INFO) -> Path:
    """Write what is missing from the pool at `path`, which is then complete."""
    writer = open_writer(path, info=info)
    for batch in writer.missing:
        writer.write(batch, make_result(batch, info))
    return path


def assert_same(left: Result, right: Result) -> None:
    """Equal bit for bit."""
    for name in ("images", "keep", "dropped_at", "targets", "indices", "logits", "snapshots"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    for name in ("losses", "history"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), name
    assert (left.snapshot_at, left.phases) == (right.snapshot_at, right.phases)


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below `path` with its content."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
