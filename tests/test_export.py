"""Exports: what other programs read, and that nothing of the user's is ever lost to them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pools import INFO, LABELS, PLAN, files_of, fill_pool, make_result, open_writer

from smi import export
from smi.augment import seed_of
from smi.dataset import SyntheticDataset, fill_dropped
from smi.errors import SmiError
from smi.export import CalibrationReader, export_pool
from smi.pool import Pool, to_pixels

ARRAYS = {"README.md", "images.npy", "targets.npy", "keep.npy", "logits.npy"}
FOLDERS = ("etc-passwd-0", "great-white-shark-sp-1", "a-b-c-2", "3")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(fill_pool(tmp_path_factory.mktemp("export") / "pool"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("fill", ["as-is", "black", "mean", "noise"])
def test_imagefolder(pool: Pool, out: Path, fill: Any) -> None:
    assert export_pool(pool, out, "imagefolder", fill=fill) == out
    lines, data = lines_of(out), SyntheticDataset(pool, fill=fill)
    assert len(lines) == 7
    assert set(files_of(out)) == {"README.md", "metadata.jsonl"} | {line["file_name"] for line in lines}
    for number, line in enumerate(lines):
        image, keep, target, logits = data[number]
        assert line == {
            "file_name": f"{FOLDERS[PLAN.targets[number]]}/{number:06d}.png",
            "label": LABELS[PLAN.targets[number]],
            "target": int(target),
            "kept": 2,
            "keep": keep.nonzero()[:, 0].tolist(),
            "confidence": pytest.approx(float(logits.softmax(0)[target])),
            "logits": pytest.approx(logits.tolist(), abs=1e-5),
            "losses": {"cross_entropy": float(make_result(number // 3).losses["cross_entropy"][number % 3])},
            "seed": 5,
        }
        picture = np.asarray(Image.open(out / line["file_name"]))
        assert np.array_equal(picture, to_pixels(image, INFO).permute(1, 2, 0).numpy())


def test_unique_labels_name_their_folders(tmp_path: Path) -> None:
    unique = dataclasses.replace(INFO, class_names=("cat", "dog", "Polar Bear", "fox"))
    export_pool(fill_pool(tmp_path / "a", unique), tmp_path / "out-a", "imagefolder")
    assert sorted(p.name for p in (tmp_path / "out-a").iterdir() if p.is_dir()) == ["cat", "dog", "fox", "polar-bear"]
    nameless = dataclasses.replace(INFO, class_names=())
    export_pool(fill_pool(tmp_path / "b", nameless), tmp_path / "out-b", "imagefolder")
    assert sorted(p.name for p in (tmp_path / "out-b").iterdir() if p.is_dir()) == ["0", "1", "2", "3"]
    alike = dataclasses.replace(INFO, class_names=("crane", "dog", "crane", "crane 2"))
    export_pool(fill_pool(tmp_path / "c", alike), tmp_path / "out-c", "imagefolder")
    folders = sorted(p.name for p in (tmp_path / "out-c").iterdir() if p.is_dir())
    assert folders == ["crane-0", "crane-2", "crane-2-3", "dog-1"]


def test_torchvision_reads_the_imagefolder(pool: Pool, out: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(export_pool(pool, out, "imagefolder")))
    assert len(folder) == 7
    assert folder.classes == sorted(FOLDERS)


def test_hugging_face_reads_the_imagefolder(pool: Pool, out: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_pool(pool, out, "imagefolder")
    rows = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(rows["target"]) == sorted(PLAN.targets)
    assert {"image", "label", "keep", "kept", "confidence"} <= set(rows.column_names)
    by_file = {Path(line["file_name"]).name: line for line in lines_of(out)}
    for row in rows:
        assert row["image"].size == (8, 8)
        assert row["label"] == LABELS[row["target"]]
    assert sorted(rows["keep"]) == sorted(line["keep"] for line in by_file.values())


@pytest.mark.parametrize("fill", ["as-is", "mean"])
def test_npy(pool: Pool, out: Path, fill: Any) -> None:
    export_pool(pool, out, "npy", fill=fill)
    images, targets = np.load(out / "images.npy", mmap_mode="r"), np.load(out / "targets.npy")
    data = SyntheticDataset(pool, fill=fill)
    expected, masks, _, told = map(torch.stack, zip(*(data[i] for i in range(7)), strict=True))
    assert (images.dtype, images.shape, targets.dtype) == (np.float32, (7, 3, 8, 8), np.int64)
    assert np.array_equal(images, expected.numpy())
    assert targets.tolist() == list(PLAN.targets)
    keep, logits = np.load(out / "keep.npy"), np.load(out / "logits.npy")
    assert (keep.dtype, logits.dtype) == (np.bool_, np.float32)
    assert np.array_equal(keep, masks.numpy()) and np.array_equal(logits, told.numpy())
    assert set(files_of(out)) == ARRAYS


@pytest.mark.parametrize("format", export.FORMATS)
def test_a_card_says_what_the_images_are(pool: Pool, out: Path, format: str) -> None:
    export_pool(pool, out, format, fill="mean")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# 7 synthetic images\n") and "None is a photograph" in card and "licence" in card
    for said in ("`hand:made`", "0" * 64, "sparse, strict, 6 iterations, seed 5", pool.manifest["created"][:10]):
        assert said in card
    assert "dropped patches: mean" in card
    assert ("less the mean [0.5, 0.4, 0.3]" in card) is (format == "npy")


def test_a_result_saves_what_the_pool_of_it_exports(pool: Pool, out: Path) -> None:
    result = dataclasses.replace(make_result(0), info=INFO, config=pool.config, tries=3)
    assert result.save(out, fill="noise") == out
    whole = files_of(export_pool(pool, out.with_name("whole"), "imagefolder", fill="noise"))
    files, first = files_of(out), [line | {"seed": seed_of(5, 3)} for line in lines_of(out.with_name("whole"))[:3]]
    assert lines_of(out) == first
    assert {name: files[name] for name in files if name.endswith(".png")} == {
        line["file_name"]: whole[line["file_name"]] for line in first
    }
    assert files["README.md"].startswith(b"# 3 synthetic images\n")
    with pytest.raises(SmiError, match="already exists"):
        result.save(out)
    with pytest.raises(SmiError, match="read from a pool; export the pool"):
        pool.load(0).save(out, overwrite=True)
    with pytest.raises(SmiError, match="fill is 'white'"):
        result.save(out, fill="white", overwrite=True)  # type: ignore[arg-type]
    assert files_of(out) == files


def test_exports_of_earlier_versions_can_be_overwritten(pool: Pool, out: Path) -> None:
    export_pool(pool, out, "npy")
    for name in ARRAYS - {"images.npy", "targets.npy"}:
        (out / name).unlink()
    export_pool(pool, out, "imagefolder", overwrite=True)
    (out / "README.md").unlink()
    export_pool(pool, out, "npy", overwrite=True)
    assert set(files_of(out)) == ARRAYS


def test_incomplete_pools_export_what_is_there(tmp_path: Path, out: Path) -> None:
    open_writer(tmp_path / "pool").write(2, make_result(2))
    export_pool(tmp_path / "pool", out, "npy")
    assert np.load(out / "images.npy").shape == (1, 3, 8, 8)


def test_existing_output_is_kept_unless_it_is_an_export(pool: Pool, out: Path) -> None:
    export_pool(pool, out, "imagefolder")
    before = files_of(out)
    with pytest.raises(SmiError, match="already exists"):
        export_pool(pool, out, "npy")
    assert files_of(out) == before
    export_pool(pool, out, "npy", overwrite=True)
    assert set(files_of(out)) == ARRAYS
    (out / "notes.txt").write_text("mine")
    before = files_of(out)
    with pytest.raises(SmiError, match="not replaced"):
        export_pool(pool, out, "npy", overwrite=True)
    assert files_of(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_foreign_folders_and_files_are_never_replaced(pool: Pool, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "cats").mkdir(parents=True)
    (pictures / "cats" / "000001.png").write_bytes(b"mine")
    (tmp_path / "file").write_text("mine")
    export_pool(pool, tmp_path / "real", "npy")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "hanging").symlink_to(tmp_path / "nowhere")
    before = files_of(tmp_path)
    for name in ("pictures", "file", "link", "hanging"):
        for overwrite in (False, True):
            with pytest.raises(SmiError, match=name):
                export_pool(pool, tmp_path / name, "npy", overwrite=overwrite)
    with pytest.raises(SmiError, match="not replaced"):
        export_pool(pool, pool.path, "npy", overwrite=True)
    assert files_of(tmp_path) == before


def test_empty_folders_can_be_overwritten(pool: Pool, out: Path) -> None:
    out.mkdir()
    export_pool(pool, out, "npy", overwrite=True)
    assert (out / "images.npy").exists()


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failures_leave_everything_as_it_was(
    pool: Pool, out: Path, format: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        export_pool(pool, out, "imagefolder")
    before = files_of(out.parent)
    rename = os.rename

    def full(*args: Any) -> Any:
        if "smi-tmp" in str(args[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(*args)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(SmiError, match=r"disk that holds '.*out' is full"):
        export_pool(pool, out, format, overwrite=overwrite)
    assert files_of(out.parent) == before

    calls = iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return fill_dropped(*args)

    monkeypatch.setattr(export, "fill_dropped", interrupted)  # once for each batch
    with pytest.raises(KeyboardInterrupt):
        export_pool(pool, out, format, overwrite=overwrite)
    assert files_of(out.parent) == before
    assert [p.name for p in out.parent.iterdir()] == (["out"] if overwrite else [])


def test_what_a_killed_export_left_is_removed(pool: Pool, out: Path) -> None:
    stale, foreign = out.with_name(".out.smi-tmp-0123abcd"), out.with_name(".out.smi-tmp-mine")
    stale.mkdir(parents=True)
    foreign.mkdir()
    (stale / "images.npy").write_bytes(b"half")
    export_pool(pool, out, "npy")
    assert not stale.exists()
    assert foreign.exists()


def test_unusable_input(pool: Pool, tmp_path: Path, out: Path) -> None:
    with pytest.raises(SmiError, match="Did you mean 'imagefolder'"):
        export_pool(pool, out, "image-folder")
    with pytest.raises(SmiError, match="fill is 'white'"):
        export_pool(pool, out, "npy", fill="white")  # type: ignore[arg-type]
    with pytest.raises(SmiError, match="there is no pool"):
        export_pool(tmp_path / "none", out, "npy")
    open_writer(tmp_path / "empty")
    with pytest.raises(SmiError, match="no finished batch"):
        export_pool(tmp_path / "empty", out, "npy")
    fill_pool(tmp_path / "damaged")
    (tmp_path / "damaged/shards/00002.safetensors").write_bytes(b"\0" * 100)
    for format in export.FORMATS:
        with pytest.raises(SmiError, match=r"00002\.safetensors"):
            export_pool(tmp_path / "damaged", out, format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "empty"]


def test_relative_paths(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_pool(pool, "a/b", "npy") == tmp_path / "a" / "b"
    with pytest.raises(SmiError, match="already exists"):
        export_pool(pool, ".", "npy")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 100])
def test_calibration_reader(pool: Pool, batch_size: int) -> None:
    reader = CalibrationReader(pool, "pixels", batch_size, fill="mean")
    expected = torch.stack([item[0] for item in list(SyntheticDataset(pool, fill="mean"))])  # type: ignore[call-overload]
    for _ in range(2):
        batches = []
        while (feed := reader.get_next()) is not None:
            assert list(feed) == ["pixels"]
            assert feed["pixels"].dtype == np.float32
            batches.append(feed["pixels"])
        assert reader.get_next() is None
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert np.array_equal(np.concatenate(batches), expected.numpy())
        reader.rewind()
    assert len(list(reader)) == len(batches)


def test_calibration_reader_errors(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(SmiError, match="batch_size is 0"):
        CalibrationReader(pool, "x", 0)
    open_writer(tmp_path)
    with pytest.raises(SmiError, match="no finished batch"):
        CalibrationReader(tmp_path, "x")


def test_onnxruntime_accepts_the_reader(pool: Pool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    assert issubclass(CalibrationReader, CalibrationDataReader)
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["pixels", "w"], ["y"], strides=[4, 4])],
        "patches",
        [helper.make_tensor_value_info("pixels", real, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", real, ["n", 4, 2, 2])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        CalibrationReader(pool, "pixels", batch_size=2, fill="mean"),
        quant_format=QuantFormat.QDQ,
    )
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
