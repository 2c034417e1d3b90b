"""Public functions with more than one implementation: inputs are checked here, once, and `use_backend` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

import smi_kernels.ops  # noqa: F401  defines torch.ops.smi
from smi_kernels import backends
from smi_kernels.image_prior import reference as prior


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
    found: Tensor = torch.ops.smi.select_tokens(scores, keep, count)
    return found


def attention_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads of one query's attention over all keys: ``softmax(scale * query @ key^T)``.

    With the class token's query of the last block this is the ranking signal of Hu et al., ICML 2024, equation 4.

    Args:
        query: (B, H, d).
        key: (B, H, N, d).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64 input); each row sums to 1. Not differentiable on kernels.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if key.ndim != 4 or query.shape != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected (B, H, d) and (B, H, N, d)."
        )
    row: Tensor = torch.ops.smi.attention_row(query, key, scale)
    return row


def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    low: Tensor,
    high: Tensor,
    live: Tensor | None = None,
) -> None:
    """One Adam step without weight decay on `images`, then a clamp of each channel; in place.

    Kingma & Ba, ICLR 2015, algorithm 1, with eps outside the square root, exactly as ``torch.optim.Adam``.

    Args:
        images, grad, exp_avg, exp_avg_sq: (B, C, H, W), one dtype; all but `grad` are updated in place.
        step: 1 for the first step (bias correction).
        low, high: (C,), bounds of each channel.
        live: (B, 1, H, W) bool; where False, image and moments stay bit for bit what they were. None: all live.

    Raises:
        ValueError: shapes differ.
    """
    shapes = {tuple(t.shape) for t in (images, grad, exp_avg, exp_avg_sq)}
    if len(shapes) > 1:
        raise ValueError(f"images, grad and moments have shapes {sorted(shapes)}; expected one.")
    torch.ops.smi.adam_clamp_(
        images, grad, exp_avg, exp_avg_sq,
        step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, low=low, high=high, live=live,
    )  # fmt: skip


def tv_l2(images: Tensor, *, per_image: bool) -> Tensor:
    """Sum of the Frobenius norms of the four differences; where a norm is zero its gradient is zero.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar; differentiable.
    """
    if _plain(images):
        return prior.tv_l2(images, per_image=per_image)
    return _root(_sums(images, per_image)[..., :4]).sum(-1)


def tv_l1(images: Tensor, *, per_image: bool) -> Tensor:
    """Sum of the mean absolute values of the four differences.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar; differentiable.
    """
    if _plain(images):
        return prior.tv_l1(images, per_image=per_image)
    B, C, H, W = images.shape
    planes = C if per_image else B * C
    right, down, down_left, down_right = _sums(images, per_image)[..., 4:8].unbind(-1)
    diagonal = (down_left + down_right) / (planes * (H - 1) * (W - 1))
    return right / (planes * H * (W - 1)) + down / (planes * (H - 1) * W) + diagonal


def l2_norm(images: Tensor, *, per_image: bool) -> Tensor:
    """Euclidean norm of the pixels.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar; differentiable.
    """
    if _plain(images):
        return prior.l2_norm(images, per_image=per_image)
    return _root(_sums(images, per_image)[..., 8])


def _plain(images: Tensor) -> bool:
    return backends.choose(images.device) == "reference"


def _sums(images: Tensor, per_image: bool) -> Tensor:
    """(B, 9) or (9,) of ``prior_sums``."""
    sums: Tensor = torch.ops.smi.prior_sums(images)
    return sums.sum(1) if per_image else sums.sum((0, 1))


def _root(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
