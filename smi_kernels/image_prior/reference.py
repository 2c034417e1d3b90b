"""Reference of the image priors: total variation in two norms, and the L2 norm.

Four neighbour differences enter: right, down, down-left, down-right (Yin et al., "Dreaming to Distill", CVPR 2020).
``per_image=True`` takes each norm over one image, so that an image does not depend on its batch;
``per_image=False`` takes it over the whole batch tensor, as published implementations do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )


def _norm(values: Tensor, per_image: bool) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1) if per_image else values, dim=1 if per_image else None)


def tv_l2(images: Tensor, *, per_image: bool) -> Tensor:
    """Sum of the Frobenius norms of the four differences; where a norm is zero its gradient is zero.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar.
    """
    right, down, down_left, down_right = (_norm(d, per_image) for d in _differences(images))
    return right + down + down_left + down_right


def tv_l1(images: Tensor, *, per_image: bool) -> Tensor:
    """Sum of the mean absolute values of the four differences.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar.
    """
    right, down, down_left, down_right = (
        d.abs().flatten(1).mean(1) if per_image else d.abs().mean() for d in _differences(images)
    )
    return right + down + down_left + down_right


def l2_norm(images: Tensor, *, per_image: bool) -> Tensor:
    """Euclidean norm of the pixels.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) if `per_image`, else a scalar.
    """
    return _norm(images, per_image)
