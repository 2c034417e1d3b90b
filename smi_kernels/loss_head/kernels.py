"""Triton kernel of the cross-entropy head: one program an image reads its logits twice and writes their gradient once.

The first reading finds maximum and normaliser (Milakov & Gimelshein, "Online normalizer calculation for softmax",
2018), the second ``loss = log sum(exp(z - max)) + sum(target (max - z))``, the gradient and its row sums.
Bytes moved: 8 R + size of the gradient's dtype for each of B classes, and soft targets once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.launch import launch
from smi_kernels.tiles import compute_type, wait_for_previous


@triton.jit
def cross_entropy_head_kernel(
    logits_ptr,  # (R, B, classes)
    targets_ptr,  # (B,) or (B, classes)
    colsum_ptr,  # (R, classes)
    bias_ptr,  # (R, classes)
    grad_scale_ptr,  # (B,) or unused
    step_ptr,  # (1,) or unused
    loss_ptr,  # (B,)
    d_logits_ptr,  # (B, classes)
    dstats_ptr,  # (R, B, 1, 2)
    history_ptr,  # (T, B) or unused
    R,
    B,
    classes,
    T,
    logits_stride_r,
    logits_stride_b,
    logits_stride_c,
    targets_stride_b,
    targets_stride_c,
    history_stride_t,
    history_stride_b,
    SOFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_previous()
    image = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    parts_ptr = logits_ptr + image * logits_stride_b + r.to(tl.int64)[:, None] * logits_stride_r

    highest = tl.full((), -3.4e38, COMPUTE)  # finite, or a first block of -inf would leave NaN
    normaliser = tl.zeros((), COMPUTE)
    for start in range(0, classes, BLOCK_C):
        at = start + c
        inside = (r < R)[:, None] & (at < classes)[None, :]
        parts = tl.load(parts_ptr + at[None, :] * logits_stride_c, mask=inside, other=0.0).to(COMPUTE)
        z = tl.where(at < classes, tl.sum(parts, axis=0), float("-inf"))
        before = highest
        highest = tl.maximum(before, tl.max(z, axis=0))
        normaliser = normaliser * tl.exp(before - highest) + tl.sum(tl.exp(z - highest), axis=0)

    scale = tl.full((), 1.0, COMPUTE)
    if HAS_SCALE:
        scale = tl.load(grad_scale_ptr + image).to(COMPUTE)
    loss = tl.log(normaliser)
    with_colsum = tl.zeros((BLOCK_R,), COMPUTE)
    with_part = tl.zeros((BLOCK_R,), COMPUTE)
    for start in range(0, classes, BLOCK_C):
        at = start + c
        inside = (r < R)[:, None] & (at < classes)[None, :]
        parts = tl.load(parts_ptr + at[None, :] * logits_stride_c, mask=inside, other=0.0).to(COMPUTE)
        z = tl.where(at < classes, tl.sum(parts, axis=0), float("-inf"))
        if SOFT:
            row = targets_ptr + image * targets_stride_b
            target = tl.load(row + at * targets_stride_c, mask=at < classes, other=0.0).to(COMPUTE)
        else:
            target = (at == tl.load(targets_ptr + image * targets_stride_b)).to(COMPUTE)
        loss += tl.sum(target * tl.where(target == 0, 0.0, highest - z), axis=0)
        gradient = (tl.exp(z - highest) / normaliser - target) * scale
        stored = gradient.to(d_logits_ptr.dtype.element_ty)
        tl.store(d_logits_ptr + image * classes + at, stored, mask=at < classes)

        # The sums are over the gradient as it was stored, since that is what the next product reads.
        stored = tl.where(at < classes, stored.to(COMPUTE), 0.0)[None, :]
        folded = r[:, None] * classes + at[None, :]
        with_colsum += tl.sum(stored * tl.load(colsum_ptr + folded, mask=inside, other=0.0), axis=1)
        apart = parts - tl.load(bias_ptr + folded, mask=inside, other=0.0)
        with_part += tl.sum(tl.where(stored == 0, 0.0, stored * apart), axis=1)  # a bias may be minus infinity

    tl.store(loss_ptr + image, loss)
    pairs = dstats_ptr + (r * B + image) * 2
    tl.store(pairs, with_colsum, mask=r < R)
    tl.store(pairs + 1, with_part, mask=r < R)
    if HAS_HISTORY:
        step = tl.load(step_ptr)
        row = history_ptr + step * history_stride_t + image * history_stride_b
        tl.store(row, loss.to(history_ptr.dtype.element_ty), mask=(step >= 0) & (step < T))


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
    R, B, classes = logits.shape
    loss = torch.empty(B, dtype=logits.dtype, device=logits.device)
    d_logits = torch.empty(B, classes, dtype=low_dtype, device=logits.device)
    dstats = torch.empty(R, B, 1, 2, dtype=logits.dtype, device=logits.device)
    args = {
        "logits_ptr": logits,
        "targets_ptr": targets,
        "colsum_ptr": colsum.contiguous(),
        "bias_ptr": bias.contiguous(),
        "grad_scale_ptr": None if grad_scale is None else grad_scale.contiguous(),
        "step_ptr": step,
        "loss_ptr": loss,
        "d_logits_ptr": d_logits,
        "dstats_ptr": dstats,
        "history_ptr": history,
        "R": R,
        "B": B,
        "classes": classes,
        "T": 0 if history is None else history.shape[0],
        "logits_stride_r": logits.stride(0),
        "logits_stride_b": logits.stride(1),
        "logits_stride_c": logits.stride(2),
        "targets_stride_b": targets.stride(0),
        "targets_stride_c": targets.stride(1) if targets.ndim == 2 else 0,
        "history_stride_t": 0 if history is None else history.stride(0),
        "history_stride_b": 0 if history is None else history.stride(1),
        "SOFT": targets.ndim == 2,
        "HAS_SCALE": grad_scale is not None,
        "HAS_HISTORY": history is not None,
        "COMPUTE": compute_type(logits.dtype),
        "BLOCK_R": triton.next_power_of_2(R),
        "BLOCK_C": min(triton.next_power_of_2(classes), 1024),
    }
    launch(cross_entropy_head_kernel, (B,), args)
    return loss, d_logits, dstats
