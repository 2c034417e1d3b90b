"""The report: its numbers against a pool small enough to reckon by hand, and its page against a strict reader."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from smi import report, report_figures
from smi.config import Config
from smi.errors import SmiError
from smi.pool import PoolWriter
from smi.report_data import Curve, Frame, Picture, collect, renormalise
from smi.state import ModelInfo, Phase, Result, WorkPlan

# 2 x 3 patches of 2 pixels, one prefix token, 4 classes of which 2 are used.
INFO = ModelInfo(
    name="hand:made",
    weights_sha256="0" * 64,
    input_size=(3, 4, 6),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    patch_size=(2, 2),
    grid=(2, 3),
    num_prefix_tokens=1,
    num_classes=4,
    ranking="class_attention",
    class_names=("ant", "bee", "cow", "dog"),
)
CONFIG = Config(iterations=5, prune_at=(1, 3), prune_ratio=(0.5, 0.3), batch_size=2, snapshots=1, tv2=0.5).resolved()
PLAN = WorkPlan((1, 3, 1), 2)
KEPT = (0, 4)
DROPPED = (5, 3, 1, 1, 5, 1)


def make_result(batch: int, info: ModelInfo = INFO) -> Result:
    """Batch 0: images 0 (bee, seen as ant) and 1 (dog, right); batch 1: image 2 (bee, right)."""
    numbers = PLAN.batch(batch)
    count = len(numbers)
    logits = torch.zeros(count, 4)
    for row, seen in enumerate([0, 3] if batch == 0 else [1]):
        logits[row, seen] = 50.0
    ramp = torch.linspace(-2, 2, 4 * 6).view(1, 1, 4, 6).expand(count, 3, 4, 6).contiguous()
    flat = torch.full((5,), float(batch + 1))
    return Result(
        images=ramp,
        keep=torch.tensor([KEPT] * count),
        dropped_at=torch.tensor([DROPPED] * count, dtype=torch.int32),
        targets=torch.tensor([PLAN.targets[i] for i in numbers]),
        indices=torch.tensor(list(numbers)),
        logits=logits,
        losses={"cross_entropy": torch.full((count,), float(batch + 1))},
        history={"cross_entropy": flat, "tv1": torch.zeros(5), "total": 2 * flat},
        snapshots=torch.full((3, 1, 3, 4, 6), 100, dtype=torch.uint8),
        snapshot_at=[1, 3, 5],
        phases=[Phase(0, 1, 6, 0.5, 70 * count), Phase(1, 3, 3, 0.25, 80 * count), Phase(3, 5, 2, 0.25, 60 * count)],
    )


def dense_result(batch: int) -> Result:
    result = make_result(batch)
    count = len(result.targets)
    return dataclasses.replace(
        result,
        keep=torch.arange(6).repeat(count, 1),
        dropped_at=torch.full((count, 6), 5, dtype=torch.int32),
        snapshots=result.snapshots[2:],
        snapshot_at=[5],
        phases=[Phase(0, 5, 6, 1.0, 350 * count)],
    )


def fill_pool(
    path: Path,
    info: ModelInfo = INFO,
    config: Config = CONFIG,
    batches: tuple[int, ...] = (0, 1),
    make: Callable[[int], Result] = make_result,
) -> Path:
    writer = PoolWriter(path, info, config, PLAN, device="cpu")
    for batch in batches:
        writer.write(batch, make(batch))
    return path


class Bright(nn.Module):
    """A judge that says class 1 where the mean pixel is at least 0, else class 3; remembers what it was shown."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(images.clone())
        logits = torch.zeros(len(images), self.classes)
        bright = images.mean((1, 2, 3)) >= -1e-4
        logits[torch.arange(len(images)), torch.where(bright, 1, 3)] = 1.0
        return logits


class Reader(HTMLParser):
    """Fails on anything that is not closed in order; collects attributes and text."""

    void = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def test_summary_is_what_hand_reckoning_gives(tmp_path: Path) -> None:
    told = report.summary(fill_pool(tmp_path / "pool"))
    assert told.pop("target_probability") == pytest.approx(2 / 3)
    assert told == {
        "model": "hand:made",
        "strategy": "sparse",
        "semantics": "strict",
        "images": 3,
        "classes": 2,
        "teacher_agreement": 2 / 3,
        "judge_agreement": None,
        "seconds": 2.0,
        "peak_memory_bytes": None,
        # An image: 1 x (6 + 1) + 2 x (3 + 1) + 2 x (2 + 1) tokens, dense 5 x 7; 70 + 80 + 60 FLOPs, dense 5 x 70.
        "tokens": 3 * 21,
        "tokens_dense": 3 * 35,
        "tokens_ratio": 0.6,
        "flops": 3 * 210,
        "flops_dense": 3 * 350,
        "flops_ratio": 0.6,
        "losses": {"cross_entropy": (1 + 1 + 2) / 3},
        "planned_images": 3,
        "complete": True,
    }
    json.dumps(told, allow_nan=False)


def test_an_unfinished_pool_is_summed_as_far_as_it_goes(tmp_path: Path) -> None:
    pool = fill_pool(tmp_path / "pool", batches=(1,))
    told = report.summary(pool)
    assert (told["images"], told["planned_images"], told["complete"], told["teacher_agreement"]) == (1, 3, False, 1.0)
    assert "1 of 3 planned images" in read(report.write_report(pool)).text


def test_dense_flops_are_unknown_without_a_dense_phase() -> None:
    result = dataclasses.replace(make_result(0), phases=[Phase(0, 5, 2, 1.0, 100)])
    told = collect([result], INFO, CONFIG).summary()
    assert told["flops_dense"] is None and told["flops_ratio"] is None
    assert told["tokens_ratio"] == 3 / 7


def test_non_finite_losses_stay_valid_json() -> None:
    result = dataclasses.replace(make_result(1), losses={"cross_entropy": torch.tensor([torch.nan])})
    told = collect([result], INFO, CONFIG).summary()
    assert told["losses"] == {"cross_entropy": None}
    json.dumps(told, allow_nan=False)


def test_the_judge_sees_the_image_as_it_is_and_with_dropped_patches_at_the_mean(tmp_path: Path) -> None:
    # As it is, the ramp's mean is 0: "bee". Its kept patches 0 and 4 lie lower on the whole: "dog".
    judge = Bright().train()
    told = report.summary(fill_pool(tmp_path / "pool"), judge=judge)
    assert told["judge_agreement"] == {"as-is": 2 / 3, "mean": 1 / 3}
    assert judge.training
    whole, filled = judge.seen[:2]
    kept = torch.zeros(4, 6, dtype=torch.bool)
    kept[0:2, 0:2] = kept[2:4, 2:4] = True
    assert torch.equal(whole, make_result(0).images)
    assert torch.equal(filled, whole * kept)


def test_the_judge_gets_its_own_normalisation() -> None:
    judge = Bright()
    judge.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.5, 0.5)}  # type: ignore[assignment]
    collect([make_result(1)], INFO, CONFIG, judge=judge)
    pixels = make_result(1).images * 0.25 + 0.5
    expected = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(judge.seen[0], expected)
    assert renormalise(pixels, INFO, INFO.mean, INFO.std) is pixels


def test_pools_of_an_embedded_model_are_judged_by_the_embedded_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fill_pool(tmp_path / "pool", dataclasses.replace(INFO, name="embedded:teacher"))
    monkeypatch.setattr("smi.embedded.load_judge", Bright)
    assert report.summary(pool)["judge_agreement"] == {"as-is": 2 / 3, "mean": 1 / 3}

    def missing() -> nn.Module:
        raise FileNotFoundError("no weights")

    monkeypatch.setattr("smi.embedded.load_judge", missing)
    assert report.summary(pool)["judge_agreement"] is None
    assert "No second network judged" in read(report.write_report(pool)).text


def test_a_judge_over_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmiError, match="4 classes"):
        report.summary(fill_pool(tmp_path / "pool"), judge=Bright(classes=5))


def test_a_judge_that_cannot_take_the_images_is_refused() -> None:
    with pytest.raises(SmiError, match=r"\(3, 4, 6\)"):
        collect([make_result(0)], INFO, CONFIG, judge=nn.Conv2d(1, 4, 3))


def test_drops_and_frames() -> None:
    tally = collect([make_result(0), make_result(1)], INFO, CONFIG)
    assert tally.prunings == {1, 3}
    np.testing.assert_array_equal(tally.survived, [3, 0, 0, 0, 3, 0])
    np.testing.assert_array_equal(tally.drop_sum, [0, 9, 3, 3, 0, 3])
    np.testing.assert_array_equal(tally.drop_count, [0, 3, 3, 3, 0, 3])
    assert [p.index for p in tally.pictures] == [0, 2], "only the first image of each batch has pictures"
    first = tally.pictures[0]
    assert [f.iteration for f in first.frames] == [1, 3, 5]
    live = [f.live.ravel().tolist() for f in first.frames]
    assert live[0] == [True, True, False, False, True, False]
    assert live[1] == live[2] == [True, False, False, False, True, False]
    assert first.dropped_at.shape == (2, 3) and np.isnan(first.dropped_at[0, 0]) and first.dropped_at[0, 1] == 3


def test_only_so_many_pictures_are_kept() -> None:
    assert len(collect([make_result(0), make_result(1)], INFO, CONFIG, max_images=1).pictures) == 1
    with pytest.raises(SmiError, match="max_images is -1"):
        collect([], INFO, CONFIG, max_images=-1)


def test_curve_of_batches_of_different_length() -> None:
    curve = Curve()
    curve.add(np.array([1.0, 2.0]))
    curve.add(np.array([3.0, np.nan, 5.0]))
    np.testing.assert_array_equal(curve.mean, [2, 2, 5])
    np.testing.assert_array_equal(curve.low, [1, 2, 5])
    np.testing.assert_array_equal(curve.high, [3, 2, 5])
    assert not curve.vanishes
    zero = Curve()
    zero.add(np.zeros(3))
    assert zero.vanishes


def test_strip_enlarges_by_whole_pixels_and_fades_dropped_patches() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    live = np.array([[True, False, False], [False, True, False]])
    picture = Picture(0, 1, 1, 1.0, [Frame(1, pixels, live), Frame(5, pixels, live)], np.full((2, 3), np.nan))
    sheet = _decode(report_figures.strip(picture, 3))
    factor, gap = report_figures.CELL // 6, report_figures.GAP
    width = 6 * factor
    assert sheet.shape == (4 * factor, 3 * width + 2 * gap, 4)
    cell = sheet[:, :width]
    np.testing.assert_array_equal(cell[::factor, ::factor, :3], pixels)
    opaque = cell[::factor, ::factor, 3] == 255
    np.testing.assert_array_equal(opaque, live.repeat(2, 0).repeat(2, 1))
    assert not sheet[:, width + gap : 2 * width + gap].any(), "the missing stage is empty"
    np.testing.assert_array_equal(sheet[:, -width:], cell)


def test_large_pictures_are_shrunk() -> None:
    pixels = np.zeros((224, 448, 3), np.uint8)
    picture = Picture(0, 1, 1, 1.0, [Frame(1, pixels, np.ones((14, 28), bool))], np.full((14, 28), np.nan))
    assert _decode(report_figures.strip(picture, 1)).shape == (80, 160, 4)


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    pool = fill_pool(tmp_path / "pool")
    page = report.write_report(pool, judge=Bright())
    assert page == pool / "report" / "report.html"
    text, reader = page.read_text(encoding="utf-8"), read(page)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    links = [value for _, name, value in reader.attributes if name in ("src", "srcset", "href")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)
    assert sum(name == "alt" for _, name, _ in reader.attributes) == reader.tags.count("img")
    for said in ("66.7 %", "60.0 %", "bee", "seen as ant", "3 of 6", "measured", "counted"):
        assert said in reader.text, said
    assert "tv1" not in reader.text.split("Data card")[0], "a term that is zero throughout is not spoken of"
    names = {file.name for file in page.parent.iterdir()}
    assert names == {"report.html"} | {
        f"report-{name}.png"
        for name in ("stages-000000", "stages-000002", "dropped-mean", "dropped-images", "objectives")
    }
    for name in names - {"report.html"}:
        Image.open(page.parent / name).verify()


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    hostile = ("<script>alert(1)</script>", '"><img src=x onerror=y>', "a\0b\x1b[2J\n$\\frac$", "&amp; 犬")
    info = dataclasses.replace(INFO, name="x</title><b>'\"&", class_names=hostile)
    reader = read(report.write_report(fill_pool(tmp_path / "pool", info)))
    assert "script" not in reader.tags
    assert not [a for a in reader.attributes if a[1] == "onerror" or a[2] == "x"]
    assert hostile[0] in reader.text and hostile[1] in reader.text and hostile[3] in reader.text
    assert info.name in reader.text
    assert "\0" not in reader.text and "\x1b" not in reader.text


def test_dense_pool_speaks_of_no_dropping(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, strategy="dense")
    pool = fill_pool(tmp_path / "pool", config=config, make=dense_result)
    told = report.summary(pool)
    assert told["flops_ratio"] == told["tokens_ratio"] == 1.0
    page = report.write_report(pool)
    text = read(page).text
    assert "nothing is dimmed" in text and "When patches were dropped" not in text and "against dense" not in text
    assert not list(page.parent.glob("*dropped*"))


def test_numbers_name_classes_where_names_are_not_known(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, class_names=())
    assert "seen as 0" in read(report.write_report(fill_pool(tmp_path / "pool", info))).text


def test_many_classes_are_folded_away(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, num_classes=1000, class_names=())
    plan = WorkPlan(tuple(range(30)), 30)
    one = make_result(1)
    result = dataclasses.replace(
        one,
        **{n: getattr(one, n).repeat(30, *[1] * (getattr(one, n).ndim - 1)) for n in ("images", "keep", "dropped_at")},
        targets=torch.arange(30),
        indices=torch.arange(30),
        logits=torch.eye(1000)[:30].roll(-3, 0),
        losses={},
    )
    writer = PoolWriter(tmp_path / "pool", info, CONFIG, plan, device="cpu")
    writer.write(0, result)
    text = read(report.write_report(tmp_path / "pool")).text
    assert "The 24 of 30 classes with the lowest agreement" in text and "All 30 classes" in text


def test_without_snapshots_the_results_are_shown(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, snapshots=0)

    def make(batch: int) -> Result:
        result = make_result(batch)
        return dataclasses.replace(result, snapshots=result.snapshots[:, :0])

    page = report.write_report(fill_pool(tmp_path / "pool", config=config, make=make))
    assert len(list(page.parent.glob("report-stages-*.png"))) == 3
    assert "iteration 1" not in read(page).text


def test_no_pictures_and_no_history(tmp_path: Path) -> None:
    bare = fill_pool(tmp_path / "pool", make=lambda b: dataclasses.replace(make_result(b), history={}))
    page = report.write_report(bare, max_images=0)
    read(page)
    assert {file.name for file in page.parent.iterdir()} == {"report.html", "report-dropped-mean.png"}


def test_out_names_the_page_and_its_pictures(tmp_path: Path) -> None:
    out = report.write_report(fill_pool(tmp_path / "pool"), tmp_path / "new" / "mine.html", max_images=1)
    assert out == tmp_path / "new" / "mine.html"
    assert (tmp_path / "new" / "mine-stages-000000.png").exists()
    assert not (tmp_path / "pool" / "report").exists()


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(SmiError, match="no pool"):
        report.summary(tmp_path / "nowhere")
    empty = fill_pool(tmp_path / "empty", batches=())
    with pytest.raises(SmiError, match="no finished batch"):
        report.write_report(empty)
    pool = fill_pool(tmp_path / "pool")
    with pytest.raises(SmiError, match="is a folder"):
        report.write_report(pool, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SmiError, match="cannot write"):
        report.write_report(pool, tmp_path / "file" / "report.html", max_images=0)


def _decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))
