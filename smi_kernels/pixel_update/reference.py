"""Reference of the pixel update: Adam, clamp, and nothing at all outside live patches.

An iteration is `begin_step`, the network, `pixel_step`, `finish_prior_sums`. Whatever changes from one iteration to the
next is on the device, so that the same calls can be captured once and replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels.image_prior.reference import prior_coefficients, prior_row_sums, prior_sums_dx
from smi_kernels.patch_embed.reference import patches_to_pixels


def patch_mask(live: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Per-pixel form of a per-patch mask.

    Args:
        live: (B, N) with N = rows * columns of `grid`.

    Returns:
        (B, 1, H, W), dtype of `live`.
    """
    mask = live.view(live.shape[0], 1, *grid)
    return mask.repeat_interleave(patch_size[0], dim=2).repeat_interleave(patch_size[1], dim=3)


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
    """Meaning of `smi_kernels.adam_clamp_`."""
    low, high = low.view(-1, 1, 1), high.view(-1, 1, 1)
    new_avg = exp_avg.lerp(grad, 1 - beta1)
    new_avg_sq = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (new_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    new_images = torch.addcdiv(images, new_avg, denominator, value=-lr / (1 - beta1**step)).clamp_(low, high)
    for old, new in ((images, new_images), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        old.copy_(new if live is None else torch.where(live, new, old))


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
    """What this iteration needs that depends on its number or on the images as they are.

    Args:
        step: (1,) int64, iterations done; not changed. Beyond the last row of a table that row is taken.
        table: (T, B, 3) or (T, 1, 3) int64, augmentations of all iterations.
        sums, tv1, tv2, l2, group, height, width: as `prior_coefficients`.
        beta1, beta2: of Adam.
        history: (T, G, 3) floating or None; its row `step` takes the values of `prior_coefficients`.

    Returns:
        offsets: (B, 3) or (1, 3) int64, row `step` of `table`.
        bias_correction: (2,) 1 - beta1^(step + 1) and sqrt(1 - beta2^(step + 1)), computed in float64.
        coefficients: (G, 9) of `prior_coefficients`. Both have the dtype of `sums`.
    """
    values, coefficients = prior_coefficients(sums, tv1, tv2, l2, group, height, width)
    if history is not None:
        history.index_copy_(0, step.clamp(0, history.shape[0] - 1), values[None].to(history.dtype))
    offsets = table.index_select(0, step.clamp(0, table.shape[0] - 1))[0]
    n = step.double() + 1
    bias_correction = torch.cat([1 - beta1**n, (1 - beta2**n).sqrt()])
    return offsets, bias_correction.to(sums.dtype), coefficients


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
    """The step of `adam_clamp_` with the gradient of the patches that were fed, of the priors, and of the pixels alone.

    Args:
        images: (B, C, H, W), not changed; exp_avg, exp_avg_sq: the same shape, updated in place.
        d_patches: (B, K, C * patch_height * patch_width), gradient with respect to the patches as they were read.
        d_images: (B, C, H, W) further gradient with respect to the pixels, or None.
        keep_slots: (B, cells) int32, for each patch of the grid its place among the K kept, or -1; None: all are kept.
        offsets: (B, 3) or (1, 3) int64 under which patches were read, or None.
        coefficients: (G, 9), gradient with respect to the nine sums of `prior_sums`, for groups of `group` images.
        bias_correction: (2,) of `begin_step`.
        low, high: (C,), bounds of each channel.
        frozen: whether pixels of patches that are not kept keep image and moments bit for bit.

    Returns:
        new_images: (B, C, H, W).
        row_sums: (B, C, H, 9), partial sums for the `finish_prior_sums` of the same implementation; here those of
            `prior_row_sums`.
    """
    B, C, H, W = images.shape
    keep = None if keep_slots is None else _kept(keep_slots, d_patches.shape[1])
    d_sums = coefficients.repeat_interleave(group, 0)[:B, None].expand(-1, C, -1)
    grad = prior_sums_dx(images, d_sums)
    grad += patches_to_pixels(d_patches, keep, offsets, H, W, patch_height, patch_width)
    if d_images is not None:
        grad += d_images
    new_avg = exp_avg.lerp(grad, 1 - beta1)
    new_avg_sq = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (new_avg_sq.sqrt() / bias_correction[1]).add_(eps)
    new_images = images - lr / bias_correction[0] * new_avg / denominator
    new_images = new_images.clamp_(low.view(-1, 1, 1), high.view(-1, 1, 1))
    if frozen and keep_slots is not None:
        live = patch_mask(keep_slots >= 0, (H // patch_height, W // patch_width), (patch_height, patch_width))
        new_images = torch.where(live, new_images, images)
        new_avg = torch.where(live, new_avg, exp_avg)
        new_avg_sq = torch.where(live, new_avg_sq, exp_avg_sq)
    exp_avg.copy_(new_avg)
    exp_avg_sq.copy_(new_avg_sq)
    return new_images, prior_row_sums(new_images)


def _kept(keep_slots: Tensor, K: int) -> Tensor:
    """(B, K) the patch in each slot."""
    patches = torch.arange(keep_slots.shape[1], device=keep_slots.device).expand(keep_slots.shape)
    slots = torch.where(keep_slots < 0, K, keep_slots).long()
    return patches.new_zeros(keep_slots.shape[0], K + 1).scatter_(1, slots, patches)[:, :K]


def finish_prior_sums(images: Tensor, row_sums: Tensor, step: Tensor | None) -> Tensor:
    """`prior_sums` of the images that `pixel_step` made, from its row sums; the end of an iteration.

    Args:
        images: (B, C, H, W) of `pixel_step`.
        row_sums: (B, C, H, 9) of the same implementation's `pixel_step`.
        step: (1,) int64 or None; 1 is added to it.

    Returns:
        (B, C, 9), dtype of `images`.
    """
    if step is not None:
        step += 1
    return row_sums.sum(2)
