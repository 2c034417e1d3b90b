"""A second, slow implementation of the inversion, for tests: whatever the library computes, it must agree with this.

It is written from the published description alone (Hu et al., "Sparse Model Inversion", ICML 2024, and the observable
behaviour of its code) and shares nothing with the library but the `Config` value: whole images, explicit index maps
made by Python loops, a vision transformer spelled out in elementary operations, plain autograd, Adam by hand.
Randomness is an input (initial noise, augmentation draws), so that two implementations can be compared bit for bit up
to rounding. It works in the dtype of the model, float32 or float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn

from smi.config import Config


@dataclass
class OracleResult:
    """What one batch ended as.

    Attributes:
        images: (B, C, H, W) final images, dtype of the model.
        keeps: after every pruning, in order: (B, K) int64, patches that go on, ascending.
        result_keep: (B, K') int64, the mask reported with the images.
        history: unweighted objectives before the update of each iteration: ``cross_entropy``, ``tv1``, ``tv2``, ``l2``,
            each the mean over the terms it has (one for the batch, or one for each image), and ``total``, the
            weighted scalar that was differentiated.
        margins: for every pruning the smallest gap between a score that stayed and one that went, relative to the mean
            score: a gap near rounding error would make a comparison of keep sets meaningless.
        detached: rebirth alone, for every part in order: the images (B, C, H, W) of then and its patches (B, N/v).
    """

    images: Tensor
    keeps: list[Tensor]
    result_keep: Tensor
    history: dict[str, list[float]] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    detached: list[tuple[Tensor, Tensor]] = field(default_factory=list)


# ---- where pixels and cells go


@functools.cache
def pixel_map(height: int, width: int, dy: int, dx: int, flip: int) -> tuple[int, ...]:
    """For every pixel of the augmented image, in reading order, the pixel of the image that is seen there.

    Rolling by (dy, dx) takes what was at (y, x) to (y + dy, x + dx), around the edges; the flip then mirrors columns.
    """
    sources = [-1] * (height * width)
    for y in range(height):
        for x in range(width):
            new_y, new_x = (y + dy) % height, (x + dx) % width
            if flip:
                new_x = width - 1 - new_x
            sources[new_y * width + new_x] = y * width + x
    return tuple(sources)


def whole_patches(offset: int, patch: int) -> int:
    """`offset` pixels rounded to patches: floor, plus one from half a patch of (non-negative) remainder on."""
    return offset // patch + (1 if 2 * (offset % patch) >= patch else 0)


@functools.cache
def cell_map(rows: int, columns: int, patch: int, dy: int, dx: int, flip: int) -> tuple[int, ...]:
    """For every patch the cell of the augmented image at which it is read: rounded roll of the grid, then flip."""
    cells = []
    for row in range(rows):
        for column in range(columns):
            new_row = (row + whole_patches(dy, patch)) % rows
            new_column = (column + whole_patches(dx, patch)) % columns
            if flip:
                new_column = columns - 1 - new_column
            cells.append(new_row * columns + new_column)
    return tuple(cells)


@functools.cache
def cell_pixels(columns: int, patch: int, cell: int) -> tuple[int, ...]:
    """The pixels of one cell, in reading order, as positions in the flattened image."""
    top, left = cell // columns * patch, cell % columns * patch
    return tuple((top + y) * columns * patch + left + x for y in range(patch) for x in range(patch))


def read_patches(image: Tensor, cells: Sequence[int], offset: tuple[int, int, int], patch: int) -> Tensor:
    """Patches of the augmented image at `cells`: image (C, H, W) -> (K, C, patch * patch)."""
    channels, height, width = image.shape
    sources = pixel_map(height, width, *offset)
    wanted = [[sources[p] for p in cell_pixels(width // patch, patch, cell)] for cell in cells]
    flat = image.reshape(channels, height * width)
    return flat[:, torch.tensor(wanted)].permute(1, 0, 2)


# ---- the network


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    y = x @ layer.weight.detach().T
    return y if layer.bias is None else y + layer.bias.detach()


def layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + layer.eps) * layer.weight.detach() + layer.bias.detach()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


def attention(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """x (B, L, D) -> output (B, L, D), attention probabilities (B, heads, L, L)."""
    batch, length, width = x.shape
    heads = layer.num_heads
    size = width // heads
    qkv = linear(x, layer.qkv)  # query, key and value lie one after the other, heads side by side within each
    q, k, v = (
        qkv[..., i * width : (i + 1) * width].reshape(batch, length, heads, size).transpose(1, 2) for i in range(3)
    )
    probabilities = softmax(q @ k.transpose(2, 3) / math.sqrt(size))
    return linear((probabilities @ v).transpose(1, 2).reshape(batch, length, width), layer.proj), probabilities


def vit(model: nn.Module, patches: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """A plain timm VisionTransformer with one class token, fed with some of its patches.

    Args:
        patches: (B, K, C, patch * patch) pixels.
        cells: (B, K) int64, the cell whose position embedding each patch takes.

    Returns:
        logits (B, classes), and the last block's attention row of the class token over the patch tokens, averaged
        over heads, (B, K).
    """
    assert model.num_prefix_tokens == 1 and model.global_pool == "token" and not model.no_embed_class
    assert isinstance(model.norm_pre, nn.Identity) and isinstance(model.fc_norm, nn.Identity)
    kernel = model.patch_embed.proj.weight.detach().flatten(2)  # (D, C, patch * patch)
    position = model.pos_embed.detach()[0]
    tokens = torch.einsum("bkcp,dcp->bkd", patches, kernel) + model.patch_embed.proj.bias.detach() + position[1 + cells]
    first = (model.cls_token.detach()[0, 0] + position[0]).expand(len(patches), 1, -1)
    x = torch.cat([first, tokens], 1)
    probabilities = x
    for block in model.blocks:
        assert isinstance(block.ls1, nn.Identity) and isinstance(block.attn.q_norm, nn.Identity)
        mixed, probabilities = attention(layer_norm(x, block.norm1), block.attn)
        x = x + mixed
        x = x + linear(gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)
    logits = linear(layer_norm(x, model.norm)[:, 0], model.head)
    return logits, probabilities[:, :, 0, 1:].mean(1).detach()


def look(model: nn.Module, images: Tensor, keep: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Augment, cut, feed: images (B, C, H, W), keep (B, K) or None for all, offsets (B, 3) of dy, dx, flip.

    Returns logits (B, classes) and scores (B, K) in the order of `keep` (of the grid where it is None).
    """
    patch = model.patch_embed.patch_size[0]
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    patches, cells = [], []
    for b, image in enumerate(images):
        dy, dx, flip = (int(v) for v in offsets[b])
        if keep is None:
            at = list(range(rows * columns))
        else:
            new_cell = cell_map(rows, columns, patch, dy, dx, flip)
            at = [new_cell[i] for i in keep[b].tolist()]
        patches.append(read_patches(image, at, (dy, dx, flip), patch))
        cells.append(at)
    return vit(model, torch.stack(patches), torch.tensor(cells))


# ---- the objectives


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,): log of the sum of exponentials less the target's logit."""
    top = logits.max(-1, keepdim=True).values.detach()
    log_sum = torch.log(torch.exp(logits - top).sum(-1)) + top[:, 0]
    return log_sum - torch.stack([logits[b, int(t)] for b, t in enumerate(targets)])


def neighbour_differences(images: Tensor) -> list[Tensor]:
    """Pixel minus its right, lower, lower left and lower right neighbour, each where there is one."""
    return [
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, 1:] - images[..., 1:, :-1],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    ]


def frobenius(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum())


def tv1(images: Tensor) -> Tensor:
    return sum(d.abs().sum() / d.numel() for d in neighbour_differences(images))


def tv2(images: Tensor) -> Tensor:
    return sum(frobenius(d) for d in neighbour_differences(images))


PRIORS = {"tv1": tv1, "tv2": tv2, "l2": frobenius}


def objective(logits: Tensor, images: Tensor, targets: Tensor, config: Config) -> tuple[Tensor, dict[str, float]]:
    """The scalar to differentiate and its unweighted parts."""
    groups = [images] if config.norm == "batch" else [images[b : b + 1] for b in range(len(images))]
    entropies = cross_entropy(logits, targets)
    total = config.cross_entropy * (entropies.mean() if config.norm == "batch" else entropies.sum())
    parts = {"cross_entropy": float(entropies.detach().mean())}
    for name, prior in PRIORS.items():
        values = [prior(group) for group in groups]
        parts[name] = sum(float(v.detach()) for v in values) / len(values)
        weight = getattr(config, name)
        if weight:
            total = total + weight * sum(values)
    parts["total"] = float(total.detach())
    return total, parts


# ---- ranking and the loop


def highest(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` highest scores, ascending; of equal scores the earlier position goes first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:count])


def margin(scores: Sequence[float], chosen: Sequence[int]) -> float:
    others = set(range(len(scores))) - set(chosen)
    if not others:
        return math.inf
    gap = min(scores[i] for i in chosen) - max(scores[i] for i in others)
    return gap * len(scores) / sum(scores)


def share_kept(config: Config) -> Fraction:
    product = Fraction(1)
    for ratio in config.prune_ratio:
        product *= 1 - Fraction(str(ratio))
    return product


def kept_pixels(keep: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """(B, 1, H, W) bool: the pixels of the kept patches, where they lie without augmentation."""
    batch, _, height, width = shape
    mask = torch.zeros(batch, height * width, dtype=torch.bool)
    for b in range(batch):
        mask[b, [pixel for cell in keep[b].tolist() for pixel in cell_pixels(width // patch, patch, cell)]] = True
    return mask.reshape(batch, 1, height, width)


def detachments(config: Config) -> list[int]:
    """t_k = k floor(T / v) for k = 1 .. v - 1; the last part is what the end of the run leaves."""
    return [k * (config.iterations // config.division) for k in range(1, config.division)]


def forbid_augmentation(offsets: Tensor, config: Config) -> Tensor:
    """The draws (T, 1 or B, 3), without augmentation at each pruning iteration and the one before it."""
    offsets = offsets.clone()
    if config.strategy != "dense":
        for t in detachments(config) if config.strategy == "rebirth" else config.prune_at:
            offsets[[t - 1, t]] = 0
    return offsets


def adam(x: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step` >= 1 of Adam without weight decay: new x, m, v."""
    m = config.beta1 * m + (1 - config.beta1) * gradient
    v = config.beta2 * v + (1 - config.beta2) * gradient * gradient
    m_hat = m / (1 - config.beta1**step)
    v_hat = v / (1 - config.beta2**step)
    return x - config.learning_rate * m_hat / (torch.sqrt(v_hat) + config.eps), m, v


def invert(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    offsets: Tensor,
    config: Config,
    mean: Sequence[float],
    std: Sequence[float],
) -> OracleResult:
    """Run the whole inversion.

    Args:
        model: timm VisionTransformer, one class token, one square patch size.
        images: (B, C, H, W) initial noise, dtype of the model.
        targets: (B,) int64.
        offsets: (T, B or 1, 3) int64 of dy, dx, flip; rows where augmentation is forbidden are overridden.
        mean, std: of the model's normalisation, per channel.
    """
    config = config.resolved()
    assert config.strategy in ("dense", "sparse", "rebirth") and config.precision == "fp32"
    assert not config.best and config.tolerance == 0
    batch, _, height, width = images.shape
    patch = model.patch_embed.patch_size[0]
    number = (height // patch) * (width // patch)
    offsets = forbid_augmentation(offsets, config).expand(-1, batch, -1)
    lowest = torch.tensor([-a / s for a, s in zip(mean, std, strict=True)], dtype=images.dtype).view(1, -1, 1, 1)
    largest = torch.tensor([(1 - a) / s for a, s in zip(mean, std, strict=True)], dtype=images.dtype).view(1, -1, 1, 1)
    ratio_at = dict(zip(config.prune_at, config.prune_ratio, strict=True)) if config.strategy == "sparse" else {}
    detach_at = detachments(config) if config.strategy == "rebirth" else []

    x = images.clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    keep: Tensor | None = None  # nothing dropped yet
    scores = torch.empty(0)
    result = OracleResult(x, [], torch.empty(0))
    for t in range(config.iterations):
        if t in ratio_at:
            before = keep if keep is not None else torch.arange(number).expand(batch, number)
            count = math.floor(before.shape[1] * (1 - Fraction(str(ratio_at[t]))))
            chosen = [highest(row, count) for row in scores.tolist()]
            keep = torch.stack([before[b, chosen[b]] for b in range(batch)])
            result.keeps.append(keep)
            result.margins.append(min(margin(scores[b].tolist(), chosen[b]) for b in range(batch)))
        if t in detach_at:
            before = keep if keep is not None else torch.arange(number).expand(batch, number)
            chosen = [highest(row, number // config.division) for row in scores.tolist()]
            result.detached.append((x.clone(), torch.stack([before[b, chosen[b]] for b in range(batch)])))
            rest = [sorted(set(before[b].tolist()) - set(result.detached[-1][1][b].tolist())) for b in range(batch)]
            keep = torch.tensor(rest)

        leaf = x.clone().requires_grad_(True)
        logits, scores = look(model, leaf, keep, offsets[t])
        total, parts = objective(logits, leaf, targets, config)
        (gradient,) = torch.autograd.grad(total, leaf)
        for name, value in parts.items():
            result.history.setdefault(name, []).append(value)

        new_x, new_m, new_v = adam(x, gradient, m, v, t + 1, config)
        new_x = torch.minimum(torch.maximum(new_x, lowest), largest)
        if config.stopped == "frozen" and keep is not None:
            live = kept_pixels(keep, x.shape, patch)
            new_x, new_m, new_v = (torch.where(live, new, old) for new, old in ((new_x, x), (new_m, m), (new_v, v)))
        x, m, v = new_x, new_m, new_v

    result.images = x
    if detach_at:
        _, scores = look(model, x, keep, torch.zeros(batch, 3, dtype=torch.int64))
        chosen = [highest(row, number // config.division) for row in scores.tolist()]
        assert keep is not None
        result.detached.append((x, torch.stack([keep[b, chosen[b]] for b in range(batch)])))
    everything = torch.arange(number).expand(batch, number)
    if config.result_mask == "reranked" and ratio_at:
        _, scores = look(model, x, None, torch.zeros(batch, 3, dtype=torch.int64))
        count = min(number, math.floor((number + model.num_prefix_tokens) * share_kept(config)))
        result.result_keep = torch.tensor([highest(row, count) for row in scores.tolist()])
    else:
        result.result_keep = keep if keep is not None else everything
    return result
