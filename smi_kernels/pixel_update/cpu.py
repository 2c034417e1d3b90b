"""The pixel update on compiled operators; signatures and meanings as in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.image_prior.cpu import prior_coefficients
from smi_kernels.pixel_update import reference


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
    """As `smi_kernels.adam_clamp_`."""
    state = (images, exp_avg, exp_avg_sq)
    dtypes = (t.dtype for t in (*state, grad, low, high))
    if not native.takes(*dtypes) or not all(t.is_contiguous() for t in state):
        reference.adam_clamp_(
            images, grad, exp_avg, exp_avg_sq,
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, low=low, high=high, live=live,
        )  # fmt: skip
        return
    B, C, H, W = images.shape
    native.expect(
        grad=(grad, images.shape),
        exp_avg=(exp_avg, images.shape),
        exp_avg_sq=(exp_avg_sq, images.shape),
        low=(low, (C,)),
        high=(high, (C,)),
        live=(live, (B, 1, H, W)),
    )
    native.expect_dtype(torch.bool, live=live)
    native.call(
        "adam_clamp", images.dtype, images, grad.contiguous(), exp_avg, exp_avg_sq, float(step), float(lr),
        float(beta1), float(beta2), float(eps), low.contiguous(), high.contiguous(),
        native.dense(live), B, C, H, W,
    )  # fmt: skip
    native.written(*state)


def begin_step(
    step: Tensor,
    table: Tensor,
    sums: Tensor,
    tv1: float,
    tv2: float,
    l2: float,
    group: int,
    height: int,
    width: int,
    beta1: float,
    beta2: float,
    history: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.pixel_update.reference.begin_step`."""
    values, coefficients = prior_coefficients(sums, tv1, tv2, l2, group, height, width)
    done = int(step)
    if history is not None:
        history[min(max(done, 0), history.shape[0] - 1)] = values
    correction = (1 - beta1 ** (done + 1), (1 - beta2 ** (done + 1)) ** 0.5)
    return table[min(max(done, 0), table.shape[0] - 1)].clone(), sums.new_tensor(correction), coefficients


def pixel_step(
    images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    d_patches: Tensor,
    d_images: Tensor | None,
    keep_slots: Tensor | None,
    offsets: Tensor | None,
    coefficients: Tensor,
    group: int,
    bias_correction: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    low: Tensor,
    high: Tensor,
    frozen: bool,
    patch_height: int,
    patch_width: int,
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.pixel_update.reference.pixel_step`; the row sums are those of `prior_row_sums`."""
    state, numbers = (exp_avg, exp_avg_sq), [images, d_patches, coefficients, bias_correction, low, high]
    if d_images is not None:
        numbers.append(d_images)
    if not native.takes(*(t.dtype for t in (*numbers, *state))) or not all(t.is_contiguous() for t in state):
        return reference.pixel_step(
            images, exp_avg, exp_avg_sq, d_patches, d_images, keep_slots, offsets, coefficients, group,
            bias_correction, lr, beta1, beta2, eps, low, high, frozen, patch_height, patch_width,
        )  # fmt: skip
    B, C, H, W = images.shape
    cells, K = (H // patch_height) * (W // patch_width), d_patches.shape[1]
    if H % patch_height or W % patch_width:
        raise ValueError(f"images are {H} x {W}; expected a multiple of the patch, {patch_height} x {patch_width}.")
    if group < 1:
        raise ValueError(f"group is {group}; expected at least 1.")
    native.expect(
        exp_avg=(exp_avg, images.shape),
        exp_avg_sq=(exp_avg_sq, images.shape),
        d_patches=(d_patches, (B, K if keep_slots is not None else cells, C * patch_height * patch_width)),
        d_images=(d_images, images.shape),
        keep_slots=(keep_slots, (B, cells)),
        coefficients=(coefficients, (-(-B // group), 9)),
        bias_correction=(bias_correction, (2,)),
        low=(low, (C,)),
        high=(high, (C,)),
    )
    native.expect_offsets(offsets, B)
    if keep_slots is not None:
        native.expect_dtype(torch.int32, keep_slots=keep_slots)
        if keep_slots.numel() and int(keep_slots.max()) >= K:
            raise ValueError(f"keep_slots has {int(keep_slots.max())}; expected at most {K - 1}, patches were {K}.")
    new_images, row_sums = images.new_empty(images.shape), images.new_empty(B, C, H, 9)
    native.call(
        "pixel_step", images.dtype, images.contiguous(), exp_avg, exp_avg_sq, d_patches.contiguous(),
        native.dense(d_images), native.dense(keep_slots), native.dense(offsets),
        offsets is not None and offsets.shape[0] == 1, coefficients.contiguous(), group, bias_correction.contiguous(),
        float(lr), float(beta1), float(beta2), float(eps), low.contiguous(), high.contiguous(), frozen, new_images,
        row_sums, B, C, K, (H, W, patch_height, patch_width),
    )  # fmt: skip
    native.written(*state)
    return new_images, row_sums


finish_prior_sums = reference.finish_prior_sums
