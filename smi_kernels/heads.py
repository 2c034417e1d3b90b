"""From what the head reads to the logits and back: linear layers with or without a norm, then cosines with texts.

Rows are those that the head reads, R of each image: (B, R, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import blocks
from smi_kernels.dtypes import STAT_CHUNK
from smi_kernels.folding import Linear, Norm, VitWeights
from smi_kernels.linear.reference import gradient_sums

_EPS = 1e-24  # of a mean square: next to nothing, but a vector of zeros has a length


class Read(NamedTuple):
    """What the head's backward needs.

    Attributes:
        rows: (B, R, D) in the low dtype.
        moments: (R, B, 2) of the norm; None if there is none.
        embedding: (R, B, E), what each layer adds to the output that is compared with texts; None without texts.
        embedding_low, embedding_moments: (B, E) their sum in the low dtype, and (B, 2) its moments, the mean 0.
    """

    rows: Tensor
    moments: Tensor | None
    embedding: Tensor | None
    embedding_low: Tensor | None
    embedding_moments: Tensor | None


def forward(w: VitWeights, rows: Tensor, stats: Tensor, dot: str) -> tuple[Tensor, Read]:
    """What each classifier adds to the logits, (R, B, classes), and what the backward needs.

    Args:
        rows: (B, R, D) in the low dtype.
        stats: (B, R, chunks, 2), `row_statistics` of each.
    """
    ops = torch.ops.smi
    moments: Tensor | None = None
    if w.head_eps is None:
        parts = [
            ops.linear_residual(rows[:, r], h.weight, h.bias, stats.new_zeros(len(rows), len(h.bias)), dot)[0]
            for r, h in enumerate(w.heads_of_tokens)
        ]
    else:
        made = [
            ops.norm_linear(rows[:, r], stats[:, r], *head, w.head_eps, w.wide, dot)
            for r, head in enumerate(w.heads_of_tokens)
        ]
        parts, moments = [part for part, _ in made], stack([of for _, of in made], 0)
    found = stack(parts, 0)
    if w.texts is None:
        return found, Read(rows, moments, None, None, None)
    embedding = found.sum(0)
    low = embedding.to(w.low)
    logits, lengths = ops.norm_linear(low, _about_zero(embedding), *w.texts, _EPS, w.wide, dot)
    return logits[None], Read(rows, moments, found, low, lengths)


def backward(w: VitWeights, read: Read, d_logits: Tensor, dstats: Tensor, dot: str) -> tuple[Tensor, Tensor]:
    """Gradient of the rows, (B, R, D) in the wide dtype and in the low one.

    Args:
        d_logits, dstats: as for `SparseViT.backward`.
    """
    ops = torch.ops.smi
    if w.texts is not None:
        assert read.embedding is not None and read.embedding_low is not None
        dx, dx_low = ops.norm_linear_dx(
            d_logits, w.texts.weight, dstats[0], read.embedding_low, read.embedding_moments, None, None, 1, 1, dot
        )
        d_logits = blocks.low_of(dx, dx_low)
        dstats = sums(read.embedding, d_logits, w.heads_of_tokens)
    if read.moments is None:
        made = [
            (dx, dx.to(w.low)) for dx in (ops.linear_dx(d_logits, h.weight, w.wide, dot) for h in w.heads_of_tokens)
        ]
    else:
        made = [
            ops.norm_linear_dx(d_logits, head.weight, dstats[r], read.rows[:, r], moments, None, None, 1, 1, dot)
            for r, (head, moments) in enumerate(zip(w.heads_of_tokens, read.moments, strict=True))
        ]
    dx = stack([wide for wide, _ in made], 1)
    return dx, blocks.low_of(dx, stack([low for _, low in made], 1))


def sums(parts: Tensor, d_logits: Tensor, layers: Sequence[Linear]) -> Tensor:
    """(R, B, chunks, 2): for each layer the sums of ``d_logits colsum`` and ``d_logits (part - bias)``."""
    made = [gradient_sums(d_logits, part, layer.colsum, layer.bias) for part, layer in zip(parts, layers, strict=True)]
    return torch.stack(made)


def normalise(norm: Norm, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """LayerNorm of (M, D) rows, and what `normalise_dx` needs."""
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, [x.shape[1]], norm.weight, norm.bias, norm.eps)
    return y, [x, mean, rstd]


def normalise_dx(norm: Norm, kept: Sequence[Tensor | None], dy: Tensor) -> Tensor:
    """Input gradient of `normalise`."""
    x, mean, rstd = kept
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, x, [dy.shape[1]], mean, rstd, norm.weight, norm.bias, [True, False, False]
    )[0]
    return dx


def _about_zero(x: Tensor) -> Tensor:
    """`row_statistics` of rows whose mean counts as 0, so that a norm of them divides by their root mean square."""
    whole = F.pad(x, (0, -x.shape[1] % STAT_CHUNK))
    squares = whole.view(len(x), whole.shape[1] // STAT_CHUNK, STAT_CHUNK).square().sum(2)
    return torch.stack((torch.zeros_like(squares), squares), dim=2)


def stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Stacked, without a copy if there is one alone."""
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(list(tensors), dim=dim)
