"""Loops that nobody here wrote: of the published SMI's shape and call, and dense and saliency ones, unmodified.

The loop and the teacher below follow the published description and its call; they share nothing with the library.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import PATCH, N, one_thread, tiny  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

from smi import SmiError
from smi.adapters.published import AttentionMaps, PublishedTeacher

T, SIDE = N + 1, 4


class Spelled(nn.Module):
    """The published forward in elementary operations: embed everything, gather, keep every attention map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, current: Tensor, chosen: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        model = self.model
        x = model.patch_embed(x)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
        if chosen.shape[1] != current.shape[1]:
            current = torch.gather(current, 1, chosen)
        x = torch.gather(x, 1, current[..., None].expand(-1, -1, x.shape[-1]))
        maps = []
        for block in model.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(len(x), x.shape[1], 3, block.attn.num_heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            maps.append((query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1))
            x = x + block.attn.proj((maps[-1] @ value).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return model.head(model.norm(x)[:, 0]), maps, current


def loop(teacher: Any, steps: int = 9, prune: Any = ((3, 0.3), (6, 0.5))) -> tuple[Tensor, list[Tensor]]:
    """A sparse inversion as published: whole-patch rolls here, class token at index 0, ranking by the last map."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=draw, dtype=torch.float64).requires_grad_()
    targets, ratios = torch.tensor([1, 4]), dict(prune)
    optimizer = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.99), eps=1e-4)
    current = chosen = torch.arange(T).repeat(2, 1)
    maps: Any = None
    kept = []
    for step in range(steps):
        if step in ratios:
            scores = torch.mean(maps[-1], dim=1)[:, 0, :][:, 1:]
            top = scores.topk(int(scores.shape[1] * (1 - ratios[step])), dim=1).indices + 1
            chosen = torch.cat([torch.zeros(2, 1, dtype=torch.int64), top], 1)
            logits, maps, current = teacher(images, current, chosen)
            kept.append(current.sort(1).values)
        elif step + 1 in ratios:
            logits, maps, _ = teacher(images, current, chosen)
        else:
            shift = int(torch.randint(-1, 2, (), generator=draw))
            seen, moved = torch.roll(images, shift * PATCH, 3), current
            if current.shape[1] < T:
                cells = current[:, 1:] - 1
                cells = cells // SIDE * SIDE + (cells % SIDE + shift) % SIDE
                moved = torch.cat([current[:, :1], cells + 1], 1)
            logits, maps, _ = teacher(seen, moved, chosen)
        loss = F.cross_entropy(logits, targets) + 1e-3 * images.norm()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return images.detach(), kept


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loop_of_the_published_shape_runs_unmodified(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().double()
    expected, kept = loop(Spelled(model))
    assert [rows.shape[1] for rows in kept] == [12, 6]
    monkeypatch.setattr(AttentionMaps, "full", lambda _: pytest.fail("the loop looks at one row alone"))
    found, ours = loop(PublishedTeacher(model, backend=backend))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, kept, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_all_maps_are_there_for_whoever_looks() -> None:
    model = tiny(depth=3).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    current = torch.tensor([[0, 3, 7, 1, 12, 16], [0, 16, 2, 5, 9, 8]])
    logits, theirs, fed = Spelled(model)(images, current, current)
    found, maps, ours = PublishedTeacher(model)(images, current, current)
    torch.testing.assert_close(found, logits)
    assert torch.equal(fed, ours) and len(maps) == 3
    for mine, other in zip(maps, theirs, strict=True):
        torch.testing.assert_close(mine + 0.0 if isinstance(mine, Tensor) else mine.tensor(), other)
    # The last one, in the ways that people read it.
    last, other = maps[-1], theirs[-1]
    for read in (
        lambda a: a.mean(dim=1)[:, 0, 1:],
        lambda a: a.mean(1)[:, 0],
        lambda a: torch.mean(a, dim=1)[:, 0, :][:, 1:],
        lambda a: torch.mean(a, 1)[:, 2],
        lambda a: a[:, 0, 0, 1:],
        lambda a: a.max(1).values,
        lambda a: torch.log(a).sum(),
        lambda a: torch.stack([a, a]).sum(0),
        lambda a: 0.5 * a.mean(1) + 0.5 * torch.eye(a.shape[-1]),
        lambda a: (a @ a - a / 2)[-len(a) :],
        lambda a: (a > 0.1).any(1),
        lambda a: a.mean(1)[:, torch.tensor([0])],
        lambda a: a.mean(1)[:, torch.tensor([0, 2])],
        lambda a: a.mean(1)[1, 0],
        lambda a: torch.add(torch.mean(a, dim=1), 1.0),
        lambda a: a.shape,
        lambda a: a.mean(dim=(1, 2)),
    ):
        mine, expected = read(last), read(other)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(mine, expected)
        else:
            assert mine == expected
    assert [type(part).__name__ for part in maps[1:]] == ["Tensor", "LastMap"]
    with pytest.raises(IndexError, match="3 attention maps"):
        maps[3]


def test_losses_on_maps_reach_the_images() -> None:
    model = tiny().double()
    current = torch.arange(T).repeat(2, 1)
    gradients = []
    for teacher in (Spelled(model), PublishedTeacher(model)):
        images = torch.linspace(-1, 1, 2 * 3 * 256, dtype=torch.float64).view(2, 3, 16, 16).sin().requires_grad_()
        _, maps, _ = teacher(images, current, current)
        (gradient,) = torch.autograd.grad(maps[0].square().sum(), images)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_tokens_that_do_not_exist_are_refused() -> None:
    teacher = PublishedTeacher(tiny())
    images, all_tokens = torch.zeros(1, 3, 16, 16), torch.arange(T)[None]
    with pytest.raises(SmiError, match="token 17 does not exist; the model has patches 1 to 16"):
        teacher(images, torch.tensor([[0, 17]]), torch.tensor([[0, 1]]))
    with pytest.raises(SmiError, match="not the class token"):
        teacher(images, torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
    with pytest.raises(SmiError, match=r"shapes \(1, 17\) and \(17,\); expected \(1, tokens\)"):
        teacher(images, all_tokens, all_tokens[0])
    with pytest.raises(SmiError, match="this model has 5 prefix tokens"):
        PublishedTeacher(tiny(reg_tokens=4))
