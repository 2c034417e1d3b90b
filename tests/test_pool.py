"""Pools on disk: exact round trips, resumption after a cut at any point, and one-line errors for everything damaged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pools import CONFIG, INFO, LABELS, PLAN, assert_same, files_of, fill_pool, make_result, open_writer
from safetensors import safe_open

from smi import provenance
from smi.config import Config
from smi.errors import SmiError
from smi.pool import Pool, PoolWriter, slug, to_pixels
from smi.report import summary, write_report
from smi.state import Result, WorkPlan

SHARD = "shards/00000.safetensors"
fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def pool(path: Path) -> Pool:
    return Pool(fill_pool(path))


def one_line(call: Callable[[], Any], *words: str) -> None:
    """`call` raises `SmiError`, one line that ends like a sentence and says all `words`."""
    with pytest.raises(SmiError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_round_trip_is_bit_exact(pool: Pool) -> None:
    assert (pool.info, pool.config, pool.plan) == (INFO, CONFIG.resolved(), PLAN)
    assert (len(pool), pool.complete, pool.batches) == (7, True, [0, 1, 2])
    for batch, result in enumerate(pool):
        assert_same(result, make_result(batch))


def test_manifest_records_where_it_comes_from(pool: Pool) -> None:
    assert pool.manifest["format"] == "smi-pool"
    assert pool.manifest["format_version"] == 1
    assert pool.manifest["device"] == "cpu"
    assert {"smi", "torch", "timm", "torchvision", "python"} <= set(pool.manifest["versions"])
    assert pool.manifest["versions"] == provenance.versions()
    assert pool.manifest["plan"] == {"targets": list(PLAN.targets), "batch_size": 3}


def test_versions_name_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "smi").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "smi" / "provenance.py"))
    local = provenance._local.__wrapped__
    assert local() == ""
    git("init", "--quiet")
    assert local() == "", "a checkout without a commit"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "--message", "m")
    git("tag", "v1")
    assert local() == f"+g{git('rev-parse', 'HEAD')[:12]}"
    (tmp_path / "a").write_text("2")
    assert local() == f"+g{git('rev-parse', 'HEAD')[:12]}.dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local() == "", "no git"


def test_peak_memory_is_kept_where_it_was_measured(path: Path) -> None:
    """And where it was not, the shard is what earlier versions wrote, to the last bit."""
    writer = open_writer(path)
    writer.write(0, make_result(0))
    extra = json.loads(read_header(path / SHARD)["smi"])
    assert set(extra) == {"snapshot_at", "phases", "tries", "sha256"}
    assert Pool(path).load(0).peak_memory is None and summary(path)["peak_memory_bytes"] is None
    for batch, peak in ((1, 5 * 2**30), (2, 4 * 2**30)):
        writer.write(batch, dataclasses.replace(make_result(batch), peak_memory=peak))
        assert Pool(path).load_verified(batch).peak_memory == peak
    assert summary(path)["peak_memory_bytes"] == 5 * 2**30
    assert "<td>peak memory</td><td><code>5,120 MiB</code>" in write_report(path).read_text()


def read_header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as shard:
        return dict(shard.metadata())


def test_special_floats_and_empty_parts_survive(path: Path) -> None:
    result = make_result(0)
    result.images[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    result.snapshots, result.snapshot_at, result.history, result.losses = result.snapshots[:0], [], {}, {}
    open_writer(path).write(0, result)
    loaded = Pool(path).load(0)
    assert torch.equal(loaded.images.view(torch.int32), result.images.view(torch.int32))
    assert (loaded.snapshots.shape, loaded.history, loaded.losses) == (result.snapshots.shape, {}, {})


def test_pictures_are_rounded_and_clipped(pool: Pool) -> None:
    files = sorted(file.name for file in (pool.path / "png").iterdir())
    assert files[:4] == [
        "000000_etc-passwd.png",
        "000001_great-white-shark-sp.png",
        "000002_a-b-c.png",
        "000003_3.png",
    ]
    images = make_result(0).images
    expected = to_pixels(images[1], INFO).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(pool.path / "png" / files[1])), expected)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (INFO.mean, INFO.std))
    exact = np.rint(np.clip(images.numpy() * std + mean, 0, 1) * np.float32(255))
    assert np.array_equal(to_pixels(images, INFO).numpy(), exact)
    levels = torch.arange(256)[:, None, None, None].expand(-1, 3, 1, 1) / 255
    assert torch.equal(
        to_pixels((levels - torch.tensor(mean)) / torch.tensor(std), INFO)[:, 0, 0, 0].int(), torch.arange(256)
    )


def test_one_channel(path: Path) -> None:
    info = dataclasses.replace(INFO, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    fill_pool(path, info)
    assert Image.open(path / "png" / "000003_3.png").mode == "L"
    assert_same(Pool(path).load(0), make_result(0, info))


@fuzz
@given(st.text())
def test_labels_cannot_leave_the_folder(label: str) -> None:
    name = slug(label)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= 60
    assert not name.startswith("-")


def test_hostile_labels_write_inside_only(tmp_path: Path, pool: Pool) -> None:
    assert LABELS[0].startswith("..")
    assert [file.name for file in tmp_path.iterdir()] == ["pool"]
    assert all(name.count("/") <= 1 for name in files_of(pool.path))


def test_resume_makes_only_what_is_missing(path: Path) -> None:
    writer = open_writer(path)
    assert writer.missing == [0, 1, 2]
    writer.write(1, make_result(1))
    created = Pool(path).manifest
    writer = open_writer(path)
    assert writer.missing == [0, 2]
    assert (len(Pool(path)), Pool(path).complete, Pool(path).batches) == (3, False, [1])
    assert Pool(path).manifest == created
    one_line(lambda: Pool(path).load(0), "no batch 0")


def test_an_opened_pool_does_not_change(path: Path) -> None:
    writer = open_writer(path)
    pool = Pool(path)
    writer.write(0, make_result(0))
    assert (len(pool), len(Pool(path))) == (0, 3)


class PowerCutError(BaseException):
    """Not an `Exception`, as a kill is not: nothing may handle it."""


class PowerCut:
    """Lets `after` file system calls through; at the next one the process "dies" and no later call does anything."""

    CALLS = ("fsync", "replace", "unlink", "mkdir", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left, self.dead = after, False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.dead and self.left == 0 and name == "fsync":
                os.truncate(args[0], os.fstat(args[0]).st_size // 2)  # what a cut in the middle of writing leaves
            self.dead = self.dead or self.left == 0
            if self.dead:
                raise PowerCutError
            self.left -= 1
            if name == "fsync":
                return None  # slow, and nothing a simulated cut can tell
            return call(*args, **kwargs)

        return counted


def cut_everywhere(act: Callable[[], Any]) -> Iterator[int]:
    """Runs `act` again and again, each time dying one file system call later, until it gets through."""
    for after in range(1000):
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut = PowerCut(monkeypatch, after)
            try:
                act()
            except PowerCutError:
                assert cut.dead
            else:
                assert not cut.dead
                return
        yield after
    raise AssertionError("never got through")


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "manifest.json"}


def test_a_kill_at_any_point_loses_at_most_one_batch(tmp_path: Path) -> None:
    whole = without_manifest(files_of(fill_pool(tmp_path / "whole")))
    path = tmp_path / "pool"
    points = 0
    for _ in cut_everywhere(lambda: fill_pool(path)):
        points += 1
        if (path / "manifest.json").exists():
            for batch, result in zip(Pool(path).batches, Pool(path), strict=True):
                assert_same(result, make_result(batch))
        fill_pool(path)
        assert Pool(path).complete
        assert without_manifest(files_of(path)) == whole
        shutil.rmtree(path)
    assert points > 30


def test_a_kill_while_overwriting_leaves_a_pool(tmp_path: Path) -> None:
    whole = without_manifest(files_of(fill_pool(tmp_path / "whole")))
    path = tmp_path / "pool"
    old = CONFIG.replace(seed=6)

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        open_writer(path, config=old).write(0, make_result(0))

    prepare()
    for _ in cut_everywhere(lambda: open_writer(path, overwrite=True)):
        found = Pool(path)
        assert found.config.seed == (5 if not found.batches and found.config != old.resolved() else 6)
        list(found)
        open_writer(path, overwrite=True)
        fill_pool(path)
        assert without_manifest(files_of(path)) == whole
        prepare()


def test_overwrite_spares_what_is_not_its_own(pool: Pool) -> None:
    foreign = {"notes.txt": b"mine", "png/holiday.jpg": b"mine", "shards/readme": b"mine"}
    for name, data in foreign.items():
        (pool.path / name).write_bytes(data)
    writer = open_writer(pool.path, config=CONFIG.replace(seed=1), overwrite=True)
    assert writer.missing == [0, 1, 2]
    assert without_manifest(files_of(pool.path)) == foreign


def test_a_folder_that_is_no_pool_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        one_line(lambda: open_writer(tmp_path, overwrite=overwrite), "not a pool", "thesis.tex")  # noqa: B023
    (tmp_path / "manifest.json").write_text('{"name": "somebody\'s web app"}')
    for overwrite in (False, True):
        one_line(lambda: open_writer(tmp_path, overwrite=overwrite), "not a pool")  # noqa: B023
    assert set(files_of(tmp_path)) == {"thesis.tex", "manifest.json"}
    one_line(lambda: open_writer(tmp_path / "thesis.tex"), "thesis.tex")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"info": dataclasses.replace(INFO, name="other")}, ["name 'hand:made'", "'other'"]),
        ({"info": dataclasses.replace(INFO, weights_sha256="1" * 64)}, ["weights_sha256"]),
        ({"config": CONFIG.replace(seed=6)}, ["seed 5", "has 6"]),
        ({"config": CONFIG.replace(semantics="official")}, ["semantics 'strict'"]),
        ({"plan": WorkPlan((0, 1, 2, 3, 0, 1, 3), 3)}, ["targets"]),
        ({"plan": WorkPlan(PLAN.targets, 4)}, ["batch_size 3", "has 4"]),
    ],
)
def test_another_pool_is_not_resumed(pool: Pool, changes: dict[str, Any], words: list[str]) -> None:
    before = files_of(pool.path)
    one_line(lambda: open_writer(pool.path, **changes), "--overwrite", *words)
    assert files_of(pool.path) == before


@pytest.mark.parametrize(("old", "new"), [((), ("a", "b", "c", "d")), (("a", "b", "c", "d"), ())])
def test_a_pool_keeps_the_names_of_its_classes(path: Path, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Or one of a version that knew none could not be gone on with, and pictures would have names of two kinds."""
    open_writer(path, info=dataclasses.replace(INFO, class_names=old)).write(0, make_result(0))
    writer = open_writer(path, info=dataclasses.replace(INFO, class_names=new))
    assert writer.missing == [1, 2]
    writer.write(1, make_result(1))
    assert Pool(path).info.class_names == old
    label = old[3] if old else "3"
    assert f"000003_{label}.png" in files_of(path / "png")


def test_long_plans_are_told_apart_in_one_line(path: Path) -> None:
    open_writer(path, plan=WorkPlan((0,) * 500, 3))
    one_line(lambda: open_writer(path, plan=WorkPlan((0,) * 499 + (1,), 3)), "targets[499] 0, this run has 1")
    one_line(lambda: open_writer(path, plan=WorkPlan((0,) * 400, 3)), "500 targets, this run has 400")


def test_equivalent_configs_are_the_same_pool(pool: Pool) -> None:
    assert open_writer(pool.path, config=CONFIG.resolved()).missing == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"info": dataclasses.replace(INFO, grid=(2, 3))}, "do not fill"),
        ({"info": dataclasses.replace(INFO, class_names=("one",))}, "1 class names"),
        ({"info": dataclasses.replace(INFO, mean=(0.5,))}, "3 channels"),
        ({"plan": WorkPlan((), 3)}, "0 images"),
        ({"plan": WorkPlan((4,), 3)}, "0 to 3"),
        ({"plan": WorkPlan((-1,), 3)}, "0 to 3"),
        ({"plan": WorkPlan((0,), 0)}, "batches of 0"),
    ],
)
def test_impossible_pools_are_not_made(path: Path, changes: dict[str, Any], word: str) -> None:
    one_line(lambda: open_writer(path, **changes), word)
    assert not path.exists()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("images", lambda r: r.images[:, :, :4]),
        ("images", lambda r: r.images.double()),
        ("images", lambda r: r.images[:2]),
        ("keep", lambda r: r.keep.int()),
        ("keep", lambda r: r.keep.flip(1)),
        ("keep", lambda r: r.keep + 4),
        ("dropped_at", lambda r: r.dropped_at[:, :1]),
        ("targets", lambda r: r.targets + 1),
        ("images", lambda r: r.images[0]),
        ("logits", lambda r: r.logits[:, :1]),
        ("indices", lambda r: r.indices + 1),
        ("snapshots", lambda r: r.snapshots[:1]),
        ("losses", lambda r: {"cross_entropy": torch.zeros(1)}),
        ("history", lambda r: {"total": torch.zeros(2, 2)}),
    ],
)
def test_results_that_do_not_fit_are_refused(path: Path, field: str, change: Callable[[Result], Any]) -> None:
    writer, result = open_writer(path), make_result(0)
    setattr(result, field, change(result))
    before = files_of(path)
    one_line(lambda: writer.write(0, result), "batch 0", str(path))
    assert files_of(path) == before


def test_batches_outside_the_plan_are_refused(path: Path) -> None:
    writer = open_writer(path)
    for batch in (-1, 1, 3):
        one_line(lambda: writer.write(batch, make_result(0)), f"batch {batch}")  # noqa: B023


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_disk_full_and_read_only(path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(path)
    writer.write(0, make_result(0))
    before = files_of(path)

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        full = ["is full"] if code in (errno.ENOSPC, errno.EDQUOT) else [os.strerror(code)]
        one_line(lambda: writer.write(1, make_result(1)), str(path), *full)
        patch.setattr(os, "mkdir", refuse)
        one_line(lambda: open_writer(path.with_name("other")), "other", *full)
    assert files_of(path) == before
    fill_pool(path)
    assert Pool(path).complete


def test_no_such_pool(tmp_path: Path) -> None:
    one_line(lambda: Pool(tmp_path / "none"), "there is no pool", "none")
    one_line(lambda: Pool(tmp_path), "not a pool")
    (tmp_path / "file").write_text("x")
    one_line(lambda: Pool(tmp_path / "file"), "not a pool")


def rewrite(pool: Pool, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = copy.deepcopy(pool.manifest)
    change(manifest)
    (pool.path / "manifest.json").write_text(json.dumps(manifest))


def test_newer_formats_ask_for_an_upgrade(pool: Pool) -> None:
    rewrite(pool, lambda m: m.update(format_version=2))
    one_line(lambda: Pool(pool.path), "version 2", "upgrade")
    for overwrite in (False, True):
        one_line(lambda: open_writer(pool.path, overwrite=overwrite), "version 2")  # noqa: B023


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format_version="1"),
        lambda m: m.pop("model"),
        lambda m: m["model"].pop("grid"),
        lambda m: m["model"].update(grid=[2, 2, 2]),
        lambda m: m["model"].update(colour="red"),
        lambda m: m.update(plan=[1, 2]),
        lambda m: m["plan"].update(targets=[0, "1"]),
        lambda m: m["plan"].update(targets=[0, 9]),
        lambda m: m["config"].update(seed=-1),
        lambda m: m["config"].update(colour="red"),
        lambda m: m.update(config=3),
    ],
)
def test_damaged_manifests_are_named(pool: Pool, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(pool, change)
    one_line(lambda: Pool(pool.path), "manifest.json", "damaged")


def test_a_shard_that_may_not_be_read_is_not_called_damaged(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(file: Path) -> Result:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("smi.pool.decode", denied)
    with pytest.raises(SmiError, match=r"cannot read the shard '.*00000\.safetensors': Permission denied\.$"):
        pool.load(0)


@fuzz
@given(st.integers(0), st.binary(max_size=8))
def test_no_manifest_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("pool") / "p"
    open_writer(path)
    data = (path / "manifest.json").read_bytes()
    at %= len(data)
    (path / "manifest.json").write_bytes(data[:at] + noise)
    one_line(lambda: Pool(path))
    (path / "manifest.json").write_bytes(data[:at] + noise + data[at + len(noise) :])
    with contextlib.suppress(SmiError):
        Pool(path)


@fuzz
@given(st.integers(0))
def test_truncated_shards_are_named(pool: Pool, at: int) -> None:
    data = (pool.path / "shards/00001.safetensors").read_bytes()
    (pool.path / SHARD).write_bytes(data[: at % len(data)])
    one_line(lambda: pool.load(0), "00000.safetensors", "delete it")
    assert_same(pool.load(1), make_result(1))


@fuzz
@given(st.integers(0), st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")), st.booleans())
def test_no_shard_bytes_crash_the_reader(pool: Pool, at: int, noise: bytes, header: bool) -> None:
    data = bytearray((pool.path / "shards/00001.safetensors").read_bytes())
    at %= 1500 if header else len(data)
    data[at : at + 8] = noise
    (pool.path / SHARD).write_bytes(data)
    one_line(lambda: pool.load(0), "damaged")  # images 3 to 5 are not batch 0, whatever the noise did


def test_a_deleted_shard_is_made_anew(pool: Pool) -> None:
    whole = files_of(pool.path)
    (pool.path / SHARD).unlink()
    one_line(lambda: pool.load(0), "00000.safetensors", "No such file")
    fill_pool(pool.path)
    assert files_of(pool.path) == whole


def test_nothing_on_disk_is_pickle(pool: Pool) -> None:
    assert {Path(name).suffix for name in files_of(pool.path)} == {".json", ".safetensors", ".png"}


def test_writer_takes_strings_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PoolWriter("a/b", INFO, Config(batch_size=3), PLAN, device="cpu").write(0, make_result(0))
    assert len(Pool("a/b")) == 3
