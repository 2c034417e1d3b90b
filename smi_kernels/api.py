"""Public functions with more than one implementation: inputs are checked here, once, and `use_backend` chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import smi_kernels.ops  # noqa: F401  defines torch.ops.smi
from smi_kernels import backends, dtypes
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
        query: (B, H, d) floating.
        key: (B, H, N, d) floating; meets the query in float32 (float64 for float64 queries).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64 queries); each row sums to 1. Not differentiable on kernels.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if key.ndim != 4 or query.shape != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected (B, H, d) and (B, H, N, d)."
        )
    row: Tensor = torch.ops.smi.attention_row(query, key, scale)
    return row


def match_tokens(key: Tensor, prefix: int, fewer: int) -> Tensor:
    """Which tokens become one: bipartite soft matching (Bolya et al., "Token Merging", ICLR 2023, section 3).

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
        ValueError: a key of another shape, `prefix` or `fewer` out of range.
    """
    if key.ndim != 4:
        raise ValueError(f"key has shape {tuple(key.shape)}; expected (B, N, H, d).")
    if not 0 <= prefix <= key.shape[1]:
        raise ValueError(f"prefix is {prefix}; expected 0 to {key.shape[1]}, the number of tokens.")
    patches = key.shape[1] - prefix
    if not 0 <= fewer <= patches // 2:
        raise ValueError(f"fewer is {fewer}; expected 0 to {patches // 2}, half of {patches} patch tokens.")
    target: Tensor = torch.ops.smi.match_tokens(key.detach(), None, 0.0, prefix, fewer)
    return target


def merge_tokens(x: Tensor, size: Tensor | None, target: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens that become one, weighted by how many patches went into each already.

    Args:
        x: (B, N, D) floating; differentiable, and summed in float32 (float64 for float64).
        size: (B, N) float32 (float64 for float64), patches in each token; None for one in each.
        target: (B, N) int64 of `match_tokens`.
        left: tokens of each image afterwards.

    Returns:
        (B, left, D), dtype of `x`; (B, left) float32 (float64 for float64), the sums of `size`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.ndim != 3 or target.shape != x.shape[:2] or (size is not None and size.shape != target.shape):
        sizes = None if size is None else tuple(size.shape)
        raise ValueError(
            f"x has shape {tuple(x.shape)}, size {sizes} and target {tuple(target.shape)}; expected (B, N, D) and "
            f"(B, N) twice."
        )
    wide = x.to(dtypes.wide(x.dtype)).flatten(0, 1)
    out, _, _, total = torch.ops.smi.merge_tokens(wide, size, target, left, wide.dtype)
    return out.view(x.shape[0], left, x.shape[2]).to(x.dtype), total


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Operator -> formula of shapes, as `torch.utils.flop_counter.FlopCounterMode` wants for its ``custom_mapping``.

    Of the operators that `smi_kernels.match_tokens` and the like run inside a model's own modules.
    """

    def matching(key: Any, _norm: Any, _eps: float, prefix: int, fewer: int, *_: Any, **__: Any) -> int:
        patches = key[1] - prefix
        return int(2 * key[0] * ((patches + 1) // 2) * (patches // 2) * key[3]) if fewer else 0

    return {torch.ops.smi.match_tokens: matching}


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
        ValueError: shapes that do not belong together, or a `step` below 1.
    """
    if step < 1:
        raise ValueError(f"step is {step}; expected at least 1, for the bias correction counts the first step as 1.")
    shapes = {tuple(t.shape) for t in (images, grad, exp_avg, exp_avg_sq)}
    if len(shapes) > 1:
        raise ValueError(f"images, grad and moments have shapes {sorted(shapes)}; expected one.")
    B, C, H, W = images.shape
    for name, value, shape in (("low", low, (C,)), ("high", high, (C,)), ("live", live, (B, 1, H, W))):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}.")
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
    return _root(_sums(images, per_image)[..., :4]).sum(-1).to(images.dtype)


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
    return (right / (planes * H * (W - 1)) + down / (planes * (H - 1) * W) + diagonal).to(images.dtype)


def l2_norm(images: Tensor, *, per_image: bool) -> Tensor:
    """Euclidean norm of the pixels.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar; differentiable.
    """
    if _plain(images):
        return prior.l2_norm(images, per_image=per_image)
    return _root(_sums(images, per_image)[..., 8]).to(images.dtype)


def _plain(images: Tensor) -> bool:
    return backends.choose(images.device) == "reference"


def _sums(images: Tensor, per_image: bool) -> Tensor:
    """(B, 9) or (9,) of ``prior_sums``, of 16 bits in float32: float16 has no room for the sum over a plane."""
    sums: Tensor = torch.ops.smi.prior_sums(images.to(dtypes.wide(images.dtype)))
    return sums.sum(1) if per_image else sums.sum((0, 1))


def _root(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
