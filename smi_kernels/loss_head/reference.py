"""Reference of the cross-entropy at the end of a classifier, with the gradient that its backward starts from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_head(
    logits: Tensor,
    targets: Tensor,
    colsum: Tensor,
    bias: Tensor,
    grad_scale: Tensor | None,
    low_dtype: torch.dtype,
    history: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each image, its gradient, and the gradient's row sums for the norms before the head.

    The logits are a sum of R parts, each a `norm_linear` of one token's row.

    Args:
        logits: (R, B, classes) float32 (float64), the parts.
        targets: (B,) int64 classes, or (B, classes) floating probabilities that sum to 1 in each row.
        colsum, bias: (R, classes) in the dtype of `logits`, of the `norm_linear` that made each part.
        grad_scale: (B,) factors of each image's gradient, in the dtype of `logits`; None is 1. The loss is not scaled.
        low_dtype: of the gradient, that of the head's weight.
        history: (T, B); row `step` becomes the loss, in place.
        step: (1,) int64 on the device, 0 <= step < T.

    Returns:
        loss: (B,) in the dtype of `logits`.
        d_logits: (B, classes) in `low_dtype`, ``(softmax(logits) - targets) * grad_scale``; the gradient of every part.
        dstats: (R, B, 1, 2) in the dtype of `logits`, for each part the sums over classes of ``d_logits colsum`` and of
            ``d_logits (part - bias)``, with `d_logits` as it was rounded.
    """
    total = logits.sum(0)
    loss = F.cross_entropy(total, targets, reduction="none")
    soft = targets.to(total.dtype) if targets.is_floating_point() else F.one_hot(targets, total.shape[1])
    gradient = total.softmax(1) - soft
    if grad_scale is not None:
        gradient = gradient * grad_scale[:, None]
    d_logits = gradient.to(low_dtype)
    stored = d_logits.to(total.dtype)
    # Where no gradient is, logits may be infinite: a bias of minus infinity switches a class off.
    with_part = torch.where(stored == 0, 0, stored * (logits - bias[:, None]))
    sums = ((stored * colsum[:, None]).sum(2), with_part.sum(2))
    if history is not None:
        history[step] = loss.to(history.dtype)
    return loss, d_logits, torch.stack(sums, dim=2)[:, :, None]
