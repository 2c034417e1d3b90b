"""Reference of token selection: the meaning that every kernel has to reproduce."""

from __future__ import annotations

from torch import Tensor


def select_tokens(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """The `count` highest-scored tokens of those still kept, in grid order.

    A tie goes to the lower token index, so that the result is a function of the scores alone. NaN ranks highest.
    Source: Hu et al., ICML 2024, section 3.2.

    Args:
        scores: (B, K) floating, one score for each entry of `keep`.
        keep: (B, K) int64, strictly increasing along each row.
        count: tokens that go on, 1 <= count <= K.

    Returns:
        (B, count) int64, strictly increasing along each row.

    Raises:
        ValueError: shapes differ, or `count` is outside 1..K.

    Equivalent to ``keep.gather(1, scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values)``.
    """
    if scores.shape != keep.shape or scores.ndim != 2:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and keep {tuple(keep.shape)}; expected the same (B, K) for both."
        )
    if not 1 <= count <= keep.shape[1]:
        raise ValueError(f"count is {count}; expected 1 to {keep.shape[1]}, the number of tokens still kept.")
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return keep.gather(1, order.sort(dim=1).values)
