"""Packed pools that are damaged or made to do harm: an error that names the file, and nothing else happens."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pools import INFO, PLAN, assert_same, files_of, fill_pool, make_result

import smi
from smi import packed
from smi.index import IndexWriter
from smi.packed import open_pool, pack
from smi.pool import Pool
from smi.pool_tools import stats, verify
from smi.shard import encode
from smi.tar import END, MAX_RECORD, encode_record, records

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_pool(tmp_path_factory.mktemp("source") / "pool")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(source, tmp_path_factory.mktemp("made") / "packed", shard_images=4).path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_no_byte_can_change_unseen(copy: Path) -> None:
    """Any one bit of the tar files, drawn at random, and the rows of the index."""
    draw = np.random.default_rng(0)
    for name in ("shard-000000.tar", "shard-000001.tar"):
        file = copy / name
        good = file.read_bytes()
        for place in draw.integers(len(good) - len(END), size=25):
            bad = bytearray(good)
            bad[place] ^= 1 << int(draw.integers(8))
            file.write_bytes(bad)
            assert any(name in problem for problem in verify(copy).problems), place
        file.write_bytes(good)
    assert not verify(copy).problems


def bare(name: str, size: int = 0, **values: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = size
    for key, value in values.items():
        setattr(header, key, value)
    return header.tobuf(tarfile.GNU_FORMAT)


GOOD = encode_record("00000003", {"cls": b"1", "png": b"x"})
HOSTILE = {
    "absolute": (bare("/etc/passwd"), "not a plain file"),
    "parent": (bare("../00000000.png"), "not a plain file"),
    "folder": (bare("00000000.png", type=tarfile.DIRTYPE), "not a plain file"),
    "link": (bare("00000000.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
    "hard link": (bare("00000000.png", type=tarfile.LNKTYPE, linkname="00000001.png"), "not a plain file"),
    "device": (bare("00000000.png", type=tarfile.CHRTYPE), "not a plain file"),
    "pipe": (bare("00000000.png", type=tarfile.FIFOTYPE), "not a plain file"),
    "sparse": (bare("00000000.png", type=tarfile.GNUTYPE_SPARSE), "not a plain file"),
    "long name": (bare("x" * 300 + ".png"), "not a plain file"),
    "pax": (bare("00000000.png", type=tarfile.XHDTYPE, size=2**40), "not a plain file"),
    "huge": (bare("00000000.png", 2**62), "declares 4611686018427387904 bytes"),
    "negative": (bare("00000000.png")[:124] + b"\xff" * 12, "damaged"),
    "too large": (bare("00000000.png", MAX_RECORD), "declares"),
    "cut off": (bare("00000000.png", 4096) + b"x" * 512, "cut off"),
    "half a header": (bare("00000000.png")[:100], "header is damaged"),
    "double member": (bare("00000000.png") + bare("00000000.png"), "there twice"),
    "double key": (GOOD + bare("00000004.png") + GOOD, "double, or out of order"),
    "backwards": (GOOD + bare("00000002.png"), "double, or out of order"),
    "after the end": (GOOD + END + bare("00000004.png"), "follows the end"),
    "endless end": (GOOD + END + bytes(2**20), "follows the end"),
    "noise": (bytes(range(256)) * 8, "header is damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tar_files_are_refused(kind: str) -> None:
    data, said = HOSTILE[kind]
    with pytest.raises(ValueError, match=said):
        list(records(io.BytesIO(data)))


def test_an_archive_cannot_leave_its_folder(copy: Path, tmp_path: Path) -> None:
    """Whatever a tar file says, what is read of it is in memory: no file appears anywhere."""
    before = set(files_of(tmp_path))
    shard = copy / "shard-000000.tar"
    good = shard.read_bytes()
    for name in ("absolute", "parent", "link", "huge", "double key"):
        shard.write_bytes((HOSTILE[name][0] + good)[: len(good)])
        pool = open_pool(copy)
        with pytest.raises(smi.SmiError, match=r"shard-000000.tar' is damaged .*; restore it"):
            pool.load(0)
        assert verify(copy).problems
        assert set(files_of(tmp_path)) == before


def rewrite(folder: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    rows = parquet.read_table(folder / "index.parquet").to_pylist()
    change(rows)
    with IndexWriter(folder / "index.parquet") as index:
        for row in rows:
            index.add(row)


INDEXES: dict[str, tuple[Callable[[list[dict[str, object]]], object], str]] = {
    "outside": (lambda rows: rows[3].update(offset=2**40), r"points to byte \d+ of shard-000000.tar"),
    "before": (lambda rows: rows[3].update(offset=-512), "places that no image can have"),
    "all of it": (lambda rows: rows[0].update(length=2**50), "places that no image can have"),
    "crooked": (lambda rows: rows[0].update(offset=7), "not whole blocks"),
    "twice": (lambda rows: rows.insert(1, rows[0]), "7 planned images"),
    "twice instead": (lambda rows: rows.__setitem__(1, rows[0]), "do not ascend"),
    "beyond the plan": (lambda rows: rows[6].update(index=7), "within 0 to 6"),
    "another shard": (lambda rows: [row.update(shard=9) for row in rows[4:]], "not counted from 0"),
    "missing image": (lambda rows: rows.pop(1), "lacks images of a batch"),
    "empty": (lambda rows: rows.clear(), "0 rows"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_lying_index_is_refused(copy: Path, kind: str) -> None:
    change, said = INDEXES[kind]
    rewrite(copy, change)
    with pytest.raises(smi.SmiError, match=said):
        open_pool(copy)


def test_an_index_that_points_to_another_image_is_found(copy: Path) -> None:
    def swap(rows: list[dict[str, object]]) -> None:
        places = [{key: row[key] for key in ("offset", "length")} for row in rows[:2]]
        rows[0].update(places[1])
        rows[1].update(places[0])

    rewrite(copy, swap)
    with pytest.raises(smi.SmiError, match="image 0 does not lie where the index says"):
        open_pool(copy).load(0)
    assert "image 0 has offset 0, and the index says" in verify(copy).problems[0]
    rewrite(copy, swap)
    rewrite(copy, lambda rows: rows[5].update({"class": 3}))
    assert verify(copy).problems == ["shard-000001.tar: image 5 has class 1, and the index says 3."]
    rewrite(copy, lambda rows: rows[5].update({"class": 1, "sha256": bytes(32)}))
    (problem,) = verify(copy).problems
    assert re.fullmatch(
        rf"shard-000001.tar: image 5 has sha256 [0-9a-f]{{64}}, and the index says {'0' * 64}\.", problem
    )
    rewrite(copy, lambda rows: rows[5].update({"class": 4}))
    with pytest.raises(smi.SmiError, match="names classes that the model lacks"):
        stats(copy)


def test_other_parquet_files_and_none(copy: Path) -> None:
    import pyarrow

    file = copy / "index.parquet"
    good = file.read_bytes()
    parquet.write_table(pyarrow.table({"key": ["a"], "index": [0]}), file)
    with pytest.raises(smi.SmiError, match="its columns are key, index, or of other types"):
        open_pool(copy)
    table = parquet.ParquetFile(io.BytesIO(good)).read()
    bomb = pyarrow.array(["x" * 2**20] * 7)
    parquet.write_table(table.set_column(6, table.schema.field("label"), bomb), file, compression="zstd")
    with pytest.raises(smi.SmiError, match="unpacks to more than an index can have"):
        open_pool(copy)
    for data in (b"", b"PAR1", b"x" * 100, good[:-20], good[:50] + good[-50:]):
        file.write_bytes(data)
        with pytest.raises(smi.SmiError, match="is damaged"):
            open_pool(copy)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(smi.SmiError, match="is not a file"):
        open_pool(copy)


def test_lost_and_strange_files(copy: Path, made: Path) -> None:
    shutil.copy(copy / "shard-000000.tar", copy / "shard-000007.tar")
    assert verify(copy).problems == ["shard-000007.tar is none of the tar files of the index; remove it."]
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(smi.SmiError, match="No such file"):
        open_pool(copy)
    os.mkfifo(copy / "shard-000001.tar")
    with pytest.raises(smi.SmiError, match=r"shard-000001.tar is not a file"):
        open_pool(copy)
    with pytest.raises(smi.SmiError, match=r"it has no manifest.json"):
        Pool(made)


def test_a_record_that_contradicts_itself(copy: Path) -> None:
    """Rewritten with right hashes: another class, another picture, another label."""
    file = copy / "shard-000000.tar"
    with open(file, "rb") as shard:
        found = list(records(shard))
    for kind, change in (("cls", b"2"), ("json", b"{}"), ("png", found[1].members["png"])):
        changed = dict(found[0].members) | {kind: change}
        datas = [encode_record(r.key, changed if r is found[0] else r.members) for r in found]
        file.write_bytes(b"".join(datas) + END)
        places = np.cumsum([0, *map(len, datas)]).tolist()

        def follow(rows: list[dict[str, object]], datas: list[bytes] = datas, places: list[int] = places) -> None:
            for row, data, place in zip(rows, datas, places, strict=False):
                row.update(offset=place, length=len(data), sha256=hashlib.sha256(data).digest())

        rewrite(copy, follow)
        assert [p for p in verify(copy).problems if f"00000000.{kind}" in p], kind


def test_pictures_that_lie_about_their_size(source: Path, tmp_path: Path) -> None:
    pool = pack(source, tmp_path / "png", pixels="png", shard_images=7)
    with open(pool.path / "shard-000000.tar", "rb") as shard:
        record = next(records(shard))
    for picture in (Image.new("RGB", (5000, 8)), Image.new("L", (8, 8)), None):
        file = io.BytesIO(b"GIF89a nothing")
        if picture is not None:
            picture.save(file, "PNG")
        wrong = dataclasses.replace(record, members=record.members | {"png": file.getvalue()})
        with pytest.raises(ValueError, match="a picture cannot be read"):
            packed.decode_record(wrong, INFO, PLAN, "png")
    for change, said in (
        ({"safetensors": b"\xff" * 64}, "header"),
        ({"safetensors": encode(make_result(0), {})}, "keep is 3x2 torch.int64, expected 1x"),
    ):
        with pytest.raises(packed.DAMAGE, match=said):
            packed.decode_record(dataclasses.replace(record, members=record.members | change), INFO, PLAN, "png")


def test_damage_of_any_kind_is_said(copy: Path) -> None:
    """Bytes drawn at random, in what is decoded and in the index: an error of ours, or no difference."""
    draw = np.random.default_rng(1)
    with open(copy / "shard-000000.tar", "rb") as shard:
        record = next(records(shard))
    for kind in ("safetensors", "png"):
        for _ in range(150):
            data = bytearray(record.members[kind])
            for place in draw.integers(min(len(data), 400), size=3):
                data[place] = draw.integers(256)
            with contextlib.suppress(packed.DAMAGE):
                changed = dataclasses.replace(record, members=record.members | {kind: bytes(data)})
                packed.decode_record(changed, INFO, PLAN, "float32" if kind == "safetensors" else "png")
    file = copy / "index.parquet"
    good = file.read_bytes()
    for _ in range(100):
        bad = bytearray(good)
        for place in draw.integers(len(good), size=2):
            bad[place] = draw.integers(256)
        file.write_bytes(bad)
        with contextlib.suppress(smi.SmiError):
            if not verify(copy).problems:
                assert_same(open_pool(copy).load(0), make_result(0))


@pytest.mark.parametrize("words", ['{"tries": Infinity}', '{"snapshot_at": 3}', "[" * 5000, "[1]", '{"phases": [7]}'])
def test_hostile_metadata_with_the_right_hash(words: str) -> None:
    """What only malice writes: the hash is computed anew over nonsense."""
    from safetensors.torch import load, save

    from smi.shard import decode_bytes, hash_of

    data = encode(make_result(0))
    tensors = load(data)
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        extra = {"snapshot_at": [2, 6], "phases": [], "tries": 1} | json.loads(words)
        words = json.dumps(extra | {"sha256": hash_of(tensors, extra)})
    with pytest.raises(packed.DAMAGE):
        decode_bytes(save(tensors, {"smi": words}))
