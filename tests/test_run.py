"""Runs over a work plan, and what they cost: resume, time budget, counted arithmetic, predictions, the doctor."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import one_thread  # noqa: F401
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi
import smi.run
from smi.doctor import doctor
from smi.flops import count_flops
from smi.inversion import Inversion
from smi.objectives import Context, Objective
from smi.pool import Pool
from smi.pool_tools import stats
from smi.predict import predict, saved_bytes
from smi.run import run
from smi.state import Result, WorkPlan

DEPTH, WIDTH, PATCHES, CLASSES = 2, 32, 16, 5
CONFIG = smi.Config(iterations=4, prune_at=(1, 3), prune_ratio=(0.3, 0.3), batch_size=3, snapshots=1)
PLAN = WorkPlan.balanced(range(CLASSES), 8, 3, CLASSES)  # batches of 3, 3 and 2


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=CLASSES)


@pytest.fixture(scope="module")
def model(vit: nn.Module) -> smi.SparseModel:
    return smi.SparseModel(vit, name="tiny")


def assert_same(left: Result, right: Result) -> None:
    """Bit for bit, apart from the seconds it took."""
    for name in ("images", "keep", "dropped_at", "targets", "indices", "logits", "snapshots"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for a, b in ((left.losses, right.losses), (left.history, right.history)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert left.snapshot_at == right.snapshot_at
    assert [(p.start, p.stop, p.kept, p.flops) for p in left.phases] == [
        (p.start, p.stop, p.kept, p.flops) for p in right.phases
    ]


def assert_same_pool(left: Path, right: Path) -> None:
    a, b = Pool(left), Pool(right)
    assert a.batches == b.batches
    for one, other in zip(a, b, strict=True):
        assert_same(one, other)


@pytest.fixture(scope="module")
def whole(model: smi.SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool as an uninterrupted run makes it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "pool"
    run(model, PLAN, CONFIG, path)
    return path


# --- runs ---


def test_run_makes_every_batch_in_order_and_says_so(model: smi.SparseModel, whole: Path, tmp_path: Path) -> None:
    opened: list[list[int]] = []
    iterations: list[tuple[int, int]] = []
    batches: list[int] = []

    def on_batch(number: int, result: Result, seconds: float) -> None:
        assert Pool(tmp_path / "pool").batches == list(range(number + 1))  # already on disk
        assert result.indices.tolist() == list(PLAN.batch(number))
        assert seconds > 0
        batches.append(number)

    done = run(
        model,
        PLAN,
        CONFIG,
        tmp_path / "pool",
        on_open=opened.append,
        on_iteration=lambda batch, loop: iterations.append((batch, loop.iteration)),
        on_batch=on_batch,
    )
    assert opened == [[0, 1, 2]]
    assert batches == [0, 1, 2]
    assert iterations == [(batch, t) for batch in range(3) for t in range(1, 5)]
    assert (done.images_done, done.batches_done, done.images_left, done.batches_left) == (8, 3, 0, 0)
    assert (done.images_found, done.batches_found) == (0, 0)
    assert done.complete
    assert_same_pool(tmp_path / "pool", whole)


def test_a_complete_pool_is_left_alone(model: smi.SparseModel, whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.safetensors")}
    done = run(model, PLAN, CONFIG, whole)
    assert (done.images_done, done.images_found, done.batches_found, done.complete) == (0, 8, 3, True)
    assert before == {file: file.stat().st_mtime_ns for file in whole.rglob("*.safetensors")}


def test_batches_are_what_single_inversions_are(model: smi.SparseModel, whole: Path) -> None:
    indices = PLAN.batch(2)
    alone = Inversion(model, [PLAN.targets[i] for i in indices], CONFIG, indices=indices).run()
    assert_same(Pool(whole).load(2), alone)


@pytest.mark.parametrize("at", [(0, 1), (1, 3), (2, 4)])
def test_an_interrupt_loses_the_batch_in_flight_and_nothing_else(
    model: smi.SparseModel, whole: Path, tmp_path: Path, at: tuple[int, int]
) -> None:
    def interrupt(batch: int, loop: Inversion) -> None:
        if (batch, loop.iteration) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, PLAN, CONFIG, tmp_path / "pool", on_iteration=interrupt)
    assert Pool(tmp_path / "pool").batches == list(range(at[0]))
    shutil.rmtree(tmp_path / "pool" / "unfinished", ignore_errors=True)  # as after a kill without notice
    done = run(model, PLAN, CONFIG, tmp_path / "pool")
    assert (done.batches_found, done.batches_done, done.complete) == (at[0], 3 - at[0], True)
    assert_same_pool(tmp_path / "pool", whole)


@pytest.mark.parametrize("budget", [0.5, 1, 4, 5, 9.5, 11])
def test_what_is_in_hand_at_the_end_of_the_budget_is_put_aside_and_gone_on_with(
    model: smi.SparseModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    now = 100.0
    monkeypatch.setattr(smi.run, "time", SimpleNamespace(monotonic=lambda: now))
    seen: list[tuple[int, int]] = []

    def tick(batch: int, loop: Inversion) -> None:
        nonlocal now
        now += 1  # four iterations, so four seconds a batch
        seen.append((batch, loop.iteration))

    def again() -> smi.run.RunSummary:
        return run(model, PLAN, CONFIG, tmp_path / "pool", time_budget=budget, on_iteration=tick)

    done, calls = again(), 1
    first = max(1, math.ceil(budget))  # whole seconds, of which one is used in any case
    assert (done.batches_done, done.batches_left) == (first // 4, 3 - first // 4)
    assert done.images_left == sum(len(PLAN.batch(b)) for b in range(first // 4, 3))
    assert (done.batches_begun, done.seconds) == (int(first % 4 > 0), first)
    assert (tmp_path / "pool" / "unfinished").exists() == (first % 4 > 0)
    while not again().complete:
        calls += 1
        assert calls < 20
    assert seen == [(batch, t) for batch in range(3) for t in range(1, 5)], "no iteration is done twice"
    assert_same_pool(tmp_path / "pool", whole)
    assert not (tmp_path / "pool" / "unfinished").exists()


def test_overwrite_starts_over(model: smi.SparseModel, tmp_path: Path) -> None:
    small = WorkPlan((0, 1), 1)
    run(model, small, CONFIG, tmp_path / "pool")
    assert run(model, small, CONFIG, tmp_path / "pool", overwrite=True).batches_done == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG.replace(prune_ratio=(0.9, 0.9)), "leaves none"),
        (CONFIG.replace(cross_entropy=0.0, tv2=0.0), "nothing to minimise"),
    ],
)
def test_a_config_that_cannot_run_leaves_no_folder(
    model: smi.SparseModel, tmp_path: Path, config: smi.Config, message: str
) -> None:
    with pytest.raises(smi.SmiError, match=message):
        run(model, PLAN, config, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_objectives_take_part(model: smi.SparseModel, tmp_path: Path) -> None:
    def brightness(context: Context) -> Tensor:
        return context.images.mean((1, 2, 3))

    run(model, WorkPlan((0,), 1), CONFIG, tmp_path / "pool", objectives=[Objective(brightness, 2.0)])
    assert "brightness" in Pool(tmp_path / "pool").load(0).history


# --- arithmetic, counted ---


def expected_flops(kept: int) -> int:
    """By hand: every linear layer forward and backward to its input, fused attention 2 products forward, 5 backward."""
    tokens, hidden = kept + 1, 4 * WIDTH
    embedding = kept * (3 * 4 * 4) * WIDTH
    linear = tokens * WIDTH * (3 * WIDTH + WIDTH + 2 * hidden)
    attention = tokens * tokens * WIDTH
    return 2 * (2 * (embedding + DEPTH * linear + WIDTH * CLASSES) + 7 * DEPTH * attention)


@pytest.mark.parametrize("kept", [PATCHES, 11, 1])
def test_flops_are_counted_as_by_hand(model: smi.SparseModel, kept: int) -> None:
    assert count_flops(model, kept) == expected_flops(kept)
    assert count_flops(model, kept, batch=3) == 3 * expected_flops(kept)


def test_flops_are_counted_once_for_each_number_of_patches(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch asks at each of its prunings, and to count takes as long as a hundred iterations on a GPU."""
    asked: list[int] = []
    call = smi.SparseModel.__call__

    def counted(self: smi.SparseModel, images: Tensor, *args: Any, **options: Any) -> Any:
        asked.append(len(images))
        return call(self, images, *args, **options)

    monkeypatch.setattr(smi.SparseModel, "__call__", counted)
    fresh = smi.SparseModel(vit)
    asked.clear()
    found = [count_flops(fresh, kept) for kept in (11, 5, 11, 5)]
    assert found == [expected_flops(kept) for kept in (11, 5, 11, 5)] and asked == [1, 1]
    merged = smi.SparseModel(vit, merge_to=0.5)
    asked.clear()
    fewer = count_flops(merged, PATCHES)
    with merged.unmerged():
        assert fewer < count_flops(merged, PATCHES)
    assert fewer == count_flops(merged, PATCHES) and asked == [1, 1]


def test_flops_do_not_depend_on_what_torch_knows_of_cpu_attention(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    for op in (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ):
        monkeypatch.delitem(flop_registry, op, raising=False)
    assert count_flops(smi.SparseModel(vit), 11) == expected_flops(11)


def test_counting_leaves_no_gradient_and_no_state(vit: nn.Module, model: smi.SparseModel) -> None:
    images = torch.randn(1, 3, 16, 16)
    before, _ = model(images)
    count_flops(model, 3)
    after, _ = model(images)
    assert torch.equal(before, after)
    assert all(p.grad is None for p in vit.parameters())


# --- predictions ---


def test_predicted_flops_are_those_of_the_run(model: smi.SparseModel, whole: Path) -> None:
    prediction = predict(model, PLAN, CONFIG.resolved())
    assert [(p.start, p.stop, p.kept, p.iterations) for p in prediction.phases] == [
        (0, 1, 16, 1),
        (1, 3, 11, 2),
        (3, 4, 7, 1),
    ]
    assert (prediction.images, prediction.batches) == (8, 3)
    assert prediction.flops == sum(phase.flops for result in Pool(whole) for phase in result.phases)
    assert all(phase.seconds > 0 for phase in prediction.phases)
    per_batch = sum(phase.seconds * phase.iterations for phase in prediction.phases)
    assert prediction.seconds == pytest.approx(per_batch * 8 / 3)


def test_predicted_disk_covers_the_shards(model: smi.SparseModel, whole: Path) -> None:
    predicted = predict(model, PLAN, CONFIG.resolved()).disk_bytes
    tensors = pictures = 0
    for result in Pool(whole):
        parts = [result.images, result.keep, result.dropped_at, result.targets, result.indices, result.logits]
        parts += [result.snapshots, *result.losses.values(), *result.history.values()]
        tensors += sum(part.nbytes for part in parts)
        pictures += result.images.numel()
    assert predicted == tensors + pictures


def test_predicted_memory_is_called_an_estimate_without_a_gpu(model: smi.SparseModel) -> None:
    small, large = (predict(model, WorkPlan((0,) * n, n), CONFIG.replace(batch_size=n).resolved()) for n in (1, 5))
    assert not small.memory_measured
    weights, activations = saved_bytes(model, PATCHES)
    pixels = 3 * 16 * 16 * 4
    assert large.memory_bytes - small.memory_bytes >= 4 * (activations + 5 * pixels)
    assert small.memory_bytes >= weights + activations + 5 * pixels


def test_saved_bytes_tell_weights_from_activations(vit: nn.Module, model: smi.SparseModel) -> None:
    weights, dense = saved_bytes(model, PATCHES)
    matrices = sum(p.nbytes for p in vit.parameters() if p.ndim > 1 and p.shape[0] > 1)
    everything = sum(p.nbytes for p in vit.parameters())
    assert matrices <= weights <= everything
    _, sparse = saved_bytes(model, 4)
    tokens = 4 * WIDTH * (PATCHES + 1)
    assert dense > DEPTH * 6 * tokens  # queries, keys, values, hidden layer, norms
    assert sparse < dense / 2


@pytest.mark.parametrize("strategy", ["dense", "random"])
def test_predict_follows_the_strategy(model: smi.SparseModel, strategy: str) -> None:
    phases = predict(model, PLAN, CONFIG.replace(strategy=strategy).resolved()).phases
    assert [phase.kept for phase in phases] == ([16] if strategy == "dense" else [16, 11, 7])
    assert phases[-1].stop == 4


# --- doctor ---


def test_doctor_describes_a_model(vit: nn.Module, model: smi.SparseModel) -> None:
    found = doctor(vit, name="tiny")
    assert found.supported
    assert found.reason == ""
    facts = found.facts
    assert (facts["patches"], facts["tokens"], facts["prefix tokens"], facts["grid"]) == (16, 17, 1, [4, 4])
    assert facts["weights sha256"] == model.info.weights_sha256
    assert facts["ranking"] == "class_attention"
    assert facts["difference from timm"] < 1e-5
    assert facts["flops per image and iteration"] == expected_flops(PATCHES)
    assert [backend.name for backend in found.backends] == ["reference", "triton", "cpu", "cuda"]


def test_doctor_says_why_a_model_is_not_supported() -> None:
    found = doctor(nn.Linear(2, 2))
    assert not found.supported
    assert "Linear is not supported" in found.reason
    assert found.facts == {}
    assert found.backends


def test_doctor_refuses_a_name_that_is_none() -> None:
    with pytest.raises(smi.SmiError, match="unknown model"):
        doctor("no_such_model")


# --- what goes wrong within a batch ---


def test_a_batch_that_is_not_finite_is_made_from_another_seed_and_says_so(
    model: smi.SparseModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 1 fails with the seed of the config alone, wherever it is made."""
    real = Inversion.result

    def spoilt(self: Inversion) -> smi.Result:
        found = real(self)
        if 3 in self.indices and self.config.seed == CONFIG.seed:
            found.images[1, 0, 2, 2] = torch.nan
        return found

    monkeypatch.setattr(Inversion, "result", spoilt)
    configs = []
    with pytest.warns(UserWarning, match="batch 1 has values that are not finite; it is made anew from another seed"):
        done = run(model, PLAN, CONFIG, tmp_path / "pool", on_batch=lambda _, result, __: configs.append(result.config))
    assert done.complete
    pool = Pool(tmp_path / "pool")
    assert configs == [pool.config] * 3
    assert [pool.load(batch).tries for batch in range(3)] == [1, 2, 1]
    assert stats(tmp_path / "pool")["retried"] == [1] and stats(whole)["retried"] == []
    assert_same(pool.load(0), Pool(whole).load(0))
    indices = PLAN.batch(1)
    other = CONFIG.replace(seed=CONFIG.seed + 1_000_003)
    alone = Inversion(model, [PLAN.targets[i] for i in indices], other, indices=indices).run()
    assert torch.equal(pool.load(1).images, alone.images)

    def infinite(self: Inversion) -> smi.Result:
        found = real(self)
        return dataclasses.replace(found, logits=torch.full_like(found.logits, torch.inf))

    monkeypatch.setattr(Inversion, "result", infinite)
    failed = pytest.raises(smi.SmiError, match=r"batch 0 .* not finite, from 3 seeds")
    with pytest.warns(UserWarning, match="not finite"), failed:
        run(model, PLAN, CONFIG, tmp_path / "other")
    assert Pool(tmp_path / "other").batches == []


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = Inversion.run

    def starved(self: Inversion, *args: Any) -> smi.Result:
        if len(self.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
        return real(self, *args)

    monkeypatch.setattr(Inversion, "run", starved)


@pytest.mark.parametrize("changes", [{}, {"strategy": "rebirth", "division": 2, "batch_size": 3}], ids=str)
def test_a_batch_too_large_for_the_memory_is_made_in_halves(
    model: smi.SparseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = CONFIG.replace(**changes, snapshots=4)
    plan = WorkPlan.balanced(range(CLASSES), 6, 3, CLASSES, repeat=config.images_per_trajectory)
    run(model, plan, config, tmp_path / "whole")
    short_of_memory(monkeypatch, 1)
    with pytest.warns(UserWarning, match="too much for the memory: made in two halves"):
        run(model, plan, config, tmp_path / "halves")
    for mine, expected in zip(Pool(tmp_path / "halves"), Pool(tmp_path / "whole"), strict=True):
        assert torch.equal(mine.keep, expected.keep) and torch.equal(mine.dropped_at, expected.dropped_at)
        torch.testing.assert_close(mine.images, expected.images, rtol=0, atol=1e-4)
        assert mine.snapshots.shape == expected.snapshots.shape
        for name, curve in expected.history.items():
            torch.testing.assert_close(mine.history[name], curve, rtol=1e-3, atol=1e-4)
        assert [(p.start, p.stop, p.kept, p.flops) for p in mine.phases] == [
            (p.start, p.stop, p.kept, p.flops) for p in expected.phases
        ]


def test_where_halves_would_change_the_meaning_it_is_said(
    model: smi.SparseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(context: Context) -> Tensor:
        return context.images.std(0).mean()

    short_of_memory(monkeypatch, 1)
    for changes, objectives, why in (
        ({"semantics": "official"}, (), "with norms or augmentation over the batch"),
        ({"tolerance": 0.1}, (), "with a tolerance for the batch's mean"),
        ({}, (spread,), "with objectives of your own"),
    ):
        with pytest.raises(smi.SmiError, match=rf"3 images are too much .* Use a smaller batch_size: {why}"):
            run(model, PLAN, CONFIG.replace(**changes), tmp_path / why, objectives=objectives)
    short_of_memory(monkeypatch, 0)
    failed = pytest.raises(smi.SmiError, match="one image is too much for the memory of cpu")
    with pytest.warns(UserWarning, match="two halves"), failed:
        run(model, PLAN, CONFIG, tmp_path / "pool2")
