"""Reference of token selection: the meaning that every kernel has to reproduce."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.attention.reference import attention_row


def select_tokens(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """Meaning of `smi_kernels.select_tokens`."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return keep.gather(1, order.sort(dim=1).values)


def rank_tokens(
    query: Tensor,
    key: Tensor,
    scale: float,
    qk_norm: Tensor | None,
    eps: float,
    keep: Tensor,
    count: int,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """The patches that the class token attends to most, and its attention to all of them.

    Args:
        query: (B, H, d) of the class token in the last block.
        key: (B, prefix + K, H, d), any strides: `prefix` tokens that are no patches, then the patches of `keep`.
        scale: factor of the attention scores.
        qk_norm: (4, d) float32, weight and bias of the LayerNorm of queries, then of keys; or None.
        eps: of these norms.
        keep: (B, K) int64, strictly increasing along each row.
        count: patches that go on, 1 <= count <= K.
        prefix: tokens before the patches; their attention counts in the softmax.

    Returns:
        (B, count) int64 as `select_tokens`, and (B, K) float32 scores (float64 for float64 input), the patches' part
        of `attention_row`.

    Raises:
        ValueError: as `select_tokens`.
    """
    if qk_norm is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        shape = query.shape[-1:]
        query = F.layer_norm(query.to(wide), shape, qk_norm[0], qk_norm[1], eps)
        key = F.layer_norm(key.to(wide), shape, qk_norm[2], qk_norm[3], eps)
    scores = attention_row(query, key.transpose(1, 2), scale)[:, prefix:].contiguous()
    return select_tokens(scores, keep, count), scores
