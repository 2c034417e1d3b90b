"""Losses on the tokens of a Vision Transformer; public as `smi.losses`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smi.errors import SmiError
from smi.objectives import Context, Objective, described

_POINTS = 64  # at which the density of similarities is taken
_REACH = 3.0  # bandwidths beyond -1 and 1 to which it is followed


def patch_similarity_entropy(
    model: nn.Module, *, blocks: Sequence[int] | None = None, bandwidth: float = 0.1, weight: float = 1.0
) -> Objective:
    """Negative entropy of how similar patches are to one another, summed over blocks, (B,).

    -sum_l H_l with H_l = -integral of f_l log f_l, where f_l is the kernel density estimate (Gaussian, of bandwidth h)
    of the cosine similarities u_i . u_j / (|u_i| |u_j|), i < j, among the patches' outputs u of the attention of block
    l: Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV 2022, section 3.2. Noise
    gives patches that are all alike; an image with a foreground and a background does not.

    The integral is taken by the trapezoidal rule at 64 points from -1 - 3 h to 1 + 3 h. Only fed patches count, of
    whatever number; fewer than two give 0. The density is computed again in the backward pass, block by block: of all
    pairs in all blocks it would take too much memory.

    Args:
        model: the timm model that is inverted, for the number and names of its blocks.
        blocks: numbers from 0; default all.
        bandwidth: h, at least 0.05, so that the points are dense enough to see every kernel.

    Raises:
        SmiError: a model without attention blocks, a block that does not exist, too small a bandwidth.
    """
    if not (math.isfinite(bandwidth) and bandwidth >= 0.05):
        raise SmiError(f"bandwidth is {bandwidth}; expected at least 0.05 (similarities reach from -1 to 1).")
    numbers = _chosen(model, blocks)
    names = tuple(f"blocks.{number}.attn" for number in numbers)
    _attention_of(model, names)
    prefix = _prefix(model)

    def term(context: Context) -> Tensor:
        entropies = [
            checkpoint(_entropy, context.features[name][:, prefix:], bandwidth, use_reentrant=False) for name in names
        ]
        return -torch.stack(entropies).sum(0)

    description = described("patch_similarity_entropy", blocks=numbers, bandwidth=bandwidth)
    return Objective(term, weight, "patch_similarity_entropy", features=names, description=description)


def _entropy(patches: Tensor, bandwidth: float) -> Tensor:
    """(B,) differential entropy, in nats, of the similarities among (B, K, D) `patches`."""
    K = patches.shape[1]
    if K < 2:
        return patches.sum((1, 2)) * 0
    directions = F.normalize(patches.float() if patches.dtype != torch.float64 else patches, dim=2)
    rows, columns = torch.triu_indices(K, K, 1, device=patches.device)
    similarities = (directions @ directions.mT)[:, rows, columns]
    reach = 1 + _REACH * bandwidth
    points = torch.linspace(-reach, reach, _POINTS, device=patches.device, dtype=similarities.dtype)
    kernels = torch.exp(-((points[:, None] - similarities[:, None]) / bandwidth).square() / 2)
    density = kernels.mean(2) / (bandwidth * math.sqrt(2 * math.pi))
    return -torch.trapezoid(torch.xlogy(density, density.clamp_min(1e-30)), points, dim=1)


def head_similarity(model: nn.Module, *, blocks: Sequence[int] | None = None, weight: float = 1.0) -> Objective:
    """How unlike the heads of a block attend, the mean over blocks, queries and pairs of heads, (B,) in 0 to 2.

    1 - SSIM(a_i, a_j), where a_i is what one patch's query in head i attends to among the patches: the inter-head
    attention similarity of Choi et al., "MimiQ: Low-Bit Data-Free Quantization of Vision Transformers with Encouraging
    Inter-Head Attention Similarity", AAAI 2025, with the structural similarity of Wang et al., "Image Quality
    Assessment", TIP 2004, equation 13: (2 m_i m_j + c_1)(2 s_ij + c_2) / ((m_i^2 + m_j^2 + c_1)(s_i^2 + s_j^2 + c_2)),
    c_1 = 0.01^2, c_2 = 0.03^2. Kept patches lie on no grid on which a window could slide, so means m and (co)variances
    s (biased) run over all of them, in a single window; attention is measured in units of even attention, 1 / tokens.

    Args:
        model: the timm model that is inverted, for its blocks, heads and scale.
        blocks: numbers from 0; default all.

    Raises:
        SmiError: a model of one head, or whose attention is more than softmax(q k^T scale), as rotary position
            embeddings make it; a block that does not exist.
    """
    numbers = _chosen(model, blocks)
    modules = _attention_of(model, [f"blocks.{number}.attn" for number in numbers])
    parts = ("q_norm", "k_norm")
    if getattr(model, "rope", None) is not None:
        raise SmiError(
            f"{type(model).__name__} rotates queries and keys by position, which head_similarity cannot see."
        )
    for attention in modules:
        if not all(hasattr(attention, part) for part in (*parts, "num_heads", "scale")):
            raise SmiError(
                f"head_similarity reads the queries and keys of timm's Attention, not of {type(attention).__name__}."
            )
        if attention.num_heads < 2:
            raise SmiError("head_similarity compares heads, but the model has only one.")
    pairs = [tuple(f"blocks.{number}.attn.{part}" for part in parts) for number in numbers]
    scales = [float(attention.scale) for attention in modules]

    prefix = _prefix(model)

    def term(context: Context) -> Tensor:
        found = []
        for (query, key), scale in zip(pairs, scales, strict=True):
            tokens = context.features[query], context.features[key]
            found.append(checkpoint(_unlikeness, *tokens, scale, prefix, use_reentrant=False))
        return torch.stack(found).mean(0)

    features = tuple(itertools.chain(*pairs))
    return Objective(
        term, weight, "head_similarity", features=features, description=described("head_similarity", blocks=numbers)
    )


def _unlikeness(query: Tensor, key: Tensor, scale: float, prefix: int) -> Tensor:
    """(B,) of (B, H, T, d) queries and keys, of whose tokens the first `prefix` are no patches."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query[:, :, prefix:].to(wide) @ key.to(wide).mT * scale
    attention = scores.softmax(3)[..., prefix:] * key.shape[2]
    mean = attention.mean(3, keepdim=True)
    apart = attention - mean
    var = apart.square().mean(3)
    heads = torch.triu_indices(query.shape[1], query.shape[1], 1, device=query.device)
    first, second = heads[0], heads[1]
    cov = torch.einsum("bhqk,bgqk->bhgq", apart, apart)[:, first, second] / attention.shape[3]
    m_i, m_j = mean[:, first, :, 0], mean[:, second, :, 0]
    c_1, c_2 = 0.01**2, 0.03**2
    above = (2 * m_i * m_j + c_1) * (2 * cov + c_2)
    below = (m_i.square() + m_j.square() + c_1) * (var[:, first] + var[:, second] + c_2)
    return 1 - (above / below).mean((1, 2))


def _prefix(model: Any) -> int:
    """Tokens in front of the patches; of those there are fewer than were fed where tokens are merged inside."""
    return int(getattr(model, "num_prefix_tokens", 1))


def _chosen(model: nn.Module, blocks: Sequence[int] | None) -> list[int]:
    depth = len(getattr(model, "blocks", ()))
    if not depth:
        raise SmiError(f"{type(model).__name__} has no blocks; expected the timm Vision Transformer that is inverted.")
    numbers = list(range(depth) if blocks is None else blocks)
    for number in numbers:
        if not 0 <= number < depth:
            raise SmiError(f"block {number} does not exist; the model has blocks 0 to {depth - 1}.")
    if not numbers:
        raise SmiError("blocks is empty; name at least one, or None for all.")
    return numbers


def _attention_of(model: nn.Module, names: Sequence[str]) -> list[Any]:
    """The modules of these names. Raises `SmiError` if one is missing."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise SmiError(f"{type(model).__name__} has no {name!r}; its blocks keep attention under another name.")
    return [modules[name] for name in names]
