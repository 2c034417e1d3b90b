"""What patches are ranked by where it is not the model's attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gradient_input(loss: Tensor, images: Tensor, keep: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, K) sum over each patch's pixels of |derivative of the loss x pixel|.

    Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences",
    2016, section 3; a pixel of 0 is the mean colour of the model's training images.

    Args:
        loss: a scalar computed from `images`; its graph is freed.
        images: (B, C, H, W), requiring a gradient.
        keep: (B, K) int64 patches.
        patch_size: rows and columns of pixels.
    """
    (grad,) = torch.autograd.grad(loss, images)
    pixels = (grad * images.detach()).abs().sum(1, keepdim=True)
    per_patch = F.avg_pool2d(pixels, patch_size).flatten(1) * (patch_size[0] * patch_size[1])
    return per_patch.gather(1, keep)
