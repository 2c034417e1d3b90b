"""Losses that plug in, against their formulas computed in NumPy by loops, and under every strategy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small import CLASSES, PATCH, SEMANTICS, N, one_thread, randomise, tiny  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from smi import Config, Context, Objective, SmiError, SparseModel, losses
from smi_kernels.graphs import NoWaiting

KEEP = torch.tensor([[1, 2, 5, 7, 11], [0, 3, 4, 8, 15]])
Numbers = np.ndarray[Any, np.dtype[np.float64]]


class ConvNet(nn.Module):
    """Two convolutions with batch norm, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)
        for norm in (self.norm1, self.norm2):
            generator = torch.Generator().manual_seed(norm.num_features)
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(num_heads=4).double()


@pytest.fixture(scope="module")
def convnet() -> nn.Module:
    return randomise(ConvNet(), seed=3).double()


@pytest.fixture(scope="module")
def sparse(model: nn.Module) -> SparseModel:
    return SparseModel(model, backend="reference", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def pixels(seed: int = 1, images: int = 2) -> Tensor:
    return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(
    objective: Objective, sparse: SparseModel, images: Tensor, keep: Tensor | None = KEEP, per_image: bool = True
) -> Context:
    """What `objective` sees of `images` fed the patches `keep`."""
    watching = SparseModel(sparse.original, backend="reference", mean=sparse.info.mean, std=sparse.info.std)
    watching.watch(objective.features)
    logits, _ = watching(images, keep)
    everything = torch.arange(N).repeat(len(images), 1)
    return Context(
        step=0,
        images=images,
        logits=logits,
        targets=torch.tensor([1, 3]),
        keep=everything if keep is None else keep,
        offsets=None,
        features=watching.features,
        per_image=per_image,
    )


def logits_only(logits: Tensor, targets: Tensor) -> Context:
    return Context(0, torch.zeros(len(logits), 3, 4, 4), logits, targets, torch.zeros(len(logits), 1).long(), None)


def check_gradient(objective: Objective, sparse: SparseModel, per_image: bool = True, tolerance: float = 1e-6) -> None:
    """The derivative along random directions is that of central differences, in float64."""
    images, step = pixels(), 1e-5
    images.requires_grad_()
    value = objective.function(seen(objective, sparse, images, per_image=per_image))
    assert value.shape == ((2,) if per_image else ())
    (grad,) = torch.autograd.grad(value.sum(), images)
    assert grad.abs().max() > 0
    for seed in (11, 12, 13):
        direction = pixels(seed)
        with torch.no_grad():
            above, below = (
                objective.function(seen(objective, sparse, images + sign * step * direction, per_image=per_image)).sum()
                for sign in (1, -1)
            )
        numeric, exact = (above - below) / (2 * step), (grad * direction).sum()
        assert abs(numeric - exact) <= tolerance * max(1.0, abs(exact)), (numeric, exact)


# --- on logits ---


def test_margin_is_the_distance_to_the_best_other_class() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [3.0, -1.0, 2.5]])
    hard = logits_only(logits, torch.tensor([1, 2]))
    assert losses.margin().function(hard).tolist() == [-2.0, 0.5]
    assert losses.margin(1.5).function(hard).tolist() == [-1.5, 0.5]
    soft = logits_only(logits, torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.2, 0.6]]))
    assert losses.margin().function(soft).tolist() == [-2.0, 0.5]


def test_bce_is_the_mean_over_classes() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    labels = [[1.0, 0.0, 1.0], [0.3, 1.0, 0.0]]
    expected = []
    for row, wanted in zip(logits.tolist(), labels, strict=True):
        total = 0.0
        for z, y in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-z))
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
        expected.append(total / 3)
    found = losses.bce(labels).function(logits_only(logits, torch.tensor([0, 0])))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    shared = losses.bce(labels[0]).function(logits_only(logits[:1].repeat(2, 1), torch.tensor([0, 0])))
    torch.testing.assert_close(shared, found[:1].repeat(2))


def test_several_labels_are_all_found(model: nn.Module) -> None:
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    config = Config(iterations=60, strategy="dense", cross_entropy=0.0, tv2=0.0, learning_rate=0.1, jitter="none")
    result = smi.invert(model, [0, 0], config, objectives=[losses.bce(wanted)])
    assert ((result.logits > 0).float() == wanted).all()


# --- on features ---


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_embedding_is_a_distance_to_what_the_head_sees(model: Any, sparse: SparseModel, distance: str) -> None:
    images = pixels()
    goal = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    objective = losses.embedding(goal, distance=distance)  # type: ignore[arg-type]
    found = objective.function(seen(objective, sparse, images, keep=None))
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    for image in range(2):
        f, g = pooled[image], goal[image].double().numpy()
        lengths = math.sqrt((f * f).sum()) * math.sqrt((g * g).sum())
        expected = 1 - (f * g).sum() / lengths if distance == "cosine" else math.sqrt(((f - g) ** 2).sum())
        assert found[image].item() == pytest.approx(expected, rel=1e-6)
    check_gradient(objective, sparse)


def attention_outputs(model: Any, images: Tensor, keep: Tensor | None) -> tuple[list[Numbers], list[Numbers]]:
    """Per block: the attention's output (B, T, D) and its weights (B, H, T, T), by NumPy from timm's weights."""
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        if keep is not None:
            x = torch.cat((x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))), 1)
        outputs, maps = [], []
        for block in model.blocks:
            normed = block.norm1(x)
            B, T, D = normed.shape
            H = block.attn.num_heads
            qkv = normed.numpy() @ block.attn.qkv.weight.numpy().T + block.attn.qkv.bias.numpy()
            q, k, v = qkv.reshape(B, T, 3, H, D // H).transpose(2, 0, 3, 1, 4)
            scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(D // H))
            attention = scores / scores.sum(3, keepdims=True)
            mixed = (attention @ v).transpose(0, 2, 1, 3).reshape(B, T, D)
            out = mixed @ block.attn.proj.weight.numpy().T + block.attn.proj.bias.numpy()
            outputs.append(out)
            maps.append(attention)
            x = x + torch.from_numpy(out)
            x = x + block.mlp(block.norm2(x))
    return outputs, maps


@pytest.mark.parametrize("keep", [None, KEEP], ids=["dense", "sparse"])
def test_patch_similarity_entropy_is_that_of_a_kernel_density_estimate(
    model: nn.Module, sparse: SparseModel, keep: Tensor | None
) -> None:
    images, bandwidth = pixels(), 0.1
    objective = losses.patch_similarity_entropy(model, bandwidth=bandwidth)
    found = objective.function(seen(objective, sparse, images, keep))
    outputs, _ = attention_outputs(model, images, keep)
    axis = np.linspace(-2, 2, 8001)  # an integral that owes nothing to the points of the term
    for image in range(2):
        expected = 0.0
        for block in outputs:
            patches = block[image, 1:]
            density, pairs = np.zeros_like(axis), 0
            for i in range(len(patches)):
                for j in range(i):
                    u, v = patches[i], patches[j]
                    similarity = (u @ v) / math.sqrt((u @ u) * (v @ v))
                    density += np.exp(-(((axis - similarity) / bandwidth) ** 2) / 2)
                    pairs += 1
            density /= pairs * bandwidth * math.sqrt(2 * math.pi)
            expected += (density * np.log(np.maximum(density, 1e-300))).sum() * (axis[1] - axis[0])
        assert found[image].item() == pytest.approx(expected, abs=0.02)  # what lies beyond three bandwidths


def test_entropy_of_one_similarity_is_that_of_a_gaussian() -> None:
    # Patches that are orthogonal in pairs have similarity 0: f is one Gaussian, H = log(h sqrt(2 pi e)).
    from smi.token_losses import _entropy

    patches = torch.eye(6, dtype=torch.float64)[None]
    expected = math.log(0.2 * math.sqrt(2 * math.pi * math.e))
    assert _entropy(patches, 0.2).item() == pytest.approx(expected, rel=1e-6)
    assert _entropy(patches[:, :1], 0.2).tolist() == [0.0]


def test_patch_similarity_entropy_has_the_right_gradient(model: nn.Module, sparse: SparseModel) -> None:
    check_gradient(losses.patch_similarity_entropy(model, blocks=[0, 1]), sparse)


def ssim(a: Numbers, b: Numbers) -> float:
    c_1, c_2 = 0.01**2, 0.03**2
    m_a, m_b = sum(a) / len(a), sum(b) / len(b)
    s_aa, s_bb = sum((a - m_a) ** 2) / len(a), sum((b - m_b) ** 2) / len(b)
    s_ab = sum((a - m_a) * (b - m_b)) / len(a)
    above = (2 * m_a * m_b + c_1) * (2 * s_ab + c_2)
    return float(above / ((m_a**2 + m_b**2 + c_1) * (s_aa + s_bb + c_2)))


@pytest.mark.parametrize("keep", [None, KEEP], ids=["dense", "sparse"])
def test_head_similarity_is_the_mean_over_pairs_of_heads(
    model: nn.Module, sparse: SparseModel, keep: Tensor | None
) -> None:
    images = pixels()
    objective = losses.head_similarity(model)
    found = objective.function(seen(objective, sparse, images, keep))
    _, maps = attention_outputs(model, images, keep)
    for image in range(2):
        values = []
        for attention in maps:
            tokens = attention.shape[-1]
            heads = attention[image, :, 1:, 1:] * tokens
            for i in range(4):
                for j in range(i):
                    values += [1 - ssim(a, b) for a, b in zip(heads[i], heads[j], strict=True)]
        assert found[image].item() == pytest.approx(sum(values) / len(values), rel=1e-9)
    check_gradient(objective, sparse)


@pytest.mark.parametrize("make", [losses.patch_similarity_entropy, losses.head_similarity])
def test_where_tokens_are_merged_those_that_are_left_are_patches(
    model: nn.Module, sparse: SparseModel, make: Callable[..., Objective]
) -> None:
    """Fewer than were fed, and the class token is none of them."""
    objective = make(model, blocks=[1])
    few = seen(objective, sparse, pixels(), KEEP)
    merged = dataclasses.replace(few, keep=torch.arange(N).expand(2, -1))
    torch.testing.assert_close(objective.function(merged), objective.function(few), rtol=0, atol=0)


# --- on images ---


def test_low_pass_is_the_energy_of_high_waves() -> None:
    x = torch.arange(32, dtype=torch.float64)
    low = 0.7 * torch.cos(2 * math.pi * 2 / 32 * x)[None, :].expand(32, 32)
    high = 0.4 * torch.cos(2 * math.pi * 10 / 32 * x)[:, None].expand(32, 32)
    images = torch.stack((low, low + high, low + high + 5.0))[:, None]
    context = Context(0, images, torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(3, 1).long(), None)
    found = losses.low_pass(0.25).function(context)  # a cosine of amplitude a has the mean square a^2 / 2
    torch.testing.assert_close(found, torch.tensor([0.0, 0.08, 0.08], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    everything_but_the_mean = losses.low_pass(0.0).function(context)
    torch.testing.assert_close(everything_but_the_mean, images.var((1, 2, 3), correction=0), rtol=1e-9, atol=1e-12)


def test_low_pass_has_the_right_gradient(sparse: SparseModel) -> None:
    check_gradient(losses.low_pass(0.2), sparse)


def in_own_normalisation(images: Tensor, sparse: SparseModel, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    ours_mean, ours_std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (sparse.info.mean, sparse.info.std)
    )
    mean_, std_ = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    return (images * ours_std + ours_mean - mean_) / std_


MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.mark.parametrize("per_image", [True, False])
def test_batch_norm_statistics_are_those_of_the_layers_inputs(
    convnet: Any, sparse: SparseModel, per_image: bool
) -> None:
    objective = losses.batch_norm_statistics(convnet, sparse.info, mean=MEAN, std=STD)
    images = pixels()
    found = objective.function(seen(objective, sparse, images, per_image=per_image))
    with torch.no_grad():
        x = in_own_normalisation(images, sparse, MEAN, STD)
        first = F.conv2d(x, convnet.first.weight, convnet.first.bias, stride=2)
        bn = convnet.norm1
        shape = (1, -1, 1, 1)
        normed = (first - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
        second = F.conv2d(
            (normed * bn.weight.view(shape) + bn.bias.view(shape)).clamp_min(0),
            convnet.second.weight,
            convnet.second.bias,
        )
    expected = []
    for group in ([0], [1]) if per_image else ([0, 1],):
        total = 0.0
        for layer, values in ((convnet.norm1, first), (convnet.norm2, second)):
            flat = values[group].transpose(0, 1).flatten(1).numpy()
            mean = np.array([sum(row) / len(row) for row in flat])
            var = np.array([sum((row - m) ** 2) / len(row) for row, m in zip(flat, mean, strict=True)])
            total += math.sqrt(((mean - layer.running_mean.numpy()) ** 2).sum())
            total += math.sqrt(((var - layer.running_var.numpy()) ** 2).sum())
        expected.append(total)
    torch.testing.assert_close(found.view(-1), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    check_gradient(objective, sparse, per_image=per_image, tolerance=1e-5)


def test_the_second_network_sees_its_own_size_and_is_left_alone(convnet: nn.Module, sparse: SparseModel) -> None:
    before = {name: value.clone() for name, value in convnet.state_dict().items()}
    convnet.train()
    shapes: list[Any] = []
    hook = convnet.register_forward_pre_hook(lambda _module, args: shapes.append(args[0].shape))
    objective = losses.batch_norm_statistics(convnet, sparse.info, size=(24, 20))
    objective.function(seen(objective, sparse, pixels()))
    hook.remove()
    assert shapes == [(2, 3, 24, 20)] and convnet.training
    assert all(torch.equal(value, before[name]) for name, value in convnet.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in convnet.parameters())
    convnet.eval()


def one_minus_jensen_shannon(first: Tensor, second: Tensor) -> list[float]:
    values = []
    for row, other in zip(first.tolist(), second.tolist(), strict=True):
        p, q = ([math.exp(z) / sum(map(math.exp, r)) for z in r] for r in (row, other))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        divergence = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
        divergence += sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
        values.append(1 - divergence / 2)
    return values


def test_adversarial_compares_with_what_a_student_says_of_the_image(convnet: nn.Module, sparse: SparseModel) -> None:
    objective = losses.adversarial(convnet, sparse.info, mean=MEAN, std=STD)
    context = seen(objective, sparse, pixels())
    with torch.no_grad():
        theirs = convnet(in_own_normalisation(context.images, sparse, MEAN, STD))
    expected = one_minus_jensen_shannon(context.logits, theirs)
    assert objective.function(context).tolist() == pytest.approx(expected, rel=1e-9)
    check_gradient(objective, sparse)


def test_a_student_that_takes_patches_is_fed_the_kept_ones(sparse: SparseModel) -> None:
    student = tiny(seed=9, embed_dim=8, depth=1).double()
    objective = losses.adversarial(student, sparse.info, mean=MEAN, std=STD)
    context = seen(objective, sparse, pixels())

    def said() -> Tensor:
        with torch.no_grad():
            x = student._pos_embed(student.patch_embed(in_own_normalisation(context.images, sparse, MEAN, STD)))
            x = torch.cat((x[:, :1], x[:, 1:].gather(1, KEEP[..., None].expand(-1, -1, 8))), 1)
            logits: Tensor = student.forward_head(student.norm(student.blocks(x)))
            return logits

    expected = one_minus_jensen_shannon(context.logits, said())
    assert objective.function(context).tolist() == pytest.approx(expected, rel=1e-9)
    check_gradient(objective, sparse)
    with torch.no_grad():  # training goes on between iterations
        student.head.weight += 0.5 * torch.randn(student.head.weight.shape, generator=torch.Generator().manual_seed(2))
    after = one_minus_jensen_shannon(context.logits, said())
    assert objective.function(context).tolist() == pytest.approx(after, rel=1e-9) != pytest.approx(expected, rel=1e-3)


def test_the_same_student_disagrees_nowhere(model: nn.Module, sparse: SparseModel) -> None:
    objective = losses.adversarial(model, sparse.info, mean=sparse.info.mean, std=sparse.info.std)
    found = objective.function(seen(objective, sparse, pixels()))
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


# --- everywhere ---

MAKE: dict[str, Callable[[Any, Any, Any], Objective]] = {
    "margin": lambda model, info, other: losses.margin(),
    "bce": lambda model, info, other: losses.bce([1.0, 0.0, 1.0, 0.0, 0.0]),
    "embedding": lambda model, info, other: losses.embedding(torch.ones(16)),
    "low_pass": lambda model, info, other: losses.low_pass(),
    "batch_norm_statistics": lambda model, info, other: losses.batch_norm_statistics(other, info),
    "adversarial": lambda model, info, other: losses.adversarial(other, info),
    "adversarial_vit": lambda model, info, other: losses.adversarial(tiny(seed=9), info),
    "patch_similarity_entropy": lambda model, info, other: losses.patch_similarity_entropy(model),
    "head_similarity": lambda model, info, other: losses.head_similarity(model),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("strategy", ["dense", "sparse", "random"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_every_loss_runs_everywhere(semantics: str, strategy: str, name: str) -> None:
    model, other = tiny(), randomise(ConvNet(), seed=3)
    objective = MAKE[name](model, SparseModel(model).info, other)
    config = Config(
        iterations=10, prune_at=(3, 6), prune_ratio=(0.4, 0.5), cross_entropy=0.0, semantics=semantics,
        strategy=strategy, tv2=0.0, learning_rate=0.02,
    )  # fmt: skip
    result = smi.invert(model, [0, 1, 2], config, objectives=[objective])
    curve = result.history[objective.name]
    assert curve.isfinite().all() and curve.std() > 0
    if semantics == "strict":
        alone = smi.invert(model, [1], config, objectives=[objective], indices=[1])
        assert torch.equal(alone.keep[0], result.keep[1])
        torch.testing.assert_close(alone.images[0], result.images[1], rtol=0, atol=2e-3)


class NothingFromTheHost(NoWaiting):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor made of Python's numbers"
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["margin", "bce", "low_pass", "batch_norm_statistics", "adversarial"])
def test_what_a_cuda_graph_repeats_takes_nothing_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is none, once before, as ahead of a capture."""
    monkeypatch.setattr(losses, "weights_hash", lambda _: "of no bytes")
    info = SparseModel(tiny(), backend="reference").info
    objective = MAKE[name](tiny(), info, ConvNet().to("meta"))
    images, logits = torch.empty(2, 3, 16, 16, device="meta"), torch.empty(2, CLASSES, device="meta")
    targets = torch.zeros(2, dtype=torch.int64, device="meta")
    context = Context(0, images, logits, targets, torch.empty(2, 4, dtype=torch.int64, device="meta"), None)
    expected = objective.function(context).shape
    with NothingFromTheHost():
        assert objective.function(context).shape == expected


@pytest.mark.parametrize("name", MAKE)
def test_minimising_lowers_it(name: str) -> None:
    model, other = tiny(num_heads=4), randomise(ConvNet(), seed=3)
    objective = MAKE[name](model, SparseModel(model).info, other)
    config = Config(iterations=30, strategy="dense", cross_entropy=0.0, tv2=0.0, learning_rate=0.02, jitter="none")
    curve = smi.invert(model, [0, 1], config, objectives=[objective]).history[objective.name]
    assert curve[-3:].mean() < curve[:3].mean()


# --- refusals ---


def refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(SmiError, match=message):
        call()


def test_what_cannot_be_is_refused(model: nn.Module, sparse: SparseModel) -> None:
    info, short = sparse.info, logits_only(torch.zeros(2, 3), torch.tensor([0, 1]))
    refused("confidence is -1", lambda: losses.margin(-1.0))
    refused("labels reach from 0 to 2", lambda: losses.bce([0.0, 2.0]))
    refused("labels have shape", lambda: losses.bce([0.0, 1.0]).function(short))
    refused("only one", lambda: losses.margin().function(logits_only(torch.zeros(1, 1), torch.tensor([0]))))
    refused("finite numbers", lambda: losses.embedding([math.nan]))
    refused("distance is 'l1'", lambda: losses.embedding([1.0], distance="l1"))  # type: ignore[arg-type]
    refused("cutoff is 0.8", lambda: losses.low_pass(0.8))
    refused("no BatchNorm2d", lambda: losses.batch_norm_statistics(model, info))
    refused("mean of ConvNet has 1", lambda: losses.adversarial(ConvNet(), info, mean=(0.5,)))
    refused(r"size is \(0, 8\)", lambda: losses.adversarial(ConvNet(), info, size=(0, 8)))
    refused("bandwidth is 0.01", lambda: losses.patch_similarity_entropy(model, bandwidth=0.01))
    refused("block 2 does not exist", lambda: losses.head_similarity(model, blocks=[2]))
    refused("only one", lambda: losses.head_similarity(tiny(num_heads=1)))
    refused("has no blocks", lambda: losses.head_similarity(ConvNet()))
    other = losses.adversarial(tiny(num_classes=4).double(), info)
    refused("has 4 classes", lambda: other.function(seen(other, sparse, pixels())))
