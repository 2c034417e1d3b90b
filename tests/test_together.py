"""Where features meet: strategies, losses, pools, predictions and reports used together, as one would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small import N, one_thread, tiny  # noqa: F401
from torch.nn import functional as F
from typer.testing import CliRunner

import smi
from smi import CompareConfig, Config, Inversion, SmiError, SparseModel, WorkPlan
from smi.calibration import from_pool
from smi.cli import app
from smi.losses import low_pass, margin
from smi.pool import Pool
from smi.predict import predict
from smi.report import write_report
from smi.run import run
from smi.transfer import TransferConfig, divergence, teach

FUSION = Config(strategy="fusion", iterations=4, batch_size=4, snapshots=1)
REBIRTH = Config(strategy="rebirth", division=8, iterations=16, batch_size=1, snapshots=1)


def said(*words: object) -> str:
    """What a command prints, which is all that it has to say."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 0, found.output
    return found.output


# --- predictions ---


@pytest.mark.parametrize("prune_ratio", [(), (0.3, 0.3)])
def test_rebirth_is_predicted_whatever_the_schedule_of_others(prune_ratio: tuple[float, ...]) -> None:
    config = REBIRTH.replace(prune_at=(4, 8)[: len(prune_ratio)], prune_ratio=prune_ratio)
    found = predict(SparseModel(tiny()), WorkPlan((0,) * 8, 8), config.resolved())
    assert [(p.start, p.kept) for p in found.phases] == [(2 * k, N - 2 * k) for k in range(8)]


# --- what the teacher says ---


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_images_of_fusion_are_judged_by_the_teacher_itself(pool: str, backend: str) -> None:
    model = tiny(depth=4, global_pool=pool).eval()
    sparse = SparseModel(model, merge_to=0.25, backend=backend)
    inversion = Inversion(sparse, [0, 3, 1], FUSION)
    inversion.step()
    with torch.no_grad():
        before = sparse.feed(inversion.images)[0]
        inversion.result()
        assert torch.equal(sparse.feed(inversion.images)[0], before)  # a look changes nothing
    found = inversion.run()
    with torch.no_grad():
        theirs, merged = model(found.images), sparse.feed(found.images)[0]
    assert (merged - theirs).abs().max() > 1e-3
    torch.testing.assert_close(found.logits, theirs, rtol=1e-4, atol=1e-5)
    wanted = F.cross_entropy(theirs, found.targets, reduction="none")
    torch.testing.assert_close(found.losses["cross_entropy"], wanted, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_fusion(tmp_path: Path) -> None:
    model = tiny(depth=4).eval()
    run(SparseModel(model, merge_to=0.25), WorkPlan((0, 1, 2, 3) * 2, 4), FUSION, tmp_path / "pool")
    lesson = TransferConfig(mode="finetune", epochs=1, holdout=0.5, learning_rate=1e-9)
    found = teach(model, tmp_path / "pool", tmp_path / "student", lesson, device="cpu")
    images = Pool(tmp_path / "pool").load(0).images
    with torch.no_grad():
        of_merged = divergence(SparseModel(model, merge_to=0.25).feed(images)[0], model(images), lesson.temperature)
    rounding = 5e-5  # of log-probabilities by a unit in float32's last place, times the square of the temperature
    assert abs(found.curve[0].holdout_loss) < rounding < of_merged / 10 and found.curve[0].agreement == 1


# --- what pools say of themselves ---


def text_of(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S)).split())


@pytest.mark.parametrize("packed", [False, True])
def test_pools_tell_of_their_losses_and_method(packed: bool, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for config, told, shown in (
        (FUSION.replace(merge_to=0.5), "all 16 patches, merged inside the network to 0.5 of them", "merged to 50%"),
        (
            REBIRTH.replace(division=2, iterations=4, batch_size=2, ranking="gradient_input"),
            "all 16 patches, 8 from 2, 2 images of each trajectory, ranked by gradient_input",
            "another image of its trajectory; the 2 images of one follow each other",
        ),
    ):
        pool = tmp_path / config.strategy
        model = SparseModel(tiny(depth=4), merge_to=config.model_merge_to)
        run(model, WorkPlan((0, 0, 1, 1), 4), config, pool, objectives=[margin(weight=0.5), low_pass(weight=2.0)])
        pool = smi.pack(pool, tmp_path / f"packed-{pool.name}").path if packed else pool
        losses = "0.5 * margin(confidence=None), 2.0 * low_pass(cutoff=0.25)"
        info = said("info", pool)
        assert told in info and f"those of the config, {losses}" in info
        page = text_of(write_report(pool, tmp_path / "report.html"))
        assert shown in page and f"Losses beyond the config's: {losses}." in page
        assert f"losses beyond these {losses} Provenance" in page


def test_a_packed_pool_is_not_inverted_into(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    model, plan = SparseModel(tiny(depth=4), merge_to=0.25), WorkPlan((0, 1), 4)
    run(model, plan, FUSION, tmp_path / "pool")
    packed = smi.pack(tmp_path / "pool", tmp_path / "packed").path
    for overwrite in (False, True):
        with pytest.raises(SmiError, match="is a packed pool, to which nothing is added; unpack it with `smi pool"):
            run(model, plan, FUSION, packed, overwrite=overwrite)
    assert len(smi.open_pool(packed)) == 2


# --- trajectories ---


@pytest.mark.parametrize(("asked", "calibrate", "held"), [(None, 20, [20, 21]), (9, 9, [12, 13]), (20, 20, [20, 21])])
def test_calibration_and_what_it_is_checked_on_share_no_trajectory(
    asked: int | None, calibrate: int, held: list[int], tmp_path: Path
) -> None:
    config = REBIRTH.replace(division=4, iterations=8, batch_size=6)
    run(SparseModel(tiny()), WorkPlan((0, 0, 0, 0) * 6, 24), config, tmp_path / "pool")
    found = from_pool(tmp_path / "pool", images=asked)
    images = smi.Pool(tmp_path / "pool").load(0).images
    assert torch.equal(torch.cat([shown for shown, _ in found.read()]), images[:calibrate])
    assert torch.equal(found.held_out, images[held])
    with pytest.raises(SmiError, match="has 24 images; expected at least 25: 24 to calibrate and one of another traj"):
        from_pool(tmp_path / "pool", images=21)


# --- comparisons ---


def test_a_comparison_says_which_setting_is_another(tmp_path: Path) -> None:
    how = CompareConfig(strategies=("dense",), images=2, points=(1.0,))
    smi.compare(tiny(), tmp_path / "c", FUSION, how)
    with pytest.raises(SmiError, match=r"another config: merge_to: 0\.25, this one has 0\.5; choose another folder"):
        smi.compare(tiny(), tmp_path / "c", FUSION.replace(merge_to=0.5), how)
