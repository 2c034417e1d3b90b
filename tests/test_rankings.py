"""Rankings beyond the last block's attention, against explicit matrices and autograd on timm's own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import PATCH, PRUNED, SEMANTICS, N, one_thread, tiny  # noqa: F401
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor
from torch.nn import functional as F

import smi
from smi import Config, Inversion, Objective, SmiError, SparseModel

KEEP = torch.tensor([[1, 2, 5, 7, 11, 12], [0, 3, 4, 8, 13, 15]])


def pixels(images: int = 2) -> Tensor:
    return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def fed(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """timm's own tokens of the kept patches, before the first block."""
    x = model._pos_embed(model.patch_embed(images))
    prefix = x.shape[1] - N
    return torch.cat((x[:, :prefix], x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))), 1)


def explicit_maps(model: Any, images: Tensor, keep: Tensor) -> list[Tensor]:
    """(B, heads, T, T) of every block, from timm's own attention step by step."""
    maps: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output)))
    with torch.no_grad():
        model.blocks(fed(model, images, keep))
    for hook in hooks:
        hook.remove()
    return maps


def explicit_rollout(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """(B, K) the class row of the whole product of matrices, in float64."""
    maps = explicit_maps(model, images, keep)
    T = maps[0].shape[-1]
    rows = []
    for image in range(len(images)):
        product = np.eye(T)
        for attention in maps:
            mean = attention[image].double().numpy().mean(0)
            product = ((mean + np.eye(T)) / 2) @ product
        assert np.allclose(product.sum(1), 1)
        rows.append(product[0, T - keep.shape[1] :])
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_attention_rollout_is_the_class_row_of_the_product(backend: str, registers: int) -> None:
    model, images = tiny(depth=3, reg_tokens=registers, no_embed_class=bool(registers)), pixels()
    sparse = SparseModel(model, ranking="attention_rollout", backend=backend)
    assert sparse.info.ranking == "attention_rollout"
    everything = torch.arange(N).repeat(2, 1)
    for keep in (KEEP, everything):
        scores = sparse.feed(images, keep, scores=True)[1]
        torch.testing.assert_close(scores, explicit_rollout(model, images, keep), rtol=1e-5, atol=1e-7)
    last = SparseModel(model, ranking="class_attention").feed(images, KEEP, scores=True)[1]
    assert not torch.allclose(last, explicit_rollout(model, images, KEEP), rtol=0.05)


@pytest.mark.parametrize("depth", [3, 6])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_class_attention_is_averaged_over_the_last_four_blocks(backend: str, depth: int) -> None:
    model, images = tiny(depth=depth, reg_tokens=2, no_embed_class=True), pixels()
    sparse = SparseModel(model, ranking="class_attention_last_4", backend=backend)
    scores = sparse.feed(images, KEEP, scores=True)[1]
    rows = [attention.mean(1)[:, 0, 3:] for attention in explicit_maps(model, images, KEEP)]
    expected = sum(rows[-4:]) / min(depth, 4)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(scores, rows[-1], rtol=0.05)  # type: ignore[arg-type]


def test_a_rollout_needs_a_class_token_and_one_attention_in_each_block() -> None:
    for ranking in ("attention_rollout", "class_attention_last_4"):
        with pytest.raises(SmiError, match=f"'{ranking}' needs a class token"):
            SparseModel(tiny(class_token=False, global_pool="avg"), ranking=ranking)  # type: ignore[arg-type]
        with pytest.raises(SmiError, match="no single attention in each block"):
            SparseModel(tiny(block_fn=ParallelThingsBlock), ranking=ranking)  # type: ignore[arg-type]


def autograd_scores(model: Any, images: Tensor, keep: Tensor, targets: Tensor, tv2: float) -> Tensor:
    """(B, K) by timm's own forward and loops over patches."""
    images = images.clone().requires_grad_()
    logits = model.forward_head(model.norm(model.blocks(fed(model, images, keep))))
    differences = ((0, 1), (1, 0), (1, -1), (1, 1))
    loss = F.cross_entropy(logits, targets, reduction="sum")
    for dy, dx in differences:
        a = images[:, :, dy:, max(dx, 0) : 16 + min(dx, 0)]
        b = images[:, :, : 16 - dy, max(-dx, 0) : 16 - max(dx, 0)]
        loss = loss + tv2 * (a - b).flatten(1).norm(dim=1).sum()
    (grad,) = torch.autograd.grad(loss, images)
    product = (grad * images).abs().detach()
    rows = []
    for image in range(len(images)):
        row = []
        for patch in keep[image].tolist():
            top, left = patch // 4 * PATCH, patch % 4 * PATCH
            row.append(product[image, :, top : top + PATCH, left : left + PATCH].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("tv2", [0.0, 0.05])
def test_gradient_input_is_that_of_the_loss_at_the_iteration_that_ranks(backend: str, tv2: float) -> None:
    model, targets = tiny(), torch.tensor([1, 3])
    config = Config(iterations=9, prune_at=(3, 6), prune_ratio=(0.3, 0.4), ranking="gradient_input", tv2=tv2)
    loop = Inversion(model, targets, config, backend=backend)
    fused = loop.fused
    while not loop.done:
        if loop.iteration + 1 in loop.schedule:
            images, keep = loop.images.detach().clone(), loop.keep.clone()
            expected = autograd_scores(model, images, keep, targets, tv2)
            loop.step()
            assert loop._scores is not None
            torch.testing.assert_close(loop._scores, expected, rtol=2e-3, atol=1e-5)
            best = expected.topk(loop.schedule[loop.iteration], dim=1).indices
            survivors = keep.gather(1, best).sort(1).values
        else:
            pruning = loop.iteration in loop.schedule
            loop.step()
            if pruning:
                assert torch.equal(loop.keep, survivors)
    assert loop.fused == fused and (fused or backend == "reference")


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_random_ranking_is_the_random_strategy(semantics: str, backend: str) -> None:
    model = tiny()
    config = Config(**PRUNED, semantics=semantics, result_mask="carried")
    ranked = smi.invert(model, [0, 1, 2], config.replace(ranking="random"), backend=backend)
    strategy = smi.invert(model, [0, 1, 2], config.replace(strategy="random"), backend=backend)
    assert torch.equal(ranked.keep, strategy.keep) and torch.equal(ranked.dropped_at, strategy.dropped_at)
    torch.testing.assert_close(ranked.images, strategy.images, rtol=0, atol=1e-5)
    assert not torch.equal(ranked.keep, smi.invert(model, [0, 1, 2], config, backend=backend).keep)


@pytest.mark.parametrize("ranking", ["class_attention_last_4", "attention_rollout", "gradient_input", "random"])
@pytest.mark.parametrize("strategy", ["sparse", "rebirth", "random", "dense"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_every_ranking_runs_everywhere(semantics: str, strategy: str, ranking: Any) -> None:
    model = tiny()
    config = Config(**PRUNED, semantics=semantics, strategy=strategy, ranking=ranking)  # type: ignore[arg-type]
    targets = [0, 0, 0, 0, 1, 1, 1, 1] if strategy == "rebirth" else [0, 1]
    result = smi.invert(model, targets, config)
    expected = {"sparse": 4, "random": 4, "rebirth": 4, "dense": 16}[strategy]
    reranked = config.resolved().result_mask == "reranked" and strategy != "dense"
    assert result.keep.shape == (len(targets), 5 if reranked else expected)
    assert result.images.isfinite().all()


def test_ranking_draws_on_losses_of_your_own() -> None:
    model = tiny()
    config = Config(iterations=5, prune_at=(2,), prune_ratio=(0.75,), ranking="gradient_input", cross_entropy=0, tv2=0)

    def corner(context: smi.Context) -> Tensor:
        return context.images[:, :, :8, :8].square().sum((1, 2, 3)) + 0 * context.logits.sum(1)

    kept = smi.invert(model, [0, 1], config, objectives=[Objective(corner)]).keep
    assert kept.tolist() == [[0, 1, 4, 5]] * 2  # the patches of the upper left quarter


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SmiError, match=r"ranking is 'rolout'.*attention_rollout"):
        Config(ranking="rolout")  # type: ignore[arg-type]
    with pytest.raises(SmiError, match="'reranked' would draw the patches anew"):
        Config(ranking="random", result_mask="reranked")
    with pytest.raises(SmiError, match="ranks by class_attention, the config asks for attention_rollout"):
        Inversion(SparseModel(tiny()), [0], Config(**PRUNED, ranking="attention_rollout"))
    assert Config(ranking="random", semantics="official").resolved().result_mask == "carried"
