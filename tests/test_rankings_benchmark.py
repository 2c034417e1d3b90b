"""The experiment about rankings: the ends of an order, the controls, and images whose deciding patch is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import CLASSES, N, tiny
from torch import Tensor

from benchmarks import rankings


@pytest.fixture(scope="module")
def ranked() -> rankings.Ranked:
    return rankings.Ranked(tiny(), (N, 3))


def test_first_and_last_are_the_two_ends_of_one_order(ranked: rankings.Ranked) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    orders = dict(ranked.choices(images, torch.arange(4), 0))
    assert len(orders) == rankings.DRAWS + 2 * len(rankings.RANKINGS)
    for name, order in orders.items():
        assert torch.equal(order.sort(1).values, torch.arange(N).repeat(4, 1)), name
    for ranking, scores in ranked.scores(images, torch.arange(4)):
        assert (scores.gather(1, orders[ranking]).diff(dim=1) <= 0).all(), ranking
        assert (scores.gather(1, orders[f"{ranking}, last"]).diff(dim=1) >= 0).all(), ranking


def test_the_gradient_is_that_of_the_models_own_loss(ranked: rankings.Ranked) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([1, 3])
    loss = torch.nn.functional.cross_entropy(tiny()(images), targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss, images)
    patches = (grad * images).abs().sum(1).unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4)).flatten(1)
    found = dict(ranked.scores(images.detach(), targets))["gradient_input"]
    torch.testing.assert_close(found, patches, rtol=1e-4, atol=1e-6)


def test_told_counts_who_says_the_class_from_the_patches_kept(
    ranked: rankings.Ranked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that sees the mark of patch 5 where it is kept; a judge that sees it in the pixels."""
    images = torch.zeros(6, 3, 16, 16)
    images[:, :, 4:8, 4:8] = 9.0  # patch 5
    targets = torch.full((6,), 2)

    def feed(_: Tensor, keep: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.one_hot(2 * (keep == 5).any(1).long(), CLASSES), None

    def orders(*_: Any) -> Any:
        first = torch.tensor([5, *(n for n in range(N) if n != 5)]).repeat(6, 1)
        return [("first", first), ("last", first.flip(1))]

    class Judge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            info = ranked.model.info
            self.pretrained_cfg = {"mean": info.mean, "std": info.std}

        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(2 * (images.amax((1, 2, 3)) > 5).long(), CLASSES)

    monkeypatch.setattr(ranked.model, "feed", feed)
    monkeypatch.setattr(ranked, "choices", orders)
    told = ranked.told(images, targets, Judge())
    assert told == {w: {"model": [1.0, r], "judge": [1.0, r]} for w, r in (("first", 1.0), ("last", 0.0))}


def test_draws_are_one_row() -> None:
    found = {f"random {n}": {"model": [0.1 * n]} for n in range(rankings.DRAWS)} | {"x": {"model": [0.5]}}
    assert rankings.combined(found) == {"random": {"model": [pytest.approx(0.1)]}, "x": {"model": [0.5]}}
