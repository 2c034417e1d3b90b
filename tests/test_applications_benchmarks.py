"""The two benchmarks of what images are worth: what they draw, count and keep, on settings that take seconds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import one_thread  # noqa: F401
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import smi
from benchmarks import hallucination, table_of_truth
from smi.embedded import CLASSES


def command(monkeypatch: pytest.MonkeyPatch, module: Any, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, args)])
    module.main()


# --- the table of truth ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of noise in each of ten folders, in ``test`` as a test set and in ``train`` as real images."""
    folder, noise = tmp_path_factory.mktemp("pictures") / "test", torch.Generator().manual_seed(0)
    folder.mkdir()
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(6):
            to_pil_image(torch.rand(3, 32, 32, generator=noise)).save(folder / name / f"{number}.png")
    shutil.copytree(folder, folder.parent / "train")
    return folder.parent


@pytest.fixture
def truth(pictures: Path, tmp_path: Path) -> list[object]:
    config = smi.preset("demo").replace(iterations=8, prune_at=(2,), prune_ratio=(0.75,), batch_size=20)
    config.save(tmp_path / "short.yaml")
    return [
        *(
            "--work",
            tmp_path / "work",
            "--out",
            tmp_path / "out",
            "--test",
            pictures / "test",
            "--real",
            pictures / "train",
        ),
        *("--preset", tmp_path / "short.yaml", "--images", 40, "--limit", 30, "--seeds", 1, "--epochs", 1),
        *("--device", "cpu", "--columns", "linear probe"),
    ]


def test_the_table_has_a_figure_for_every_source_and_seed(
    truth: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, table_of_truth, *truth)
    (file,) = (tmp_path / "out").glob("*.json")
    record = json.loads(file.read_text())
    assert list(record["rows"]) == list(table_of_truth.ROWS)
    for name, row in record["rows"].items():
        assert [0 <= found["top1"] <= 1 for found in row["cells"]["linear probe"]] == [True], name
    # 2 of 8 iterations with 64 patches and 6 with 16, where dense has 8 with 64.
    model = smi.SparseModel(smi.load_model("embedded:teacher"))
    full, few = (smi.flops.count_flops(model, kept) for kept in (64, 16))  # type: ignore[attr-defined]
    assert record["rows"]["dense"]["gflop_per_image"] == pytest.approx(8 * full / 1e9)
    assert record["rows"]["sparse official"]["gflop_per_image"] == pytest.approx((2 * full + 6 * few) / 1e9)
    # Four images of each trajectory: a quarter of its patches leaves every two iterations.
    shared = sum(2 * smi.flops.count_flops(model, kept) for kept in (64, 48, 32, 16)) / 4  # type: ignore[attr-defined]
    assert record["rows"]["rebirth"]["gflop_per_image"] == pytest.approx(shared / 1e9)
    equal = record["rows"][table_of_truth.EQUAL_COST]
    assert equal["images"] == round(40 * 8 * full / (2 * full + 6 * few))
    assert record["cost"]["dense"]["seconds_per_image"] > 0 and record["cost"]["dense"]["peak_bytes"] is None
    same = [smi.Pool(tmp_path / "work/pools" / name).load(0) for name in ("sparse-strict-1", "sparse-strict-at-the-cost-of-dense-1")]  # fmt: skip  # noqa: E501
    assert torch.equal(same[0].images, same[1].images)

    # The same command measures nothing again, and another setting is refused.
    monkeypatch.setattr(smi, "teach", lambda *_, **__: pytest.fail("taught again"))
    command(monkeypatch, table_of_truth, *truth)
    assert json.loads(file.read_text())["rows"] == record["rows"]
    with pytest.raises(smi.SmiError, match="figures of other settings"):
        command(monkeypatch, table_of_truth, *truth, "--images", 60)
    with pytest.raises(smi.SmiError, match="figures of other --test images"):
        command(monkeypatch, table_of_truth, *truth, "--test", tmp_path)


def test_real_images_are_of_their_class_and_other_ones_for_another_seed(truth: list[object], tmp_path: Path) -> None:
    parser = table_of_truth.arguments()
    bench = table_of_truth.Bench(parser.parse_args([str(value) for value in truth]))
    one, other = (bench.pool("real images", seed).load(0) for seed in (1, 2))
    assert one.targets.tolist() == [*range(10), *range(10)]
    assert not torch.equal(one.images, other.images)
    # Every picture is one of its folder's.
    read = table_of_truth.data_transform(table_of_truth.data_config(bench.network))
    for image, target in zip(one.images, one.targets.tolist(), strict=True):
        theirs = [read(Image.open(file)) for file in (Path(bench.real) / CLASSES[target]).iterdir()]
        assert any(torch.equal(image, picture) for picture in theirs)
    with torch.no_grad():
        torch.testing.assert_close(one.logits, bench.network(one.images), rtol=1e-3, atol=1e-3)


def test_real_images_are_of_their_class_where_folders_sort_otherwise(truth: list[object], pictures: Path) -> None:
    bench = table_of_truth.Bench(table_of_truth.arguments().parse_args([str(value) for value in truth]))
    bench.model.info = dataclasses.replace(bench.model.info, class_names=CLASSES[::-1])
    (image,) = bench._real(bench.plan(10), 1)(range(2, 3))
    read = table_of_truth.data_transform(table_of_truth.data_config(bench.network))
    for name in CLASSES:
        own = [torch.equal(image, read(Image.open(file))) for file in (pictures / "train" / name).iterdir()]
        assert any(own) is (name == CLASSES[-3])


def test_real_images_are_none_of_a_data_sets_test_images(
    truth: list[object], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for images in ("cifar10:data", pictures / "test"):
        with pytest.raises(smi.SmiError, match="would be the test images"):
            command(monkeypatch, table_of_truth, *truth, "--real", images)


def test_a_quantized_cell_is_the_accuracy_of_a_network_calibrated_on_the_pool(truth: list[object]) -> None:
    pytest.importorskip("torchao")
    from smi.calibration import from_pool

    args = table_of_truth.arguments().parse_args([*(str(value) for value in truth[:-1]), "W4A4 minmax"])
    bench = table_of_truth.Bench(args)
    (cell,) = table_of_truth.cells(args, bench).values()
    pool = bench.pool("gaussian noise", 1)
    made = smi.quantize(bench.network, from_pool(pool, images=32), weights=4, activations=4)
    images, labels = bench.dataset(made.data).tensors
    right = (made.model(images).argmax(1) == labels).float().mean().item()
    assert cell("gaussian noise", 1)["top1"] == pytest.approx(right)


# --- hallucination ---


def test_the_background_goes_with_the_class_as_often_as_asked() -> None:
    def ground(matched: float, conflicting: bool = False) -> tuple[Tensor, Tensor]:
        """The class whose colour a background has, and the label."""
        pixels, labels, grounds, foreground = hallucination.draw(600, 5, matched, conflicting)
        mean = torch.stack([p[:, ~f].mean(1) for p, f in zip(pixels, foreground, strict=True)])
        hues = torch.arange(hallucination.CLASSES) / hallucination.CLASSES
        wheel = 0.5 + 0.3 * torch.cos(2 * torch.pi * (hues[:, None] - torch.tensor([0.0, 1 / 3, 2 / 3])))
        kind = torch.cdist(mean, wheel).argmin(1)
        assert torch.equal(kind, grounds)
        return kind, labels

    for matched, expected in ((1.0, 1.0), (0.0, 1 / 6), (0.9, 0.9 + 0.1 / 6)):
        kind, labels = ground(matched)
        assert (kind == labels).float().mean().item() == pytest.approx(expected, abs=0.05)
    kind, labels = ground(0.0, conflicting=True)
    assert (kind == labels).float().mean() < 0.01


def test_the_foreground_is_where_the_shape_is() -> None:
    """Within it the colour is one; outside there are stripes; shapes cover neither nothing nor everything."""
    pixels, _, _, foreground = hallucination.draw(100, 6, 0.9)
    for picture, mask in zip(pixels, foreground, strict=True):
        assert 8 < mask.sum() < 500
        assert picture[:, mask].std(1).max() < 0.04 < picture[:, ~mask].std(1).max()


def test_what_looks_anywhere_has_a_share_of_one_and_what_looks_at_the_shape_of_none() -> None:
    _, labels, _, foreground = hallucination.draw(20, 7, 0.0)
    images = torch.randn(20, 3, 32, 32)

    def adds(images: Tensor) -> Tensor:
        return images.sum((1, 2, 3))[:, None] * torch.arange(1, 1 + hallucination.CLASSES)

    def adds_shape(images: Tensor) -> Tensor:
        return (images * foreground[:, None]).sum((1, 2, 3))[:, None] * torch.arange(1, 1 + hallucination.CLASSES)

    for network, share in ((adds, 1.0), (adds_shape, 0.0)):
        found = hallucination.gradient(network, images, labels)
        assert hallucination.share_outside(found, foreground) == pytest.approx(share, abs=1e-5)
    cells = torch.zeros(20, 8, 8)
    cells[:, 0, 0] = 1  # a corner that no shape covers
    spread = (~foreground).float().mean((1, 2))
    assert hallucination.share_outside(cells, foreground) == pytest.approx((1 / spread).mean().item())


def test_a_reader_that_knows_all_backgrounds_and_no_shape_finds_just_that(tmp_path: Path) -> None:
    model = smi.SparseModel(hallucination.network(), name="drawn-shapes")
    images = hallucination.pool("drawn images", 1, model, 12, tmp_path, 1.0)

    class Reader:
        """Says by the colour of the first kept patch, a corner of the background, and never the right shape."""

        def feed(self, images: Tensor, keep: Tensor) -> tuple[Tensor, None]:
            assert keep.shape == (12, 64)
            hues = torch.arange(hallucination.CLASSES) / hallucination.CLASSES
            wheel = 0.5 + 0.3 * torch.cos(2 * torch.pi * (hues[:, None] - torch.tensor([0.0, 1 / 3, 2 / 3])))
            corner = (images * 0.25 + 0.5)[:, :, :2].mean((2, 3))
            ground = -torch.cdist(corner, wheel)
            return torch.cat((ground.roll(1, 1), ground), 1), None

    assert hallucination.legible(images, Reader()) == {"shape": 0.0, "ground": 1.0}


def test_the_experiment_ends_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hallucination, "BASE", hallucination.BASE.replace(iterations=81, batch_size=12))
    args = ["--images", 12, "--seeds", 1, "--steps", 2, "--reader-steps", 2, "--epochs", 1, "--tests", 30]
    command(monkeypatch, hallucination, *args, "--work", tmp_path / "work", "--out", tmp_path)
    record = json.loads((tmp_path / "hallucination-cpu.json").read_text())
    assert list(record["rows"]) == ["drawn images", *hallucination.ROWS]
    asked = {*hallucination.TESTS, "attention_outside", "gradient_outside"}
    assert set(record["teacher"]) == asked
    for (row,) in record["rows"].values():
        assert set(row) == {*asked, "shape", "ground"}
    assert (tmp_path / "hallucination-cpu.png").stat().st_size > 1000
    with pytest.raises(smi.SmiError, match="networks of other settings"):
        command(monkeypatch, hallucination, *args, "--work", tmp_path / "work", "--epochs", 2)
