"""Token merging in plain PyTorch: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.linear.reference import row_statistics


def merge_counts(tokens: int, blocks: int, merge_to: float) -> tuple[int, ...]:
    """Patch tokens left after each block, as many merged in each, so that the last block reads a share `merge_to`.

    The last block merges none: behind its attention no token reads another. A block merges at most every second token.

    Args:
        tokens: K patch tokens in front of the first block.
        blocks: of the network.
        merge_to: floor(K merge_to), at least 1, are left; read as the decimal that it is written as.

    Returns:
        `blocks` numbers, none of them above the one before.

    Raises:
        ValueError: `merge_to` outside (0, 1], or fewer left than the blocks can merge to.
    """
    if not 0 < merge_to <= 1:
        raise ValueError(f"merge_to is {merge_to}; expected a share of the patches above 0, at most 1.")
    last = max(1, math.floor(tokens * Fraction(repr(float(merge_to)))))
    left = _towards(last, tokens, max(blocks - 1, 0))
    if left[-1] != last:
        # Towards more of them the first blocks merge fewer, so that the number reached from here may be out of reach.
        fewest = next(n for n in range(left[-1], tokens + 1) if _towards(n, tokens, max(blocks - 1, 0))[-1] == n)
        raise ValueError(
            f"merge_to is {merge_to}, which leaves {last} of {tokens} patches, but the {blocks} blocks (the last "
            f"merges none) merge equally many each, every second token at most, and so leave {left[-1]}; "
            f"use a merge_to of {math.ceil(1000 * fewest / tokens) / 1000:g} or more."
        )
    return (*left[1:], *left[-1:])


def _towards(last: int, tokens: int, merging: int) -> list[int]:
    """Tokens in front of and behind `merging` blocks that merge equally many each, every second one at most."""
    left = [tokens]
    for number in range(1, merging + 1):
        even = tokens - (tokens - last) * number // merging
        left.append(max(even, -(-left[-1] // 2)))
    return left


def match_tokens(key: Tensor, norm: Tensor | None, eps: float, prefix: int, fewer: int) -> Tensor:
    """Meaning of `smi_kernels.match_tokens`.

    Args:
        norm: (4, d), whose last two rows are weight and bias of a LayerNorm over d of the keys, rounded to their dtype
            again; None for no norm.
        eps: of that norm.
    """
    B, N = key.shape[:2]
    wide = key.to(torch.promote_types(key.dtype, torch.float32))
    if norm is not None:
        wide = F.layer_norm(wide, wide.shape[3:], norm[2].to(wide), norm[3].to(wide), eps)
        wide = wide.to(key.dtype).to(wide.dtype)
    direction = F.normalize(wide.mean(2), dim=-1)
    likeness = direction[:, prefix::2] @ direction[:, prefix + 1 :: 2].mT
    best, partner = likeness.nan_to_num(nan=-2.0).max(2) if fewer else (likeness.new_zeros(B, 0),) * 2
    going = best.argsort(dim=1, descending=True, stable=True)[:, :fewer]
    gone = torch.zeros(B, N, dtype=torch.bool, device=key.device).scatter(1, prefix + 2 * going, True)
    place = (~gone).cumsum(1) - 1
    into = place.gather(1, prefix + 1 + 2 * partner.long().gather(1, going))
    return place.scatter(1, prefix + 2 * going, into)


def merge_tokens(
    x: Tensor, size: Tensor | None, target: Tensor, left: int, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of the tokens that become one, weighted by how many patches went into each already.

    Args:
        x: (B N, D) float32 (float64 for float64).
        size: (B, N), dtype of `x`, patches in each token; None for one in each.
        target: (B, N) int64 of `match_tokens`.
        left: tokens of each image afterwards.
        low: dtype of matrix operands.

    Returns:
        (B left, D), dtype of `x`; the same in `low`, empty if that is the same dtype; its `row_statistics`; and
        (B, left), the sums of `size`.
    """
    (B, N), D = target.shape, x.shape[1]
    size, total, share = _shares(x, size, target, left)
    spread = target[..., None].expand(-1, -1, D)
    out = x.new_zeros(B, left, D).scatter_add(1, spread, x.view(B, N, D) * share[..., None]).view(-1, D)
    return out, out.new_empty(0, dtype=low) if low == x.dtype else out.to(low), row_statistics(out), total


def merge_tokens_dx(
    dx: Tensor, size: Tensor | None, target: Tensor, total: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of `merge_tokens` with respect to its `x`: each token gets its share of what it went into.

    Args:
        dx: (B left, D) float32 (float64 for float64).
        size, target, low: of `merge_tokens`.
        total: (B, left), which that gave.

    Returns:
        (B N, D), dtype of `dx`; the same in `low`, empty if that is the same dtype.
    """
    B, left = total.shape
    D = dx.shape[1]
    _, _, share = _shares(dx, size, target, left)
    gathered = dx.view(B, left, D).gather(1, target[..., None].expand(-1, -1, D))
    out = (gathered * share[..., None]).view(-1, D)
    return out, out.new_empty(0, dtype=low) if low == dx.dtype else out.to(low)


def _shares(x: Tensor, size: Tensor | None, target: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) sizes, (B, left) their sums, and (B, N) what part of its sum each is."""
    size = torch.ones_like(target, dtype=x.dtype) if size is None else size
    total = size.new_zeros(target.shape[0], left).scatter_add(1, target, size)
    return size, total, size / total.gather(1, target)
