"""Strategies side by side: who gets how much, what is counted, and that a killed comparison goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import CLASSES, PATCH, N, one_thread, tiny  # noqa: F401
from torch import nn
from typer.testing import CliRunner

import smi
import smi.comparison
from smi import CompareConfig, SmiError
from smi.cli import app
from smi.cli_compare import parse_bits, shortened
from smi.comparison import count_updates
from smi.comparison_page import leader, page
from smi.comparison_plan import allot, flops_per_image
from smi.evaluation import data_config, data_transform
from smi.given import check_real
from smi.inversion import Inversion
from smi.pool import Pool
from smi.pool_tools import FirstImages
from smi.run import run
from smi.state import WorkPlan
from smi.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
METHODS = ("dense", "sparse", "random", "rebirth", "fusion")
CONFIG = smi.Config(iterations=12, prune_at=(3, 6), prune_ratio=(0.4, 0.4), merge_to=0.5, batch_size=4)  # 16, 9, 5
HOW = CompareConfig(strategies=("dense", "rebirth"), images=8, points=(0.5, 1.0), weights=0)
WIDTH, DEPTH = 16, 2  # of `tiny`


@pytest.fixture(scope="module")
def model() -> smi.SparseModel:
    return smi.SparseModel(tiny(), name="tiny")


def operations(kept: int) -> int:
    """By hand: linear layers forward and to their input, attention of 2 products forward and 5 backward."""
    tokens = kept + 1
    linear = kept * 3 * PATCH * PATCH * WIDTH + DEPTH * tokens * WIDTH * 12 * WIDTH + WIDTH * CLASSES
    return 2 * (2 * linear + 7 * DEPTH * tokens * tokens * WIDTH)


def merged_operations() -> int:
    """All 16 patches, of which 8 tokens are left behind the attention of the first block."""
    linear = 16 * 3 * PATCH * PATCH * WIDTH + WIDTH * CLASSES + WIDTH * WIDTH * (4 * (17 + 9) + 8 * (9 + 9))
    cosines = 8 * 8 * 8  # of even and odd keys, 8 channels a head, forward alone
    return 2 * (2 * linear + 7 * (17 * 17 + 9 * 9) * WIDTH + cosines)


BY_HAND = {  # iterations with so many patches, over the images of a trajectory
    "dense": Fraction(12 * operations(16)),
    "sparse": Fraction(3 * operations(16) + 3 * operations(9) + 6 * operations(5)),
    "random": Fraction(3 * operations(16) + 3 * operations(9) + 6 * operations(5)),
    "fusion": Fraction(12 * merged_operations()),
    "rebirth": Fraction(3 * (operations(16) + operations(12) + operations(8) + operations(4)), 4),
}


def pictures(folder: Path, each: int = 4, seed: int = 0) -> Path:
    """A data set: noise of another colour for each class."""
    draw = np.random.default_rng(seed)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 100, (16, 16, 3)) + 30 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(label) / f"{i}.png")
    return folder


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(model: smi.SparseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison that nothing interrupted, with a judge, quantization and a student."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    data = pictures(folder / "data")
    how = CompareConfig(strategies=METHODS[:2] + METHODS[3:], images=12, points=(1.0,), weights=8, activations=8)
    lesson = smi.TransferConfig(mode="finetune", epochs=2, learning_rate=1e-2)
    record = smi.compare(
        model, folder / "out", CONFIG, how, judge=tiny(3), data=str(data), student=lambda: tiny(5), lesson=lesson
    )
    return folder, record


# --- who gets how much ---


@pytest.mark.parametrize("method", METHODS)
def test_operations_of_an_image_are_those_counted_by_hand(model: smi.SparseModel, method: str) -> None:
    chosen = CONFIG.replace(strategy=method)
    assert flops_per_image(model.merging(chosen.model_merge_to), chosen) == BY_HAND[method]


def test_equal_operations_buy_as_many_images_as_fit() -> None:
    repeats = {"dense": 1, "sparse": 1, "rebirth": 4}
    rates = {name: BY_HAND[name] for name in repeats}
    how = CompareConfig(strategies=tuple(repeats), images=8, points=(0.5, 1.0))
    found = allot(how, rates, repeats)
    assert (found["dense"].at_points, found["dense"].counted) == ((4, 8), 8)  # the dearest makes what was asked for
    for name, allotment in found.items():
        for share, images in zip((Fraction(1, 2), Fraction(1)), allotment.at_points, strict=True):
            budget = share * 8 * BY_HAND["dense"]
            assert images % repeats[name] == 0
            assert images * BY_HAND[name] <= budget < (images + repeats[name]) * BY_HAND[name]
    assert found["rebirth"].looked_at == (8, *found["rebirth"].at_points)


def test_rates_and_points_that_are_no_binary_fractions() -> None:
    how = CompareConfig(strategies=("dense", "sparse"), images=30, points=(0.1, 0.7, 1.0))
    found = allot(how, {"dense": 0.3, "sparse": 0.1}, {"dense": 1, "sparse": 1})
    assert found["dense"].at_points == (3, 21, 30)
    assert found["sparse"].at_points == (8, 62, 89)  # 0.3 is a little less than three times 0.1 in binary
    images = allot(how, None, {"dense": 1, "sparse": 1})
    assert images["sparse"].at_points == (3, 21, 30) and images["sparse"].per_image is None


def test_pools_keep_to_the_budget(whole: tuple[Path, dict[str, Any]]) -> None:
    record = whole[1]
    budget = 12 * BY_HAND["dense"]
    for name, method in record["methods"].items():
        for images in (*method["at_points"], method["counted"]):
            (cell,) = method["cells"][str(images)]["images"]
            assert cell["images"] == images and cell["flops"] == images * BY_HAND[name] <= budget
        assert method["counted"] == 12 <= method["at_points"][0]
    rates = {name: method["per_image"] for name, method in record["methods"].items()}
    assert rates == {name: float(BY_HAND[name]) for name in ("dense", "sparse", "rebirth", "fusion")}


def test_equal_seconds_follow_what_was_predicted(
    model: smi.SparseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Predicted:
        def __init__(self, plan: WorkPlan, config: smi.Config) -> None:
            calls.append(config.strategy)
            each = {"dense": 2.0, "rebirth": 0.25}[config.strategy] * (1 + len(calls) % 2)
            self.seconds = each * len(plan.targets)

    monkeypatch.setattr(smi.comparison, "predict", lambda model, plan, config: Predicted(plan, config))
    how = CompareConfig(strategies=("dense", "rebirth"), equal="seconds", images=4, points=(1.0,))
    record = smi.compare(model, tmp_path, CONFIG, how, judge=tiny(3))
    assert calls == ["dense", "rebirth"] * 3  # in turns
    assert record["methods"]["rebirth"]["at_points"] == [64]  # 4 images of 4 s each, at 0.25 s each
    smi.compare(model, tmp_path, CONFIG, how, judge=tiny(3))
    assert len(calls) == 6  # the first call's rates count
    assert "Equal time" in (tmp_path / "compare.md").read_text()


def test_methods_take_turns(model: smi.SparseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = smi.comparison.run

    def noted(model: Any, plan: WorkPlan, config: smi.Config, out: Path, **more: Any) -> Any:
        made.append((config.strategy, more["shard"][0]))
        return real(model, plan, config, out, **more)

    monkeypatch.setattr(smi.comparison, "run", noted)
    how = CompareConfig(strategies=("dense", "sparse"), images=8, points=(1.0,))
    record = smi.compare(model, tmp_path, CONFIG, how, judge=tiny(3))
    assert record["methods"]["sparse"]["at_points"] == [14]  # in four batches, of which two fit into one of dense
    order = [("sparse", 0), ("dense", 0), ("sparse", 1), ("sparse", 2), ("dense", 1), ("sparse", 3)]
    assert made == order


# --- what is counted ---


def test_the_first_images_are_a_pool(model: smi.SparseModel, tmp_path: Path) -> None:
    plan = WorkPlan.balanced(range(CLASSES), 16, 2, CLASSES, repeat=4)  # two batches of two trajectories
    run(model, plan, CONFIG.replace(strategy="rebirth", batch_size=2), tmp_path)
    pool, first = Pool(tmp_path), FirstImages(tmp_path, 12)
    assert (len(first), first.batches, first.complete, len(first.plan.targets)) == (12, [0, 1], True, 12)
    images = torch.cat([result.images for result in pool])[:12]
    assert torch.equal(torch.cat([result.images for result in first]), images)
    cut, uncut = first.load(1), pool.load(1)
    assert [phase.flops * 2 for phase in cut.phases] == [phase.flops for phase in uncut.phases]
    assert cut.logits.shape[0] == cut.snapshots.shape[1] == 4
    assert len(smi.SyntheticDataset(first)) == 12
    with pytest.raises(SmiError, match="expected a multiple of 4"):
        FirstImages(tmp_path, 10)
    with pytest.raises(SmiError, match="does not hold its first 20 images"):
        FirstImages(tmp_path, 20)


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_that_moved_a_patch(model: smi.SparseModel, tmp_path: Path, method: str) -> None:
    """Watched from outside: in how many iterations did any pixel of a patch change?"""
    config = CONFIG.replace(strategy=method, jitter="none", flip=False, batch_size=2)
    model = model.merging(config.model_merge_to)
    targets = [target for target in (1, 2) for _ in range(config.images_per_trajectory)]
    loop = Inversion(model, targets, config)
    moved, before = torch.zeros(2, N, dtype=torch.long), loop.images.clone()
    while not loop.done:
        loop.step()
        changed = (loop.images != before).view(2, 3, 4, PATCH, 4, PATCH).any(5).any(3).any(1)
        moved += changed.view(2, N)
        before = loop.images.clone()
    plan = WorkPlan(tuple(targets), len(targets))
    run(model, plan, config, tmp_path)
    found = count_updates(Pool(tmp_path))
    assert np.allclose(np.ravel(found["map"]), moved.double().mean(0))
    assert found["per_image"] == pytest.approx(moved.double().sum(1).mean().item() / config.images_per_trajectory)
    kept = {"rebirth": (3, 7.5, 12)}.get(method, (12, 12, 12))
    assert (found["least"], found["mean"], found["most"]) == kept


def test_figures_are_those_of_the_images(model: smi.SparseModel, whole: tuple[Path, dict[str, Any]]) -> None:
    folder, record = whole
    judge = tiny(3)
    for name in ("dense", "rebirth"):
        method = record["methods"][name]
        images = method["at_points"][0]
        results = list(Pool(folder / "out" / "pools" / f"{name}-1"))
        pixels = torch.cat([r.images for r in results])[:images]
        targets = torch.cat([r.targets for r in results])[:images]
        keep = torch.cat([r.keep for r in results])[:images]
        for i, row in enumerate(keep):
            for patch in set(range(N)) - set(row.tolist()):
                y, x = divmod(patch, 4)
                pixels[i, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] = 0
        with torch.no_grad():
            share = (judge(pixels).argmax(1) == targets).double().mean().item()
        cell = method["cells"][str(images)]["images"][0]
        assert cell["judge_agreement"]["mean"] == pytest.approx(share)
        assert cell["teacher_agreement"] == pytest.approx(
            (torch.cat([r.logits for r in results])[:images].argmax(1) == targets).double().mean().item()
        )
    transform = data_transform(data_config(model.original))
    seen = [transform(Image.open(file)) for file in sorted((folder / "data").rglob("*.png"))]
    labels = torch.arange(CLASSES).repeat_interleave(4)

    def top1(network: nn.Module) -> float:
        with torch.no_grad():
            return (network(torch.stack(seen)).argmax(1) == labels).double().mean().item()

    student = tiny(5)
    student.load_state_dict(load_file(folder / "out" / "students" / "sparse-1-12" / "student.safetensors"))
    assert record["methods"]["sparse"]["cells"]["12"]["student"][0]["top1"] == pytest.approx(top1(student))
    assert record["teacher_top1"] == pytest.approx(top1(model.original))
    for method in record["methods"].values():  # eight bits take no more than a picture or two
        for cells in method["cells"].values():
            assert all(abs(cell["top1"] - record["teacher_top1"]) <= 0.15 for cell in cells["quantized"])


def test_the_page_shows_both_measurements(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, record = whole
    assert json.loads((folder / "out" / "compare.json").read_text()) == record
    text = (folder / "out" / "compare.md").read_text()
    assert text == page(record) and "conclude nothing" not in text
    assert f"smi {smi.__version__}" in text and f"torch {torch.__version__}" in text
    assert "## Equal number of operations" in text and "## Equal number of images" in text
    equal, counted, moved = (part.splitlines() for part in text.split("\n## ")[1:])
    for name in record["methods"]:
        images = record["methods"][name]["at_points"][-1]
        assert any(line.startswith(f"| {name} | {images} |") for line in equal)
        assert any(line.startswith(f"| {name} | 12 |") for line in counted)
    assert "| rebirth | 3 | 7.5 | 12 | 30 |" in moved
    assert "quantized teacher, W8A8 mse, top-1" in text and "student, top-1" in text
    picture = Image.open(io.BytesIO((folder / "out" / "compare.png").read_bytes()))
    assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


# --- controls ---


def test_controls_are_judged_like_what_was_inverted(model: smi.SparseModel, tmp_path: Path) -> None:
    data, real = (pictures(tmp_path / name, seed=seed) for seed, name in enumerate(("data", "real")))
    how = CompareConfig(strategies=("rebirth",), images=12, points=(1.0,), classes=(3, 1, 4), weights=8, activations=8)
    lesson = smi.TransferConfig(mode="finetune", epochs=1)

    def again(**more: Any) -> dict[str, Any]:
        return smi.compare(
            model,
            tmp_path / "out",
            CONFIG,
            how,
            judge=tiny(3),
            data=str(data),
            student=lambda: tiny(5),
            lesson=lesson,
            **more,
        )

    assert [*again()["controls"]] == ["noise"]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/**/*.*")}
    record = again(real=str(real))  # may be added
    assert all(file.stat().st_mtime_ns == written for file, written in files.items())
    assert record["settings"] == json.loads((tmp_path / "out" / "settings.json").read_text())
    targets = torch.tensor([3, 1, 4] * 4)
    transform, seen = data_transform(data_config(model.original)), []
    for name, control in record["controls"].items():
        results = list(Pool(tmp_path / "out" / "pools" / f"{name}-1"))
        images = torch.cat([result.images for result in results])
        assert torch.equal(torch.cat([result.targets for result in results]), targets)
        with torch.no_grad():
            says = {net: (net(images).argmax(1) == targets).double().mean().item() for net in (model.original, tiny(3))}
        ((number, cells),) = control["cells"].items()
        cell = cells["images"][0]
        assert (number, cell["images"], cell["flops"], cell["seconds"], cell["updates"]) == ("12", 12, 0, 0, None)
        assert [cell["teacher_agreement"], cell["judge_agreement"]["mean"]] == pytest.approx([*says.values()])
        assert abs(cells["quantized"][0]["top1"] - record["teacher_top1"]) <= 0.15 and "top1" in cells["student"][0]
        seen.append(images)
    noise, shown = seen
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for label in (3, 1, 4):  # four pictures a class, each of them once
        files_of = [transform(Image.open(file)) for file in sorted((real / str(label)).iterdir())]
        of_class = shown[targets == label]
        assert sorted(x.sum().item() for x in of_class) == sorted(x.sum().item() for x in files_of)
    _, equal, counted, _ = (tmp_path / "out" / "compare.md").read_text().split("\n## ")
    for name in ("noise", "real"):
        assert f"\n| {name} | 12 | 0 | 0 | - | " in counted and f"| {name} |" not in equal
    top1 = f"{record['teacher_top1']:.1%}"
    assert f"\n| none, the teacher in float | - | - | - | - | - | - | {top1} | {top1} |\n" in counted
    assert "rebirth was compared with nothing" in counted  # no control takes the lead
    with pytest.raises(SmiError, match="holds a comparison with the real images"):
        again(real=str(data.parent))


def test_test_images_are_no_control(model: smi.SparseModel, tmp_path: Path) -> None:
    data, real = pictures(tmp_path / "data"), pictures(tmp_path / "real", each=1)
    for folder, tests, says in (
        (data, data, "would be the test images; name a folder of others"),
        (f"{real}/../data", data, "would be the test images"),
        (f"cifar10:{real}", None, "would be the test images"),
        (tmp_path, None, "has 2 classes, the model has 5"),
        (real, None, "has 1 pictures of class 0, and 2 are wanted; add some, or use fewer images than 8"),
    ):
        with pytest.raises(SmiError) as error:
            smi.compare(model, tmp_path / "out", CONFIG, HOW, data=tests and str(tests), real=str(folder))
        assert says in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SmiError, match="would be the test images"):
        check_real(str(tmp_path / "val"), f"imagenet:{tmp_path}")
    check_real(str(tmp_path / "train"), f"imagenet:{tmp_path}")


def test_a_leader_is_named_as_far_as_seeds_tell() -> None:
    assert leader({"a": [0.5], "b": [0.6]}).startswith("b is ahead of a, with one seed")
    assert leader({"a": [0.5, 0.52], "b": [0.7, 0.71]}).startswith("**b** is ahead of a by more than two standard")
    assert leader({"a": [0.5, 0.7], "b": [0.6, 0.7]}).startswith("b and a lie within two standard errors of 2 seeds")
    assert leader({"a": [1.0], "b": [1.0]}) == "a and b are level"


# --- going on ---


def test_a_killed_comparison_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["compare", "test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]
    command += ["--set", "iterations=8", "--set", "prune_at=2,4", "--set", "prune_ratio=.3,.3", "--set", "batch_size=2"]
    command += ["--strategies", "dense,rebirth", "-n", "4", "--points", "1", "--out", str(tmp_path / "out")]
    killed = subprocess.Popen(
        [sys.executable, "-m", "smi.cli", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("3/"):
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    assert len(shards) >= 3

    made, real = [], smi.run.invert_batch

    def noted(model: Any, plan: Any, config: smi.Config, batch: int, *more: Any, **named: Any) -> Any:
        made.append((config.strategy, batch))
        return real(model, plan, config, batch, *more, **named)

    monkeypatch.setattr(smi.run, "invert_batch", noted)
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 0, again.output
    assert all(file.stat().st_mtime_ns == written for file, written in shards.items())
    every = {file for file in (tmp_path / "out").rglob("*.safetensors") if "noise-1" not in file.parts}
    assert len(made) == len({*made}) == len(every) - len(shards) > 0
    record, made[:] = json.loads(again.stdout), []
    third = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(third.stdout) == record and not made

    fresh = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "fresh"), "--json"])
    assert without_seconds(json.loads(fresh.stdout)) == without_seconds(record)


def test_a_figure_is_taken_once_and_seeds_are_added(
    model: smi.SparseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smi.compare(model, tmp_path, CONFIG, HOW, judge=tiny(3), progress=stop)
    first = {file: file.read_bytes() for file in tmp_path.rglob("cells/*.json")}
    steps: list[tuple[int, int]] = []
    smi.compare(
        model, tmp_path, CONFIG, HOW, judge=tiny(3), progress=lambda done, total, what: steps.append((done, total))
    )
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    cells = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("cells/*.json")}
    assert {*first} <= {*cells}
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert "class_names" not in settings["model"]
    settings["model"]["class_names"] = ["as", "earlier", "versions", "told", "them"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    both = CompareConfig(**{**HOW.__dict__, "seeds": (1, 2)})
    record = smi.compare(model, tmp_path, CONFIG, both, judge=tiny(3))
    assert all(file.stat().st_mtime_ns == written for file, written in cells.items())
    assert len(record["methods"]["dense"]["cells"]["8"]["images"]) == 2


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategies": ("dense", "spars")}, "unknown strategy 'spars'. Did you mean 'sparse'?"),
        ({"equal": "second"}, "equal is 'second'. Did you mean 'seconds'?"),
        ({"points": (0.5, 0.25, 1.0)}, "expected increasing shares"),
        ({"points": (0.5,)}, "the last point is 0.5; expected 1"),
        ({"seeds": (1, 1)}, "none of them twice"),
        ({"images": 0}, "images is 0; expected at least 1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"seeds": (1, -2)}, "seeds are [1, -2]; expected numbers from 0"),
    ],
)
def test_what_cannot_be_compared_is_said(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SmiError) as error:
        CompareConfig(**changes)
    assert says in str(error.value)


def test_a_refused_call_does_not_claim_the_folder(model: smi.SparseModel, tmp_path: Path) -> None:
    def refused(how: CompareConfig, config: smi.Config = CONFIG, **more: Any) -> str:
        with pytest.raises(SmiError) as error:
            smi.compare(model, tmp_path / "out", config, how, judge=tiny(3), **more)
        return str(error.value)

    data = str(pictures(tmp_path / "data", each=1))
    ten = CompareConfig(strategies=("dense", "rebirth"), images=10)
    assert "rebirth makes 4 of every trajectory; use 12" in refused(ten)
    few = CompareConfig(strategies=("dense",), images=8, points=(0.1, 1.0))
    assert "a share of 0.1 is less than one trajectory of dense" in refused(few)
    assert "judging them needs 9" in refused(CompareConfig(strategies=("dense",), images=8), data=data)
    one, long = CompareConfig(strategies=("rebirth",), images=16, points=(1.0,)), CONFIG.replace(iterations=32)
    assert "16 images of rebirth, and judging them needs 17" in refused(one, long.replace(division=16), data=data)
    taught = dataclasses.replace(one, weights=0)
    assert "needs 32" in refused(taught, long.replace(division=16), data=data, student=lambda: tiny(3))
    with pytest.raises(SmiError, match="the judge returns"):
        smi.compare(model, tmp_path / "out", CONFIG, HOW, judge=tiny(3, num_classes=3))
    with pytest.raises(SmiError, match="the judge fails on images of shape"):
        smi.compare(model, tmp_path / "out", CONFIG, HOW, judge=tiny(3, img_size=32))
    assert "the student has 3 classes, the model 5" in refused(HOW, data=data, student=lambda: tiny(num_classes=3))
    late = dataclasses.replace(taught, seeds=(1, 2**50))
    assert f"seed is {2**50}; expected a whole number" in refused(late, data=data, student=lambda: tiny(3))
    assert "there are no images at 'nowhere'" in refused(HOW, data="nowhere")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SmiError, match=r"holds 'data' and no comparison; choose another folder"):
        smi.compare(model, tmp_path, CONFIG, HOW, judge=tiny(3))
    dense = CompareConfig(strategies=("dense",), images=4, points=(1.0,))
    smi.compare(model, tmp_path / "out", CONFIG, dense, judge=tiny(3))
    more = CompareConfig(strategies=("dense",), images=5, points=(1.0,))
    assert "holds a comparison with another images: 4, this one has 5" in refused(more)
    assert "another config" in refused(dense, CONFIG.replace(tv2=0.5))
    (tmp_path / "out" / "settings.json").write_text("{")
    assert "settings.json' is damaged" in refused(dense)


# --- the command ---


def test_options_say_what_is_compared(tmp_path: Path) -> None:
    assert parse_bits("w4a8") == (4, 8) and parse_bits("none") == (0, 0)
    with pytest.raises(SmiError, match="--bits is 'int8'; expected"):
        parse_bits("int8")
    quick = shortened(smi.preset("demo"), 10)
    assert (quick.iterations, quick.prune_at) == (40, (4, 8, 12, 16))
    assert CompareConfig().strategies == tuple(STRATEGIES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--student", "resnet18"], "--student goes with --data"),
        (["--student", "none", "--epochs", "3"], "--epochs goes with --data"),
        (["--limit", "100"], "--limit goes with --data"),
        (["--seeds", "1.7"], "--seeds is '1.7'; expected whole numbers"),
        (["--num-images", "0"], "images is 0; expected at least 1"),
        (["--data", "d", "--epochs", "0"], "epochs is 0; expected at least 1"),
    ],
)
def test_options_are_used_or_refused(words: list[str], says: str, tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["compare", *words, "--out", str(tmp_path / "out")])
    assert wrong.exit_code == 2 and says in wrong.stderr, wrong.output


def test_the_command_prints_the_page(tmp_path: Path) -> None:
    command = ["compare", "test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]
    command += ["--quick", "--set", "iterations=80", "--set", "prune_at=20,40", "--set", "prune_ratio=.3,.3"]
    command += ["--equal", "images", "-n", "4", "--points", "1", "--classes", "1,2", "--strategies", "dense,sparse"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "compare.md").read_text() in done.stdout
    assert "teacher agrees" in done.stdout and "No judge was named" in done.stdout
    assert "conclude nothing" in (tmp_path / "compare.md").read_text().split("## ")[0]
    assert "5/5 seed 1: noise, 4 images, images" in done.stderr
    pool = Pool(tmp_path / "pools" / "sparse-1")
    assert pool.plan.targets == (1, 2, 1, 2) and pool.config.iterations == 8
    alone = CliRunner().invoke(app, ["compare", "--judge-checkpoint", "x.pth", "--out", str(tmp_path)])
    assert alone.exit_code == 2 and "--judge-checkpoint goes with --judge" in alone.stderr
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--strategies", "dens"], "unknown strategy 'dens'"),
        (["--data", "d", "--limit", "0"], "limit is 0; expected at least 1"),
        (["--points", ""], "points are []; expected at least one"),
        (["--seeds", "inf"], "--seeds is 'inf'; expected whole numbers"),
        (["--set", "strategy=dense"], "--set strategy=dense is of no use to a comparison; give --strategies"),
        (["--set", "seed=2"], "--set seed=2 is of no use to a comparison; give --seeds"),
        (["--out", str(tmp_path / "file")], "file/settings.json': Not a directory; choose another folder"),
    ):
        wrong = CliRunner().invoke(app, ["compare", "--out", str(tmp_path / "new"), *words])
        assert wrong.exit_code == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1, words
    assert not (tmp_path / "new").exists()
