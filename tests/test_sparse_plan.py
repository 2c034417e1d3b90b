"""Sparse inversion in loops that are not ours: they come to what `smi.invert` does, and to nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import PRUNED, SEMANTICS, UNPRUNED, alive, one_thread, tiny  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

import smi
from smi.augment import NOISE, normal_images

TARGETS = torch.tensor([0, 3, 1])
CONFIG = smi.Config(**PRUNED, tv2=0.0, tv1=0.0, l2=0.0, learning_rate=0.05, eps=1e-4, seed=3)


def own_loop(
    model: Any, config: smi.Config, optimizer: Any = None, scheduler: Any = None
) -> tuple[Tensor, smi.SparsePlan, list[Tensor]]:
    """Somebody's dense loop with the plan in it: cross-entropy, Adam, a clamp."""
    info = smi.SparseModel(tiny()).info
    images = normal_images(config.seed, NOISE, range(3), info.input_size).double().requires_grad_()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (info.mean, info.std))
    adam = torch.optim.Adam([images], lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)
    adam = adam if optimizer is None else optimizer([images])
    plan, seen = smi.SparsePlan(model, images, config), []
    rates = None if scheduler is None else scheduler(adam)
    while not plan.done:
        loss = F.cross_entropy(plan(images), TARGETS, reduction="sum")
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            images.clamp_(-mean / std, (1 - mean) / std)
        plan.step()
        if rates is not None:
            rates.step()
        seen.append(images.detach().clone())
    return images.detach(), plan, seen


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "random"},
        {"strategy": "dense"},
        {"ranking": "random"},
        {"jitter": "pixel"},
        {"jitter": "none", "flip": False},
        {"ranking": "received_attention"},
    ],
)
def test_a_loop_with_the_plan_comes_to_what_invert_does(options: dict[str, Any], backend: str) -> None:
    config = CONFIG.replace(**options)
    model = smi.SparseModel(
        tiny().double(), ranking=config.model_ranking, backend=backend if backend == "reference" else "auto"
    )
    expected = smi.invert(model, TARGETS, config)
    images, plan, _ = own_loop(model, config)
    assert torch.equal(plan.keep, expected.keep)
    torch.testing.assert_close(images.float(), expected.images, rtol=1e-5, atol=1e-5)
    assert plan.iteration == config.iterations and (expected.keep.shape[1] < 16) == (config.strategy != "dense")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rates_are_those_of_torchs_schedulers(warmup: int, backend: str) -> None:
    config = CONFIG.replace(lr_schedule="cosine", warmup=warmup)
    model = smi.SparseModel(tiny().double(), backend="reference" if backend == "reference" else "auto")

    def torchs(adam: torch.optim.Optimizer) -> Any:
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.iterations - warmup)
        if not warmup:
            return rest
        rising = torch.optim.lr_scheduler.LinearLR(adam, 1 / warmup, 1.0, warmup - 1)
        return torch.optim.lr_scheduler.SequentialLR(adam, [rising, rest], [warmup])

    expected = smi.invert(model, TARGETS, config)
    images, plan, _ = own_loop(model, config, scheduler=torchs)
    assert torch.equal(plan.keep, expected.keep)
    torch.testing.assert_close(images.float(), expected.images, rtol=1e-5, atol=1e-5)
    constant = smi.invert(model, TARGETS, CONFIG)
    assert float((constant.images - expected.images).abs().max()) > 0.01


def test_stopped_pixels_stay_bit_for_bit_whatever_the_optimizer_does_to_them() -> None:
    config = CONFIG.replace(jitter="none", flip=False)

    def restless(parameters: list[Tensor]) -> Any:
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    images, plan, seen = own_loop(tiny().double(), config, restless)
    last = torch.stack(seen[9:])
    assert torch.equal(torch.where(plan.live, 0.0, last - last[:1]), torch.zeros_like(last))
    assert float((last[-1] - last[0]).abs().max()) > 0
    pixels = alive(plan.keep).view(3, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(plan.live[:, 0], pixels)


def test_under_official_semantics_stopped_pixels_go_on() -> None:
    config = CONFIG.replace(semantics="official", augment_per="batch", result_mask="carried")
    _, plan, seen = own_loop(tiny().double(), config)
    assert float(torch.where(plan.live, 0.0, seen[-1] - seen[9]).abs().max()) > 0


def test_priors_and_further_terms_are_the_users() -> None:
    images = torch.randn(2, 3, 16, 16).requires_grad_()
    plan = smi.SparsePlan(tiny(), images, CONFIG.replace(jitter="none", flip=False))
    while plan.iteration < 5:
        plan(images)
        plan.step()
    through, everywhere = torch.autograd.grad(plan(images).sum(), images, retain_graph=True)[0], 2 * images.detach()
    assert through.abs().amax((2, 3)).all() and not torch.where(plan.live, 0.0, through).any()
    (both,) = torch.autograd.grad(plan(images).sum() + images.square().sum(), images)
    torch.testing.assert_close(both, through + everywhere)


@pytest.mark.parametrize(
    ("config", "images", "says"),
    [
        (
            CONFIG.replace(strategy="rebirth", iterations=16),
            None,
            "strategy is 'rebirth'; a plan follows dense, sparse or",
        ),
        (CONFIG.replace(ranking="gradient_input"), None, "ranking 'gradient_input' wants your loss once more"),
        (CONFIG.replace(precision="bf16", prune_ratio=(0.9, 0.9, 0.9)), None, "leaves none"),
        (CONFIG, torch.zeros(2, 3, 8, 8), r"images are \(2, 3, 8, 8\) on cpu; expected \(B, 3, 16, 16\) on cpu"),
        (CONFIG, torch.zeros(2, 3, 16, 16).requires_grad_() * 2, "made by an operation; expected"),
    ],
)
def test_what_a_plan_cannot_follow_is_said(config: smi.Config, images: Tensor | None, says: str) -> None:
    with pytest.raises(smi.SmiError, match=says):
        smi.SparsePlan(tiny(), torch.zeros(2, 3, 16, 16) if images is None else images, config)


def test_misuse_is_said() -> None:
    images = torch.zeros(2, 3, 16, 16, requires_grad=True)
    with pytest.raises(smi.SmiError, match="there are 2 images and 1 image numbers"):
        smi.SparsePlan(tiny(), images, CONFIG, indices=[4])
    plan = smi.SparsePlan(tiny(), images, CONFIG.replace(iterations=4, prune_at=(2,), prune_ratio=(0.5,)))
    plan.step()
    with pytest.raises(
        smi.SmiError, match="iteration 2 prunes by what the one before ranks, in which the plan was not"
    ):
        plan.step()
    with pytest.raises(smi.SmiError, match=r"called with \(4, 3, 16, 16\); expected \(2, 3, 16, 16\), a row for each"):
        plan(torch.cat([images, images]))
    plan(images)
    for _ in range(3):
        plan.step()
    for call in (plan.step, lambda: plan(images), lambda: plan.offsets):
        with pytest.raises(smi.SmiError, match="all 4 iterations of the plan are done"):
            call()
