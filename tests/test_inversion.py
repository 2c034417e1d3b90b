"""The loop: what stops and what moves, what an image depends on, which losses run, what the records say."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch
from small import CLASSES, PATCH, PRUNED, SEMANTICS, UNPRUNED, N, alive, one_thread, tiny  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from smi import Config, Context, Inversion, Result, SmiError, SparseModel
from smi.objectives import Objective, Objectives
from smi.strategies import STRATEGIES


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


def same(first: Result, second: Result) -> bool:
    """Bit for bit, all tensors of two results."""
    for name in ("images", "keep", "dropped_at", "targets", "indices", "logits", "snapshots"):
        if not torch.equal(getattr(first, name), getattr(second, name)):
            return False
    tables = ((first.losses, second.losses), (first.history, second.history))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in tables)


def patches(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C * PATCH * PATCH)."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


# ---- strict: a stopped patch is a constant


@pytest.mark.parametrize("options", [{}, {"jitter": "pixel", "tv1": 0.5, "l2": 0.1}, {"strategy": "random"}])
def test_stopped_patches_keep_every_bit(model: nn.Module, options: dict[str, Any]) -> None:
    inversion = Inversion(model, [0, 1, 2], Config(**PRUNED, tv2=0.1).replace(**options))
    frozen: dict[tuple[int, int], Tensor] = {}
    kept = []
    while not inversion.done:
        before = inversion.images.clone()
        inversion.step()
        now, live = patches(inversion.images), alive(inversion.keep)
        for b, n in itertools.product(range(3), range(N)):
            if not live[b, n]:
                held = frozen.setdefault((b, n), patches(before)[b, n])
                assert torch.equal(now[b, n], held), f"patch {n} of image {b} moved at {inversion.iteration}"
        moved = (patches(before) != now).any(-1)
        if inversion.iteration not in (4, 7, 10):
            assert torch.equal(moved, live), "a surviving patch stood still"
        kept.append(inversion.keep.shape[1])
    assert kept == [16] * 3 + [11] * 3 + [7] * 3 + [4] * 5
    assert len(frozen) == 3 * 12


@pytest.mark.parametrize("flip", [True, False])
def test_the_network_never_sees_a_stopped_patch(model: nn.Module, flip: bool) -> None:
    """The pixels that feed the logits are all those of the kept patches, and no others."""
    checked = []

    def spy(context: Context) -> Tensor:
        (grad,) = torch.autograd.grad(context.logits.sum(), context.images, retain_graph=True)
        assert torch.equal((patches(grad) != 0).all(-1), alive(context.keep))
        assert torch.equal((patches(grad) != 0).any(-1), alive(context.keep))
        checked.append(context.keep.shape[1])
        return context.logits.mean()

    Inversion(model, [0, 1], Config(**PRUNED, flip=flip), objectives=[Objective(spy, differentiates=True)]).run()
    assert checked == [16] * 3 + [11] * 3 + [7] * 3 + [4] * 5


def test_strict_jitter_shifts_by_whole_patches() -> None:
    """Up to an eighth of the size, one draw for each image, and still exactly the kept patches are fed."""
    model = tiny(img_size=(64, 32), patch_size=4)
    seen = []

    def spy(context: Context) -> Tensor:
        (grad,) = torch.autograd.grad(context.logits.sum(), context.images, retain_graph=True)
        read = F.unfold(grad, PATCH, stride=PATCH).transpose(1, 2).abs().sum(-1) > 0
        assert torch.equal(read.nonzero()[:, 1].view(2, -1), context.keep)
        seen.append([[0, 0, 0]] * 2 if context.offsets is None else context.offsets.tolist())
        return context.logits.mean()

    config = Config(iterations=24, prune_at=(3,), prune_ratio=(0.5,))
    Inversion(model, [0, 1], config, objectives=[Objective(spy, differentiates=True)]).run()
    offsets = torch.tensor(seen)  # (T, B, 3)
    assert set(offsets[..., 0].flatten().tolist()) == {-8, -4, 0, 4, 8}
    assert set(offsets[..., 1].flatten().tolist()) == {-4, 0, 4}
    assert set(offsets[..., 2].flatten().tolist()) == {0, 1}
    assert not offsets[2:4].any() and not torch.equal(offsets[:, 0], offsets[:, 1])


@pytest.mark.parametrize("tv2", [0.0, 1e-2])
def test_official_stopped_patches_do_move(model: nn.Module, tv2: float) -> None:
    inversion = Inversion(model, [0, 1], Config(**PRUNED, semantics="official", tv2=tv2, jitter="none", flip=False))
    moved = torch.zeros(2, N, dtype=torch.bool)
    while not inversion.done:
        before = inversion.images.clone()
        inversion.step()
        moved |= (patches(before) != patches(inversion.images)).any(-1) & ~alive(inversion.keep)
    assert moved[~alive(inversion.keep)].all()  # by momentum alone, or by the prior as well


def test_official_draws_once_for_the_batch(model: nn.Module) -> None:
    official = Inversion(tiny(img_size=32), [0, 1], Config(iterations=200, **UNPRUNED, semantics="official"))
    assert official.offsets.shape == (200, 1, 3)
    assert set(official.offsets[:, 0, 0].tolist()) == set(range(-4, 5)) == set(official.offsets[:, 0, 1].tolist())
    assert abs(official.offsets[:, 0, 2].float().mean().item() - 0.5) < 0.15


# ---- what an image depends on


@pytest.mark.parametrize("strategy", ["sparse", "random", "dense"])
def test_an_image_does_not_depend_on_its_batch(model: nn.Module, strategy: str) -> None:
    """Same noise, draws and norms; only the rounding of differently shaped matrix products differs."""
    config = Config(**PRUNED, strategy=strategy, tv1=0.1, tv2=0.01, l2=0.01, learning_rate=0.01)
    together = Inversion(model, [0, 1, 2, 3], config).run()
    apart = Inversion(model, [2, 3], config, indices=[2, 3]).run()
    swapped = Inversion(model, [3, 0, 2], config, indices=[3, 0, 2]).run()
    for other, rows in ((apart, [2, 3]), (swapped, [3, 0, 2])):
        assert torch.equal(other.keep, together.keep[rows])
        assert torch.equal(other.dropped_at, together.dropped_at[rows])
        torch.testing.assert_close(other.images, together.images[rows], rtol=0, atol=1e-4)
        torch.testing.assert_close(other.logits, together.logits[rows], rtol=0, atol=1e-3)
        for name, values in other.losses.items():
            torch.testing.assert_close(values, together.losses[name][rows], rtol=1e-3, atol=1e-3)


def test_an_official_image_does_depend_on_its_batch(model: nn.Module) -> None:
    config = Config(**PRUNED, semantics="official", tv2=1.0, learning_rate=0.01)
    together, apart = (Inversion(model, targets, config).run() for targets in ([0, 1, 2, 3], [0, 1]))
    assert (together.images[:2] - apart.images).abs().max() > 1e-3


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("strategy", ["sparse", "random", "dense"])
def test_the_same_work_gives_the_same_bits(model: nn.Module, semantics: str, strategy: str) -> None:
    config = Config(**PRUNED, semantics=semantics, strategy=strategy, seed=3)
    first, twin = smi.invert(model, [0, 1, 4], config, indices=[7, 8, 9]), tiny()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = smi.invert(twin, torch.tensor([0, 1, 4]), config, indices=range(7, 10))
    assert same(first, second) and torch.equal(torch.get_rng_state(), state), "the global generator was used"
    sharing = SparseModel(model)
    smi.invert(sharing, [3], config)
    assert same(smi.invert(sharing, [0, 1, 4], config, indices=[7, 8, 9]), first)
    other = smi.invert(model, [0, 1, 4], config.replace(seed=4), indices=[7, 8, 9])
    assert not torch.equal(other.images, first.images)


def test_stepping_and_looking_change_nothing(model: nn.Module) -> None:
    config = Config(**PRUNED)
    plain = Inversion(model, [0, 1], config).run()
    inversion, calls = Inversion(model, [0, 1], config), []
    assert inversion.latest() == {} and inversion.iteration == 0
    for _ in range(4):
        inversion.step()
        assert inversion.latest().keys() == {"cross_entropy", "tv2", "total"}
        assert inversion.result().images.shape == (2, 3, 16, 16)
    watched = inversion.run(lambda running: calls.append(running.iteration))
    assert calls == list(range(5, 15)) and inversion.done
    assert same(watched, plain) and same(inversion.result(), plain)
    with pytest.raises(SmiError, match="done after 14 iterations"):
        inversion.step()


def test_start_is_noise_and_the_end_is_in_range(model: nn.Module) -> None:
    inversion = Inversion(model, list(range(5)) * 40, Config(iterations=6, **UNPRUNED, learning_rate=3.0))
    assert abs(inversion.images.mean().item()) < 0.02 and abs(inversion.images.std().item() - 1) < 0.02
    images = inversion.run().images
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (inversion.model.info.mean, inversion.model.info.std))
    low, high = -mean / std, (1 - mean) / std
    assert (images >= low).all() and (images <= high).all()
    assert (images == low).any() and (images == high).any()


@pytest.mark.parametrize("strategy", ["sparse", "random", "dense"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_no_weight_gets_a_gradient(strategy: str, semantics: str) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Inversion(model, [0, 1], Config(**PRUNED, strategy=strategy, semantics=semantics)).run()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inversion_works(model: nn.Module) -> None:
    """What it is for: images that the model takes for their targets."""
    config = Config(iterations=60, prune_at=(10, 20), prune_ratio=(0.3, 0.3), learning_rate=0.1)
    for strategy in ("sparse", "dense"):
        result = smi.invert(model, range(5), config.replace(strategy=strategy))
        assert torch.equal(result.logits.argmax(1), result.targets)
        assert result.history["cross_entropy"][-1] < 0.3 * result.history["cross_entropy"][0]


# ---- random


def test_random_is_uniform() -> None:
    """Chi-square over the patches that survive two prunings of 4000 images: 15 degrees of freedom, p < 1e-4 is 45."""
    config, images = Config(strategy="random", prune_at=(2, 4), prune_ratio=(0.5, 0.5)), 4000
    strategy = STRATEGIES["random"](config.resolved(), range(images), N)
    keep = torch.arange(N).repeat(images, 1)
    for t, count in strategy.schedule.items():
        keep = strategy.select(t, keep, None)
        assert keep.shape == (images, count) and (keep.diff(dim=1) > 0).all()
        expected = images * count / N
        observed = torch.bincount(keep.flatten(), minlength=N)
        # Drawing without replacement makes counts less spread than independent draws, hence the factor.
        chi_square = ((observed - expected) ** 2).sum().item() / expected / (1 - count / N) * (N - 1) / N
        assert 3 < chi_square < 45
    pairs = (torch.bincount(keep[:, 0] * N + keep[:, 1], minlength=N * N) > 0).sum()
    assert pairs > 60, "images share their choices"


def test_random_does_not_ask_the_model() -> None:
    config = Config(**PRUNED, strategy="random")
    first = Inversion(tiny(seed=1), [0, 1, 2], config).run()
    second = Inversion(tiny(seed=2), [3, 3, 3], config.replace(semantics="official", result_mask="carried")).run()
    assert torch.equal(first.keep, second.keep) and torch.equal(first.dropped_at, second.dropped_at)
    other = Inversion(tiny(seed=1), [0, 1, 2], config.replace(seed=1)).run()
    assert not torch.equal(first.keep, other.keep)
    assert len({tuple(row) for row in first.keep.tolist()}) == 3


def test_sparse_keeps_what_the_model_attends_to(model: nn.Module) -> None:
    """The ranking is that of the forward before the pruning, on the images as they were then, un-augmented."""
    inversion, sparse = Inversion(model, [0, 1], Config(**PRUNED)), SparseModel(model)
    while not inversion.done:
        if inversion.iteration + 1 in inversion.schedule:
            images, keep = inversion.images.clone(), inversion.keep
            scores = sparse(images, keep, scores=True)[1]
            inversion.step()
            inversion.step()
            count = inversion.schedule[inversion.iteration - 1]
            for b, row in enumerate(scores.tolist()):
                best = sorted(range(len(row)), key=lambda i, row=row: -row[i])[:count]
                assert inversion.keep[b].tolist() == sorted(keep[b, best].tolist())
        else:
            inversion.step()


# ---- records


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_record_agrees_with_itself(model: nn.Module, semantics: str) -> None:
    config = Config(**PRUNED, semantics=semantics, result_mask="carried", tv1=0.1, snapshots=2)
    inversion, keeps = Inversion(model, [0, 1, 4], config, indices=[5, 6, 7]), {}
    while not inversion.done:
        inversion.step()
        if inversion.iteration - 1 in inversion.schedule:
            keeps[inversion.iteration - 1] = inversion.keep.clone()
    result = inversion.result()
    assert inversion.schedule == {3: 11, 6: 7, 9: 4}
    assert result.keep.shape == (3, 4) and result.dropped_at.dtype == torch.int32
    for t, keep in keeps.items():
        assert torch.equal(result.dropped_at > t, alive(keep))
    assert torch.equal(result.dropped_at == 14, alive(result.keep))
    assert result.targets.tolist() == [0, 1, 4] and result.indices.tolist() == [5, 6, 7]

    assert [(phase.start, phase.stop, phase.kept) for phase in result.phases] == [
        (0, 3, 16),
        (3, 6, 11),
        (6, 9, 7),
        (9, 14, 4),
    ]
    assert all(phase.seconds > 0 for phase in result.phases)
    assert result.snapshot_at == [3, 6, 9, 14] and result.snapshots.shape == (4, 2, 3, 16, 16)
    std, mean = (torch.tensor(value).view(-1, 1, 1) for value in (inversion.model.info.std, inversion.model.info.mean))
    shown = (result.images[:2] * std + mean) * 255
    assert result.snapshots.dtype == torch.uint8 and (result.snapshots[-1] - shown).abs().max() <= 0.5 + 1e-3

    assert result.history.keys() == {"cross_entropy", "tv1", "tv2", "total"}
    parts = {name: values.double() for name, values in result.history.items()}
    assert all(values.shape == (14,) and values.isfinite().all() for values in parts.values())
    total = parts["cross_entropy"] + 0.1 * parts["tv1"] + 1e-4 * parts["tv2"]
    torch.testing.assert_close(parts["total"], total, rtol=1e-5, atol=1e-5)
    logits, _ = SparseModel(model)(result.images, result.keep)
    torch.testing.assert_close(result.logits, logits.detach(), rtol=1e-5, atol=1e-5)
    entropies = F.cross_entropy(result.logits, result.targets, reduction="none")
    torch.testing.assert_close(result.losses["cross_entropy"], entropies)
    assert result.losses.keys() == {"cross_entropy", "tv1", "tv2", "l2"}
    torch.testing.assert_close(result.losses["l2"], result.images.flatten(1).norm(dim=1))


def test_making_records_takes_no_time_of_the_iterations(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*args: Any) -> int:
        time.sleep(1.5)
        return 1

    monkeypatch.setattr("smi.inversion.count_flops", slowly)
    result = Inversion(model, [0], Config(iterations=4, prune_at=(2,), prune_ratio=(0.5,))).run()
    assert all(phase.seconds < 1.5 for phase in result.phases)


def test_a_step_that_was_cut_short_can_be_taken_again(model: nn.Module) -> None:
    """A loss that fails, or Ctrl-C in a notebook, at a pruning iteration."""
    calls = []

    def failing(context: Context) -> Tensor:
        calls.append(context.step)
        if calls.count(3) == 1 and context.step == 3:
            raise KeyboardInterrupt
        return context.logits.mean()

    inversion = Inversion(model, [0, 1], Config(**PRUNED), objectives=[failing])
    with pytest.raises(KeyboardInterrupt):
        inversion.run()
    assert inversion.iteration == 3
    calls.append(3)
    plain = Inversion(model, [0, 1], Config(**PRUNED), objectives=[failing]).run()
    assert same(inversion.run(), plain)


def test_reranked_mask_is_that_of_a_dense_pass(model: nn.Module) -> None:
    result = Inversion(model, [0, 1], Config(**PRUNED, semantics="official")).run()
    count = math.floor((N + 1) * 0.7**3)
    scores = SparseModel(model)(result.images, scores=True)[1]
    assert result.keep.shape[1] == count == 5
    for b, row in enumerate(scores.tolist()):
        assert result.keep[b].tolist() == sorted(sorted(range(N), key=lambda i, row=row: -row[i])[:count])
    assert set(result.dropped_at.flatten().tolist()) == {3, 6, 9, 14}


def flops_by_hand(model: Any, kept: int) -> int:
    """Forward and gradient with respect to the input alone, of one image: matrix products only."""
    D, T, layers, size = model.embed_dim, kept + 1, len(model.blocks), 3 * PATCH * PATCH
    linear = 24 * D * D * T  # D -> 3 D, D -> D, D -> 4 D -> D, two operations each
    scores = 4 * T * T * D  # queries with keys, weights with values
    one_way = 2 * size * D * kept + layers * linear + 2 * D * CLASSES
    return 2 * one_way + layers * (scores + 10 * T * T * D)  # on the way back the scores are computed once more


def test_flops_are_counted_right() -> None:
    model = tiny(embed_dim=32)
    result = Inversion(model, [0, 1, 2], Config(**PRUNED)).run()
    for phase in result.phases:
        expected = 3 * (phase.stop - phase.start) * flops_by_hand(model, phase.kept)
        assert phase.flops == pytest.approx(expected, rel=0.01)


# ---- best and convergence


def test_best_is_a_copy_and_never_worse_than_the_last(model: nn.Module) -> None:
    config = Config(**PRUNED, learning_rate=0.5, best=True, best_every=1)
    last = Inversion(model, [0, 1, 2], config.replace(best=False)).run()
    inversion, seen = Inversion(model, [0, 1, 2], config), []
    sparse = SparseModel(model)
    while not inversion.done:
        inversion.step()
        if inversion.iteration > 9:
            with torch.no_grad():
                logits, _ = sparse(inversion.images, inversion.keep)
            images = inversion.images.clone()
            context = Context(0, images, logits, inversion.targets, inversion.keep, None)
            seen.append((images, Objectives(config.resolved()).each(context)))
    held = inversion.result()
    values = torch.stack([value for _, value in seen])
    assert (values.min(0).values <= values[-1]).all() and (values.argmin(0) < len(seen) - 1).any()
    for b, winner in enumerate(values.argmin(0).tolist()):
        assert torch.equal(held.images[b], seen[winner][0][b])
    objective = [result.losses["cross_entropy"] + 1e-4 * result.losses["tv2"] for result in (held, last)]
    assert (objective[0] <= objective[1] + 1e-6).all() and not torch.equal(held.images, last.images)
    inversion.images.zero_()
    assert torch.equal(inversion.result().images, held.images)


def test_best_looks_at_the_last_iterate_whatever_the_interval(model: nn.Module) -> None:
    config = Config(iterations=7, prune_at=(2,), prune_ratio=(0.5,), learning_rate=1e-3, jitter="none", flip=False)
    last = Inversion(model, [0, 1], config).run()
    best = Inversion(model, [0, 1], config.replace(best=True, best_every=1000)).run()
    assert torch.equal(best.images, last.images)


def test_best_looks_at_the_last_iterate_when_converged(model: nn.Module) -> None:
    """Small steps downhill: each iterate is better than the one before, so the best one is the last one."""
    still = {"learning_rate": 1e-3, "jitter": "none", "flip": False, **UNPRUNED}
    config = Config(iterations=60, tolerance=0.9, patience=3, **still)
    last = Inversion(model, [0], config).run()
    best = Inversion(model, [0], config.replace(best=True, best_every=4)).run()
    assert len(last.history["total"]) == len(best.history["total"]) == 6
    assert torch.equal(best.images, last.images)


def test_best_gets_over_nan(model: nn.Module) -> None:
    def once(context: Context) -> Tensor:
        poison = math.nan if context.step == 1 and not torch.is_grad_enabled() else 0.0
        return context.logits.sum(1) * 0 + poison

    config = Config(iterations=6, best=True, best_every=1, **UNPRUNED)
    plain = Inversion(model, [0], config).run()
    found = Inversion(model, [0], config, objectives=[once]).run().images
    torch.testing.assert_close(
        found, plain.images, rtol=0, atol=1e-3
    )  # the two add the logits' gradient up differently


def test_convergence_stops_the_batch(model: nn.Module) -> None:
    config = Config(iterations=300, prune_at=(3, 6), prune_ratio=(0.3, 0.3), learning_rate=1e-4, jitter="none")
    result = smi.invert(model, [0, 1], config.replace(tolerance=0.5, patience=5))
    # At 10 the older window would reach back across the pruning at 6; from 16 on both windows lie behind it.
    assert len(result.history["total"]) == 20 == result.phases[-1].stop == result.snapshot_at[-1]
    assert torch.equal(result.dropped_at == 20, alive(result.keep)) and result.keep.shape == (2, 7)
    inversion = Inversion(model, [0, 1], config.replace(tolerance=0.5, patience=5))
    inversion.run()
    assert inversion.done and inversion.iteration == 20
    with pytest.raises(SmiError, match="done after 20 iterations"):
        inversion.step()
    assert len(smi.invert(model, [0], config.replace(iterations=30)).history["total"]) == 30


def test_a_schedule_that_leaves_nothing(model: nn.Module) -> None:
    with pytest.raises(SmiError, match=r"pruning 0\.97 of 16 patches at iteration 2 leaves none"):
        Inversion(model, [0], Config(iterations=5, prune_at=(2,), prune_ratio=(0.97,)))
    one = Inversion(model, [0], Config(iterations=5, prune_at=(1, 4), prune_ratio=(0.5, 0.87))).run()
    assert one.keep.shape == (1, 1) and one.phases[-1].kept == 1


# ---- precision


def test_double_precision_stays_double() -> None:
    model = tiny().double()
    inversion = Inversion(model, [0, 1], Config(**PRUNED, tv1=0.1, l2=0.1))
    checked = []

    def spy(context: Context) -> Tensor:
        assert context.logits.dtype == context.images.dtype == context.augmented.dtype == torch.float64
        checked.append(context.step)
        return context.logits.mean()

    assert inversion.images.dtype == torch.float64
    inversion.run()
    assert inversion.images.dtype == torch.float64 and inversion.result().images.dtype == torch.float32
    assert (inversion.images != inversion.images.float()).any(), "single precision on the way"
    Inversion(model, [0, 1], Config(**PRUNED), objectives=[spy]).run()
    assert checked == list(range(14))


def test_half_precision_runs(model: nn.Module) -> None:
    config = Config(**PRUNED, precision="bf16", learning_rate=0.01)
    half, full = smi.invert(model, [0, 1], config), smi.invert(model, [0, 1], config.replace(precision="fp32"))
    assert half.images.dtype == half.logits.dtype == torch.float32 and half.images.isfinite().all()
    assert not torch.equal(half.images, full.images)
    first = [result.history["cross_entropy"][0] for result in (half, full)]
    torch.testing.assert_close(*first, rtol=0.05, atol=0.05)
    assert all(values.isfinite().all() for values in half.history.values())


def test_a_model_without_a_head_needs_an_objective_of_ones_own() -> None:
    """As timm creates DINOv2, DINOv3 and SigLIP unless told otherwise: its outputs are features, not classes."""
    headless = tiny(num_classes=0)
    with pytest.raises(SmiError, match=r"has no classification head for cross-entropy.*cross_entropy to 0"):
        Inversion(headless, [0], Config(**PRUNED))

    def brightest(context: Context) -> Tensor:
        return -context.logits[:, 0]

    config = Config(**PRUNED, cross_entropy=0.0)
    before, after = (
        Inversion(headless, [0, 0], config.replace(iterations=i), objectives=[brightest]).run() for i in (10, 14)
    )
    assert (after.logits[:, 0] > before.logits[:, 0]).all()
