"""Reference of the pixel update: Adam, clamp, and nothing at all outside live patches."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """One Adam step without weight decay on `images`, then a clamp of each channel; in place.

    Kingma & Ba, ICLR 2015, algorithm 1, with eps outside the square root, exactly as ``torch.optim.Adam``.

    Args:
        images, grad, exp_avg, exp_avg_sq: (B, C, H, W), one dtype; all but `grad` are updated in place.
        step: 1 for the first step (bias correction).
        low, high: (C,), bounds of each channel.
        live: (B, 1, H, W) bool; where False, image and moments stay bit for bit what they were. None: all live.
    """
    low, high = low.view(-1, 1, 1), high.view(-1, 1, 1)
    new_avg = exp_avg.lerp(grad, 1 - beta1)
    new_avg_sq = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (new_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    new_images = torch.addcdiv(images, new_avg, denominator, value=-lr / (1 - beta1**step)).clamp_(low, high)
    for old, new in ((images, new_images), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        old.copy_(new if live is None else torch.where(live, new, old))
