"""What is minimised and for which targets: built-in terms and users' own, under every strategy and both semantics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import CLASSES, PRUNED, SEMANTICS, UNPRUNED, one_thread, tiny  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from smi import Config, Context, Inversion, Objective, SmiError, SparseModel
from smi.objectives import Objectives


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


def scalar_distance(context: Context) -> Tensor:
    return F.cross_entropy(context.logits, context.targets.flip(0)) + context.images.square().mean()


def distance_of_each(context: Context) -> Tensor:
    entropies = F.cross_entropy(context.logits, context.targets.flip(0), reduction="none")
    return entropies + context.images.square().flatten(1).mean(1)


def calm_features(context: Context) -> Tensor:
    tokens = context.features["blocks.0"]
    assert tokens.shape[1] == context.keep.shape[1] + 1 and tokens.requires_grad
    assert context.features["norm"].shape == tokens.shape
    return tokens.square().mean((1, 2))


class Smooth:
    """Wants what the network saw; an object rather than a function."""

    def __call__(self, context: Context) -> Tensor:
        assert context.augmented.shape == context.images.shape and context.augmented.requires_grad
        return context.augmented.diff(dim=3).square().mean()


EXTRA: dict[str, list[Any]] = {
    "scalar": [scalar_distance],
    "per image": [distance_of_each],
    "features": [Objective(calm_features, weight=0.3, name="calm", features=("blocks.0", "norm"))],
    "object": [Smooth(), Objective(lambda context: context.logits.square().mean(), name="small")],
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("strategy", ["dense", "sparse", "random"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_users_loss_runs_everywhere(model: nn.Module, semantics: str, strategy: str, extra: str) -> None:
    config = Config(iterations=8, prune_at=(3,), prune_ratio=(0.4,), semantics=semantics, strategy=strategy)
    plain = smi.invert(model, [0, 1, 2], config)
    result = smi.invert(model, [0, 1, 2], config, objectives=EXTRA[extra])
    names = {"scalar": ["scalar_distance"], "per image": ["distance_of_each"], "features": ["calm"]}
    for name in names.get(extra, ["Smooth", "small"]):
        assert result.history[name].isfinite().all() and result.history[name].abs().sum() > 0
    assert not torch.equal(result.images, plain.images)
    assert set(result.losses) == set(plain.losses)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_mean_is_as_good_as_one_value_for_each_image(model: nn.Module, semantics: str) -> None:
    config = Config(**PRUNED, semantics=semantics, learning_rate=0.01)
    scalar, each = (
        smi.invert(model, [0, 1, 2], config, objectives=[Objective(loss, name="distance")])
        for loss in (scalar_distance, distance_of_each)
    )
    torch.testing.assert_close(scalar.images, each.images, rtol=0, atol=1e-4)
    assert torch.equal(scalar.keep, each.keep)
    for name in scalar.history:
        torch.testing.assert_close(scalar.history[name], each.history[name], rtol=1e-4, atol=1e-4)


def test_a_users_loss_can_replace_the_built_in(model: nn.Module) -> None:
    config = Config(iterations=8, **UNPRUNED)
    theirs = Objective(lambda c: F.cross_entropy(c.logits, c.targets, reduction="none"), name="mine")
    only = smi.invert(model, [0, 1], config.replace(cross_entropy=0), objectives=[theirs])
    assert only.history.keys() == {"tv2", "mine", "total"}
    torch.testing.assert_close(only.images, smi.invert(model, [0, 1], config).images, rtol=0, atol=1e-4)


def test_objectives_that_are_refused(model: nn.Module) -> None:
    config = Config(iterations=2, **UNPRUNED)

    def run(*objectives: Any, **changes: Any) -> None:
        smi.invert(model, [0, 1], config.replace(**changes), objectives=objectives)

    with pytest.raises(SmiError, match=r"objective 'bad' returned \(2, 5\); expected a scalar tensor or one value"):
        run(Objective(lambda context: context.logits, name="bad"))
    with pytest.raises(SmiError, match="objective 'bad' returned float"):
        run(Objective(lambda context: 1.0, name="bad"))
    with pytest.raises(SmiError, match="two objectives are called 'scalar_distance'"):
        run(scalar_distance, scalar_distance)
    for name in ("total", "tv2"):
        with pytest.raises(SmiError, match=f"two objectives are called '{name}'"):
            run(Objective(scalar_distance, name=name))
    with pytest.raises(SmiError, match="every objective has weight 0"):
        run(cross_entropy=0, tv2=0)
    with pytest.raises(SmiError, match=r"no submodule 'layers\.0'"):
        run(Objective(scalar_distance, features=("layers.0",)))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_of_objectives_are_finite(weight: float) -> None:
    with pytest.raises(SmiError, match=f"weight of .* is {weight}"):
        Objective(scalar_distance, weight=weight)


# ---- targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_targets(model: nn.Module, dtype: torch.dtype) -> None:
    config = Config(**PRUNED, learning_rate=0.01)
    hard = smi.invert(model, [3, 1], config)
    one_hot = smi.invert(model, F.one_hot(torch.tensor([3, 1]), CLASSES).to(dtype), config)
    torch.testing.assert_close(one_hot.images, hard.images, rtol=0, atol=1e-4)
    assert torch.equal(one_hot.keep, hard.keep) and one_hot.targets.tolist() == [3, 1]
    mixed = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]] * 2, dtype=dtype)
    config = Config(iterations=50, **UNPRUNED, learning_rate=0.1, tv2=0)
    result = smi.invert(model, mixed, config)
    torch.testing.assert_close(result.logits.softmax(1), mixed.float(), rtol=0, atol=0.1)
    entropies = -(mixed.float() * result.logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(result.losses["cross_entropy"], entropies, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 5], "class 5 does not exist; the model has classes 0 to 4"),
        ([-1], "class -1 does not exist"),
        ([], r"shape \(0,\)"),
        ([0.5, 1.0], "expected class indices"),
        (torch.zeros(2, 2, dtype=torch.int64), r"shape \(2, 2\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.full((2, 4), 0.25), "4 columns; expected 5"),
        (torch.full((2, 5), 0.3), "sum to 1"),
        (torch.tensor([[1.5, -0.5, 0, 0, 0]]), "numbers >= 0"),
        (torch.full((1, 5), math.nan), "not probabilities"),
    ],
)
def test_targets_that_are_refused(model: nn.Module, targets: Any, message: str) -> None:
    with pytest.raises(SmiError, match=message):
        Inversion(model, targets)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (torch.zeros(0, CLASSES), {}),
        (["cat"], {}),
        ([0], {"indices": [-1]}),
        ([0], {"indices": [0.5]}),
    ],
)
def test_more_that_should_be_refused_in_our_words(model: nn.Module, targets: Any, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        Inversion(model, targets, **options)
    assert isinstance(error.value, SmiError)


def test_image_numbers(model: nn.Module) -> None:
    with pytest.raises(SmiError, match="2 targets and 3 image numbers"):
        Inversion(model, [0, 1], indices=[0, 1, 2])


def test_image_numbers_of_a_tensor(model: nn.Module) -> None:
    assert Inversion(model, [0, 1], indices=torch.tensor([4, 2])).indices == [4, 2]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"ranking": "received_attention"}])
def test_a_sparse_model_has_to_agree_with_the_config(model: nn.Module, changes: dict[str, str]) -> None:
    with pytest.raises(SmiError):
        Inversion(SparseModel(model), [0], Config(iterations=2, **UNPRUNED).replace(**changes))


def test_no_augmentation_is_none(model: nn.Module) -> None:
    """As `Context` documents; a loss that asks for `augmented` then needs no copy of the images."""
    seen: dict[int, Any] = {}

    def spy(context: Context) -> Tensor:
        seen[context.step] = context.offsets
        return context.logits.mean()

    Inversion(model, [0], Config(**PRUNED), objectives=[spy]).run()
    assert all(seen[t] is None for t in (2, 3, 5, 6, 8, 9))


def test_the_weight_of_an_image_is_the_same_bits_in_any_batch() -> None:
    total = Objective(lambda context: context.images.flatten(1).sum(1), weight=1e-4)
    objectives = Objectives(Config(cross_entropy=0, tv2=0).resolved(), [total])
    for B in range(1, 50):
        images = torch.zeros(B, 3, 2, 2, requires_grad=True)
        context = Context(0, images, torch.zeros(B, CLASSES), torch.zeros(B).long(), torch.zeros(B, 1).long(), None)
        (grad,) = torch.autograd.grad(objectives(context)[0], images)
        assert torch.equal(grad, torch.full_like(grad, 1e-4)), f"in a batch of {B}"
