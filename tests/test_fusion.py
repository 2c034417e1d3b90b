"""Tokens merged inside the network: against a slow loop, exact where it must be, fused, through pool and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from kernels import BACKENDS, DEVICE
from small import CLASSES, SEMANTICS, one_thread, randomise, tiny  # noqa: F401
from test_fused_inversion import compare, fused, in_graphs
from test_vit import gradient
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import smi
from smi import Config, Inversion, SmiError, SparseModel
from smi.cli import app
from smi.flops import count_flops
from smi_kernels import SparseViT, match_tokens, merge_counts, merge_tokens, use_backend

FUSION = Config(strategy="fusion", merge_to=0.25, iterations=8, learning_rate=0.05, eps=1e-4, tv2=1e-2, snapshots=4)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2, "init_values": 0.5},
    "norms": {"qk_norm": True},
    "mean": {"global_pool": "avg"},
    "mean, norm before": {"global_pool": "avg", "fc_norm": False, "class_token": False},
}


def deep(**options: Any) -> Any:
    return tiny(**{"depth": 4, **options}).double().to(DEVICE)


def merging(model: Any, merge_to: float) -> SparseModel:
    """On timm's modules."""
    return SparseModel(model, merge_to=merge_to, backend="reference")


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# --- the slow loop ---


def slow_pairs(keys: list[Tensor], fewer: int) -> list[list[int]]:
    """Groups of patch tokens that become one, in the order of what they become; keys (d,) are means over heads."""
    wanted = []
    for i in range(0, len(keys), 2):
        likeness = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in range(1, len(keys), 2)]
        best = max(range(len(likeness)), key=lambda j: (likeness[j], -j))
        wanted.append((-likeness[best], i, 2 * best + 1))
    into = {i: j for _, i, j in sorted(wanted)[:fewer]}
    return [[j, *(i for i in into if into[i] == j)] for j in range(len(keys)) if j not in into]


def slow_logits(model: Any, image: Tensor, left: tuple[int, ...]) -> Tensor:
    """Logits (classes,) of one image (C, H, W), where every token counts in attention by being there several times."""
    prefix = model.num_prefix_tokens
    x = list(model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0])
    size = [1] * len(x)
    for block, count in zip(model.blocks, left, strict=True):
        attn, heads = block.attn, block.attn.num_heads
        query, key, value = attn.qkv(block.norm1(torch.stack(x))).view(len(x), 3, heads, -1).unbind(1)
        query, key = attn.q_norm(query), attn.k_norm(key)
        often = torch.tensor([i for i, times in enumerate(size) for _ in range(times)])
        mixed = []
        for q in query:
            weights = torch.einsum("hd,nhd->hn", q, key[often]) * attn.scale
            mixed.append(torch.einsum("hn,nhd->hd", weights.softmax(1), value[often]).flatten())
        x = [a + block.ls1(attn.proj(b)) for a, b in zip(x, mixed, strict=True)]
        groups = slow_pairs([k.detach().mean(0) for k in key[prefix:]], len(x) - prefix - count)
        groups = [[i] for i in range(prefix)] + [[prefix + i for i in group] for group in groups]
        x = [sum((size[i] * x[i] for i in g), x[0] * 0) / sum(size[i] for i in g) for g in groups]
        size = [sum(size[i] for i in g) for g in groups]
        assert len(x) == prefix + count and sum(size[prefix:]) == 16
        x = [a + block.ls2(block.mlp(block.norm2(a))) for a in x]
    x = [model.norm(a) for a in x]
    if model.global_pool == "avg":
        x = [sum((times * a for times, a in zip(size[prefix:], x[prefix:], strict=True)), x[0] * 0) / 16]
    heads_of = [model.head, model.head_dist] if hasattr(model, "head_dist") else [model.head]
    return torch.stack([head(model.fc_norm(x[i])) for i, head in enumerate(heads_of)]).mean(0)


@pytest.mark.parametrize("kind", [*KINDS, "distilled"])
@pytest.mark.parametrize("merge_to", [0.25, 0.7])
def test_merging_is_that_of_the_slow_loop(kind: str, merge_to: float) -> None:
    if kind == "distilled":
        small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": CLASSES}
        model = randomise(VisionTransformerDistilled(**small)).double().to(DEVICE)
    else:
        model = deep(**KINDS[kind])
    left = {0.25: (12, 8, 4, 4), 0.7: (15, 13, 11, 11)}[merge_to]
    assert merge_counts(16, 4, merge_to) == left
    x = images(3)
    found, _ = merging(model, merge_to).feed(x)
    with torch.no_grad():
        expected = torch.stack([slow_logits(model, image, left) for image in x])
        unmerged = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - unmerged).norm() > 1e-3 * unmerged.norm()


def test_ties_go_to_the_lower_index_and_a_token_may_take_in_several() -> None:
    keys = torch.ones(1, 7, 2, 3)  # all alike: two prefix tokens, then even 2, 4, 6 and odd 3, 5 in this numbering
    assert match_tokens(keys, 2, 0).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert match_tokens(keys, 2, 1).tolist() == [[0, 1, 2, 2, 3, 4, 5]]
    assert match_tokens(keys, 2, 2).tolist() == [[0, 1, 2, 2, 2, 3, 4]]
    x = torch.tensor([[[1.0], [2.0], [3.0], [6.0], [9.0], [5.0], [7.0]]])
    size = torch.tensor([[1.0, 1, 2, 1, 1, 3, 1]])
    found, sizes = merge_tokens(x, size, match_tokens(keys, 2, 2), 5)
    assert found.flatten().tolist() == [1, 2, (2 * 3 + 6 + 9) / 4, 5, 7] and sizes.tolist() == [[1, 1, 4, 3, 1]]


# --- where it is exact ---


@pytest.mark.parametrize("kind", KINDS)
def test_merging_nothing_is_timm_bit_for_bit(kind: str) -> None:
    model = deep(**KINDS[kind])
    assert torch.equal(merging(model, 1.0).feed(images())[0], model(images()))


@pytest.mark.parametrize("kind", ["plain", "registers", "mean"])
def test_merged_duplicates_change_nothing(kind: str) -> None:
    """A token of size s counts in attention as s equal tokens would, so nothing is lost where all merged are equal."""
    model = deep(**KINDS[kind])
    with torch.no_grad():
        model.pos_embed[:, model.pos_embed.shape[1] - 16 :] = model.pos_embed[:, -1:]
    patches = images(2)[:, :, :, :8].unflatten(2, (4, 4)).unflatten(4, (2, 4))  # b, c, row, y, column, x
    doubled = patches.repeat_interleave(2, 4).flatten(4, 5).flatten(2, 3)
    found, _ = merging(model, 0.5).feed(doubled)
    torch.testing.assert_close(found, model(doubled), rtol=1e-10, atol=1e-10)
    other, _ = merging(model, 0.5).feed(images(2))
    assert (other - model(images(2))).abs().max() > 1e-3


# --- gradient ---


@pytest.mark.parametrize("kind", ["plain", "mean"])
def test_gradient_reaches_every_pixel_as_finite_differences_say(kind: str) -> None:
    sparse = merging(deep(**KINDS[kind]), 0.25)
    x = images(2, seed=3).requires_grad_()
    (grad,) = torch.autograd.grad(sparse.feed(x)[0].square().sum(), x)
    assert (grad != 0).all()
    with torch.no_grad():
        for seed in range(4):
            step = 1e-6 * images(2, seed=10 + seed)
            ahead, behind = (float(sparse.feed(x + sign * step)[0].square().sum()) for sign in (1, -1))
            assert float((grad * step).sum()) == pytest.approx((ahead - behind) / 2, rel=1e-6)


# --- cost ---


def test_operations_fall_with_the_tokens() -> None:
    """By hand: layers count twice, forward and gradient of the input; attention has 2 and 5 products of L x L x D."""
    model, D, hidden = tiny(depth=4), 16, 64
    counts = merge_counts(16, 4, 0.25)
    by_hand = 2 * 2 * 16 * 48 * D + 2 * 2 * D * CLASSES
    before = 16
    for left in counts:
        L = before + 1
        by_hand += 2 * 2 * L * D * 4 * D + 7 * 2 * L * L * D + 2 * 2 * (left + 1) * 2 * D * hidden
        if left < before:
            by_hand += 2 * (before // 2) ** 2 * (D // 2)  # cosines of even and odd, forward alone
        before = left
    assert count_flops(SparseModel(model, merge_to=0.25), 16) == by_hand
    assert count_flops(SparseModel(model, merge_to=1.0), 16) == count_flops(SparseModel(model), 16)


# --- inversions ---


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_inversion_moves_all_pixels_and_repeats(semantics: Any) -> None:
    model, config = tiny(depth=4), FUSION.replace(semantics=semantics, iterations=30, learning_rate=0.1, tv2=0.0)
    inversion = Inversion(model, [0, 3, 1], config)
    start = inversion.images.clone()
    found = inversion.run()
    assert (found.images != start).all() and torch.equal(found.keep, torch.arange(16).repeat(3, 1))
    assert [phase.kept for phase in found.phases] == [16] and (found.dropped_at == 30).all()
    assert found.history["cross_entropy"][-5:].mean() < 0.5 * found.history["cross_entropy"][:5].mean()
    again = smi.invert(model, [0, 3, 1], config)
    assert torch.equal(again.images, found.images) and torch.equal(again.logits, found.logits)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model.eval()(found.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_image_does_not_depend_on_its_batch(backend: str) -> None:
    every = smi.invert(deep(), [0, 3, 1], FUSION, backend=backend)
    alone = smi.invert(deep(), [3], FUSION, indices=[1], backend=backend)
    torch.testing.assert_close(alone.images, every.images[1:2], rtol=0, atol=1e-6)


def test_first_iteration_is_adam_on_the_gradient_through_the_merges() -> None:
    model, config = deep(), FUSION.replace(iterations=1, jitter="none", flip=False, tv2=0.0)
    inversion = Inversion(model, [2, 4], config, backend="reference")
    x = inversion.images.clone().requires_grad_()
    left = merge_counts(16, 4, 0.25)
    logits = torch.stack([slow_logits(model, image, left) for image in x])
    loss = F.cross_entropy(logits, torch.tensor([2, 4]), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    expected = x.detach() - config.learning_rate * grad / (grad.abs() + config.eps)
    low, high = (bound.view(-1, 1, 1) for bound in (inversion._low, inversion._high))
    expected = torch.maximum(torch.minimum(expected, high), low)
    torch.testing.assert_close(inversion.run().images, expected.float(), rtol=0, atol=1e-5)


# --- on fused operations ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "registers", "norms", "mean"])
def test_fused_network_merges_as_timms_does(kind: str, backend: str) -> None:
    if DEVICE == "cpu" and backend == "triton" and kind in ("plain", "registers"):
        pytest.skip("two ways through the interpreter are enough; on a GPU all are run")
    model, x = deep(depth=3, **KINDS[kind]), images(2, seed=1)
    expected = gradient(lambda x: merging(model, 0.4).feed(x)[0], x)
    for memory in ("fast", "small") if backend == "reference" else ("fast",):
        vit = SparseViT.from_timm(model, merge_to=0.4, memory=memory)
        with use_backend(backend):
            found = gradient(vit, x)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_fed_patches_alone_are_merged() -> None:
    """The share is of the patches fed; their cells are what counts, wherever the augmentation moved them."""
    model, keep = deep(), torch.tensor([[0, 3, 4, 7, 8, 9, 12, 15], [1, 2, 3, 4, 5, 6, 7, 8]]).to(DEVICE)
    jitter = torch.tensor([[4, -8, 1], [0, 4, 0]]).to(DEVICE)
    expected, _ = merging(model, 0.5).feed(images(), keep, jitter)
    with use_backend("reference"):
        found = SparseViT.from_timm(model, merge_to=0.5)(images(), keep, jitter)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_iterations_are_those_of_the_ordinary_loop(backend: str) -> None:
    model = deep(depth=2)  # 16 patches in front of the first block, 8 of the second
    config = FUSION.replace(merge_to=0.5, iterations=2 if backend == "triton" else 8)
    networks = fused(model, backend, merge_to=0.5), merging(model, 0.5)
    runs = [Inversion(network, [3] if backend == "triton" else [0, 3], config) for network in networks]
    assert [run.fused for run in runs] == [True, False]
    compare(*(run.run() for run in runs))


def test_merging_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of a graph makes the host wait for nothing, and a replay is the iterations."""
    model = deep()
    expected = Inversion(fused(model, "reference", merge_to=0.25), [0, 3], FUSION).run()
    inversion = Inversion(fused(model, "reference", merge_to=0.25), [0, 3], FUSION)
    in_graphs(inversion, monkeypatch)
    found = inversion.run()
    assert torch.equal(found.images, expected.images) and torch.equal(found.logits, expected.logits)


# --- through the command line ---


def test_pool_plan_and_report(tmp_path: Path) -> None:
    short = ["--strategy", "fusion", "--merge-to", "0.5", "--iterations", "4", "--device", "cpu", "-n", "4", "-b", "2"]
    args = ["invert", "embedded:teacher", *short, "--out", str(tmp_path / "pool")]
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 0, made.output
    pool = smi.Pool(tmp_path / "pool")
    assert len(pool) == 4 and pool.config.strategy == "fusion" and pool.config.merge_to == 0.5
    assert smi.SyntheticDataset(pool)[0][1].all()
    once = count_flops(SparseModel(smi.load_model("embedded:teacher"), merge_to=0.5), 64)
    assert once < count_flops(SparseModel(smi.load_model("embedded:teacher")), 64)
    summary = json.loads(CliRunner().invoke(app, [*args, "--json"]).output.splitlines()[-1])["pool"]
    assert summary["flops"] == 4 * 4 * once and summary["flops_dense"] is None
    plan = CliRunner().invoke(app, ["plan", "embedded:teacher", *short, "--json"])
    assert json.loads(plan.output.splitlines()[-1])["flops"] == 4 * 4 * once
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "pool")])
    assert shown.exit_code == 0, shown.output
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    assert any("to 50% of the patches in front of the last block" in page for page in pages)
    refused = CliRunner().invoke(app, ["schedule", "embedded:teacher", "--strategy", "fusion"])
    assert refused.exit_code != 0 and "prunes nothing" in refused.output


# --- bad input ---


def test_what_fusion_cannot_do_is_said() -> None:
    for merge_to in (0.0, 1.5, -1.0):
        with pytest.raises(SmiError, match=f"merge_to is {merge_to}; expected a share"):
            FUSION.replace(merge_to=merge_to)
    with pytest.raises(SmiError, match=r"leaves 4 of 16 patches.* and so leave 8; use a merge_to of 0.5 or more"):
        Inversion(tiny(), [0], FUSION)
    with pytest.raises(SmiError, match=r"made with merge_to=None, the config asks for 0.25 \(strategy 'fusion'\)"):
        Inversion(SparseModel(deep()), [0], FUSION)
    with pytest.raises(SmiError, match=r"made with merge_to=0.5, the config asks for None"):
        Inversion(SparseModel(deep(), merge_to=0.5), [0], Config())
    with pytest.raises(SmiError, match="cannot be merged inside Eva: expected timm's VisionTransformer"):
        SparseModel(timm.create_model("eva02_tiny_patch14_224", img_size=28), merge_to=0.5)
    with pytest.raises(SmiError, match="its head pools by 'map'"):
        SparseModel(tiny(depth=4, class_token=False, global_pool="map"), merge_to=0.5)
    with pytest.raises(SmiError, match="scores of patches are not to be had while tokens are merged"):
        SparseModel(deep(), merge_to=0.5).feed(images(), scores=True)
    with pytest.raises(ValueError, match="tokens are merged, so patches have no attention"):
        SparseViT.from_timm(deep(), merge_to=0.5)(images(), class_attention=True)
    with pytest.raises(SmiError, match="attention maps are not to be had"):
        SparseModel(deep(), merge_to=0.5).attention_maps(images())
    with pytest.raises(ValueError, match="fewer is 4; expected 0 to 3, half of 7 patch tokens"):
        match_tokens(torch.ones(1, 8, 2, 3), 1, 4)
    with pytest.raises(ValueError, match=r"key has shape \(1, 8, 6\); expected \(B, N, H, d\)"):
        match_tokens(torch.ones(1, 8, 6), 1, 2)
    for prefix in (-1, 9):
        with pytest.raises(ValueError, match=f"prefix is {prefix}; expected 0 to 8"):
            match_tokens(torch.ones(1, 8, 2, 3), prefix, 0)
