"""Token merging in plain PyTorch: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F


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
    left, merging = [tokens], max(blocks - 1, 0)
    for number in range(1, merging + 1):
        even = tokens - (tokens - last) * number // merging
        left.append(max(even, -(-left[-1] // 2)))
    if left[-1] != last:
        raise ValueError(
            f"merge_to is {merge_to}, which leaves {last} of {tokens} patches, but the {blocks} blocks (the last "
            f"merges none) merge equally many each, every second token at most, and so leave {left[-1]}; "
            f"use a merge_to of {math.ceil(1000 * left[-1] / tokens) / 1000:g} or more."
        )
    return (*left[1:], *left[-1:])


def match_tokens(key: Tensor, prefix: int, fewer: int) -> Tensor:
    """Which tokens become one: bipartite soft matching (Bolya et al., ICLR 2023, section 3, equation 1 and its steps).

    Patch tokens are split in even and odd by their order. Every even one is paired with the odd one whose key, averaged
    over heads, has the greatest cosine to its own, and the `fewer` most alike pairs become one token each, or one
    token of several where they share the odd one. What is left keeps its order; a merged token stands where its odd one
    stood. Of equals the lower index counts as the more alike.

    Args:
        key: (B, N, H, d) floating, as it enters attention; compared in float32 (float64 for float64).
        prefix: first tokens of each image that are never merged.
        fewer: tokens to merge, 0 to half the patch tokens, rounded down.

    Returns:
        (B, N) int64, for each token its place among the N - fewer that are left. Not differentiable.

    Raises:
        ValueError: `fewer` out of range.
    """
    B, N = key.shape[:2]
    if not 0 <= fewer <= (N - prefix) // 2:
        raise ValueError(f"fewer is {fewer}; expected 0 to {(N - prefix) // 2}, half of {N - prefix} patch tokens.")
    with torch.no_grad():
        metric = key.to(torch.promote_types(key.dtype, torch.float32)).mean(2)
        metric = F.normalize(metric, dim=-1)
        best, partner = (metric[:, prefix::2] @ metric[:, prefix + 1 :: 2].mT).max(2)
        going = best.argsort(dim=1, descending=True, stable=True)[:, :fewer]
        gone = torch.zeros(B, N, dtype=torch.bool, device=key.device).scatter(1, prefix + 2 * going, True)
        place = (~gone).cumsum(1) - 1
        into = place.gather(1, prefix + 1 + 2 * partner.gather(1, going))
        return place.scatter(1, prefix + 2 * going, into)


def merge_tokens(x: Tensor, size: Tensor, target: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens that become one, weighted by how many patches went into each already.

    Args:
        x: (B, N, D) floating; differentiable, and summed in float32 (float64 for float64).
        size: (B, N) float32 (float64 for float64), patches in each token.
        target: (B, N) int64 of `match_tokens`.
        left: tokens afterwards.

    Returns:
        (B, left, D), dtype of `x`; (B, left), the sums of `size`.
    """
    B, _, D = x.shape
    total = size.new_zeros(B, left).scatter_add(1, target, size)
    share = size / total.gather(1, target)
    sums = share.new_zeros(B, left, D).scatter_add(1, target[..., None].expand(-1, -1, D), x * share[..., None])
    return sums.to(x.dtype), total
