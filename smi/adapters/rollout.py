"""Attention rollout: how much of the class token's output goes back to each token of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def attention_rollout(calls: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """(B, T) row of token 0 in the product of (A_l + I) / 2 from the last block to the first.

    A_l is the attention of block l, averaged over heads; half of every token is its own, for the residual connection:
    Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3. Only one row of the product is
    wanted, so it is taken as a vector through the blocks.

    Args:
        calls: for each block in order queries and keys (B, H, T, d), and the scale of their product.
    """
    query = calls[0][0]
    row = query.new_zeros(query.shape[0], 1, query.shape[2], dtype=torch.promote_types(query.dtype, torch.float32))
    row[..., 0] = 1
    for query, key, scale in reversed(calls):
        attention = (query.to(row.dtype) @ key.to(row.dtype).mT * scale).softmax(-1).mean(1)
        row = (row @ attention + row) / 2
    return row[:, 0]
