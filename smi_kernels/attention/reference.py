"""Reference of the attention rows that rank tokens; nothing larger than they need is materialised."""

from __future__ import annotations

from torch import Tensor


def attention_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads of one query's attention over all keys: ``softmax(scale * query @ key^T)``.

    With the class token's query of the last block this is the ranking signal of Hu et al., ICML 2024, equation 4.

    Args:
        query: (B, H, d).
        key: (B, H, N, d).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64 input); each row sums to 1.
    """
    compute = query if query.element_size() >= 4 else query.float()
    scores = (compute[:, :, None, :] @ key.to(compute.dtype).transpose(-2, -1)).squeeze(2) * scale
    return scores.softmax(dim=-1).mean(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and queries of the attention each key receives, for models without a class token.

    Args:
        query, key: (B, H, N, d).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64 input); each row sums to 1.
    """
    compute = query if query.element_size() >= 4 else query.float()
    scores = compute @ key.to(compute.dtype).transpose(-2, -1) * scale
    return scores.softmax(dim=-1).mean(dim=(1, 2))
