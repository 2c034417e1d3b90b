"""smi pool: that damage is found wherever it is, and that parts become the whole."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import CLASSES, one_thread, tiny  # noqa: F401
from typer.testing import CliRunner

import smi
from smi.cli import app
from smi.pool import Pool
from smi.pool_tools import merge, stats, verify
from smi.run import run

CONFIG = smi.Config(iterations=3, prune_at=(1,), prune_ratio=(0.5,), batch_size=2, snapshots=1)
PLAN = smi.WorkPlan(tuple(i % CLASSES for i in range(7)), 2)


@pytest.fixture(scope="module")
def model() -> smi.SparseModel:
    return smi.SparseModel(tiny(), name="tiny", backend="reference")


@pytest.fixture(scope="module")
def whole(model: smi.SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pools") / "whole"
    run(model, PLAN, CONFIG, path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_whole_pool_has_no_problems(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(whole, lambda *at: seen.append(at))
    assert (found.batches, found.images, found.missing, found.unhashed, found.problems) == (4, 7, 0, 0, [])
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_byte_of_a_shard_can_change_unseen(copy: Path) -> None:
    """Any one bit of what follows the length of the header, drawn at random."""
    draw, file = random.Random(0), copy / "shards" / "00001.safetensors"
    good = file.read_bytes()
    for _ in range(60):
        place = draw.randrange(8, len(good))
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            same = load_file(file).keys() and Pool(copy).load(1)
        except Exception:
            same = None
        found = verify(copy)
        if same is not None and _equal(file, good):  # a name in the header that nobody reads
            continue
        assert found.problems and "00001.safetensors" in found.problems[0], place
    file.write_bytes(good)
    assert not verify(copy).problems


def _equal(file: Path, good: bytes) -> bool:
    """Whether a file says the same as `good` in every tensor and in its hash."""
    other = file.with_suffix(".good")
    other.write_bytes(good)
    with safe_open(file, "pt") as one, safe_open(other, "pt") as two:
        words = [json.loads((part.metadata() or {}).get("smi", "{}")) for part in (one, two)]
    mine, theirs = load_file(file), load_file(other)
    other.unlink()
    same = mine.keys() == theirs.keys() and all(
        mine[key].dtype == theirs[key].dtype
        and mine[key].shape == theirs[key].shape
        and torch.equal(mine[key].flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8))
        for key in mine
    )
    return same and words[0] == words[1]


def test_what_else_can_be_wrong(copy: Path) -> None:
    next((copy / "png").glob("000003*")).unlink()
    (copy / "shards" / "00000.safetensors").unlink()
    file = copy / "shards" / "00002.safetensors"
    with safe_open(file, "pt") as shard:
        words = json.loads(shard.metadata()["smi"])
    tensors = load_file(file)
    tensors["images"][0, 0, 0, 0] = torch.nan
    del words["sha256"]
    save_file(tensors, file, {"smi": json.dumps(words)})
    found = verify(copy)
    assert (found.batches, found.images, found.missing, found.unhashed) == (3, 5, 1, 1)
    first, second = found.problems
    assert (
        first.startswith("batch 1 lacks 1 of its pictures, '000003_")
        and second == "batch 2 has images that are not finite."
    )
    shown = CliRunner().invoke(app, ["pool", "verify", str(copy)])
    assert shown.exit_code == 1 and "3 batches with 5 images are whole, 1 are not made yet" in shown.output


def test_parts_become_the_whole(model: smi.SparseModel, whole: Path, tmp_path: Path) -> None:
    parts = [tmp_path / str(i) for i in range(3)]
    named = smi.SparseModel(model.original, name="tiny", backend="reference", class_names=list("abcde"))
    for i, part in enumerate(parts):  # one of them of a version that had names for the classes
        run(named if i == 1 else model, PLAN, CONFIG, part, shard=(i, 3))
    merged = merge(parts[:2], tmp_path / "out")
    assert merged.batches == [0, 1, 3]
    shown = CliRunner().invoke(app, ["pool", "merge", *map(str, parts), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "7 of 7 images, 4 of 4 batches" in shown.output.replace("\n", " "), shown.output
    for batch in range(4):
        assert torch.equal(Pool(tmp_path / "out").load(batch).images, Pool(whole).load(batch).images)
    assert sorted(f.name for f in (tmp_path / "out/png").iterdir()) == sorted(f.name for f in (whole / "png").iterdir())
    assert not verify(tmp_path / "out").problems


def test_a_batch_that_two_pools_made_is_the_same_however_long_it_took(
    model: smi.SparseModel, whole: Path, tmp_path: Path
) -> None:
    run(model, PLAN, CONFIG, tmp_path / "again")
    seconds = [[phase.seconds for phase in Pool(path).load(0).phases] for path in (whole, tmp_path / "again")]
    assert seconds[0] != seconds[1]
    assert merge([whole, tmp_path / "again"], tmp_path / "out").complete


def test_what_cannot_be_merged_is_said(model: smi.SparseModel, whole: Path, copy: Path, tmp_path: Path) -> None:
    run(model, PLAN, CONFIG.replace(seed=5), tmp_path / "other")
    with pytest.raises(smi.SmiError, match="differ in their config"):
        merge([whole, tmp_path / "other"], tmp_path / "out")
    file = copy / "shards" / "00001.safetensors"
    with safe_open(file, "pt") as shard:
        words = shard.metadata()
    tensors = load_file(file)
    tensors["images"] += 1
    save_file(tensors, file, words)
    with pytest.raises(smi.SmiError, match="hold different images in batch 1"):
        merge([whole, copy], tmp_path / "out")
    with pytest.raises(smi.SmiError, match=r"00001.safetensors' holds other numbers than were written"):
        merge([copy], tmp_path / "out")
    with pytest.raises(smi.SmiError, match="no pools were given"):
        merge([], tmp_path / "out")
    assert not (tmp_path / "out" / "shards" / "00001.safetensors").exists()


def test_stats_count_what_is_there(whole: Path) -> None:
    found = stats(whole)
    results = list(Pool(whole))
    assert found["images"] == found["planned"] == 7 and sum(found["classes"].values()) == 7
    assert found["classes"]["0"] == 2 and found["classes"]["4"] == 1
    assert found["teacher_agreement"] == pytest.approx(
        sum(int((r.logits.argmax(1) == r.targets).sum()) for r in results) / 7
    )
    assert found["bytes"]["shards"] == sum(f.stat().st_size for f in (whole / "shards").iterdir())
    shown = json.loads(CliRunner().invoke(app, ["pool", "stats", str(whole), "--json"]).output)
    assert shown["flops"] == sum(phase.flops for r in results for phase in r.phases)
    assert "7 of 7 images of tiny" in CliRunner().invoke(app, ["pool", "stats", str(whole)]).output
