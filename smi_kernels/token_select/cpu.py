"""Token selection on compiled operators; signatures and meanings as in ``reference.py``."""

from __future__ import annotations

from torch import Tensor

from smi_kernels import native
from smi_kernels.attention.cpu import attention_row
from smi_kernels.token_select import reference


def select_tokens(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """As `smi_kernels.select_tokens`."""
    if not native.takes(scores.dtype):
        return reference.select_tokens(scores, keep, count)
    B, K = keep.shape
    native.expect(scores=(scores, (B, K)))
    if not 1 <= count <= K:
        raise ValueError(f"count is {count}; expected 1 to {K}, the number of tokens still kept.")
    chosen = keep.new_empty(B, count)
    native.expect_dtype(chosen.dtype, keep=keep)
    native.call("select_tokens", scores.dtype, scores.contiguous(), keep.contiguous(), chosen, B, K, count)
    return chosen


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
    """As `smi_kernels.token_select.reference.rank_tokens`."""
    if qk_norm is not None or not native.takes(query.dtype, key.dtype):
        return reference.rank_tokens(query, key, scale, qk_norm, eps, keep, count, prefix)
    native.expect(key=(key, (keep.shape[0], prefix + keep.shape[1], *query.shape[1:])))
    scores = attention_row(query, key.transpose(1, 2), scale)[:, prefix:].contiguous()
    return select_tokens(scores, keep, count), scores
