"""The cross-entropy head on a compiled operator; signature and meaning as in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.loss_head import reference


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
    """As `smi_kernels.loss_head.reference.cross_entropy_head`."""
    scales = [] if grad_scale is None else [grad_scale.dtype]
    if not native.takes(logits.dtype, colsum.dtype, bias.dtype, low_dtype, *scales):
        return reference.cross_entropy_head(logits, targets, colsum, bias, grad_scale, low_dtype, history, step)
    R, B, classes = logits.shape
    native.expect(colsum=(colsum, (R, classes)), bias=(bias, (R, classes)), grad_scale=(grad_scale, (B,)))
    hard = soft = None
    if targets.is_floating_point():
        native.expect(targets=(targets, (B, classes)))
        soft = targets.to(logits.dtype).contiguous()
    else:
        native.expect(targets=(targets, (B,)))
        native.expect_indices("targets", targets, classes)
        hard = targets.contiguous()
    loss, d_logits, dstats = logits.new_empty(B), logits.new_empty(B, classes), logits.new_empty(R, B, 1, 2)
    native.call(
        "cross_entropy_head", logits.dtype, logits.contiguous(), hard, soft, colsum.contiguous(), bias.contiguous(),
        native.dense(grad_scale), loss, d_logits, dstats, R, B, classes,
    )  # fmt: skip
    if history is not None:
        assert step is not None
        row = int(step)
        if 0 <= row < history.shape[0]:
            history[row] = loss
    return loss, d_logits, dstats
