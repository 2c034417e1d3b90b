"""Reference of the image priors: total variation in two norms, and the L2 norm.

Four neighbour differences enter: right, down, down-left, down-right (Yin et al., "Dreaming to Distill", CVPR 2020).
``per_image=True`` takes each norm over one image, so that an image does not depend on its batch;
``per_image=False`` takes it over the whole batch tensor, as published implementations do.

All three are functions of nine sums over each plane of an image: squares of the right, down, down-left and down-right
differences, then their absolute values, then squares of the pixels. Who has the sums need not look at pixels again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _neighbours(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each direction the pixels that are some pixel's neighbour, and the pixels whose neighbours they are."""
    return [
        (images[..., :, 1:], images[..., :, :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
    ]


def _differences(images: Tensor) -> list[Tensor]:
    return [there - here for there, here in _neighbours(images)]


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


def prior_row_sums(images: Tensor) -> Tensor:
    """The nine sums over each row, differences to the row below included. Differentiable.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, C, H, 9), dtype of `images`.
    """
    H = images.shape[2]
    differences = _differences(images)
    rows = [d.square().sum(3) for d in differences] + [d.abs().sum(3) for d in differences] + [images.square().sum(3)]
    return torch.stack([F.pad(sums, (0, H - sums.shape[2])) for sums in rows], dim=3)


def prior_sums(images: Tensor) -> Tensor:
    """The nine sums over each plane. Differentiable.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, C, 9), dtype of `images`.
    """
    return prior_row_sums(images).sum(2)


def prior_sums_dx(images: Tensor, d_sums: Tensor) -> Tensor:
    """Gradient of `prior_sums`; a difference of zero has a slope of zero.

    Args:
        images: (B, C, H, W).
        d_sums: (B, C, 9), gradient with respect to the sums.

    Returns:
        (B, C, H, W), dtype of `images`.
    """
    d_images = 2 * d_sums[..., 8, None, None] * images
    for k, (there, here) in enumerate(_neighbours(images)):
        difference = there - here
        slope = 2 * d_sums[..., k, None, None] * difference + d_sums[..., 4 + k, None, None] * difference.sign()
        d_there, d_here = _neighbours(d_images)[k]
        d_there += slope
        d_here -= slope
    return d_images


def prior_coefficients(
    sums: Tensor, tv1: float, tv2: float, l2: float, group: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The three priors of groups of images, and the gradient of their weighted sum with respect to the nine sums.

    The norms of a group are taken over all its images and channels, so ``group=1`` is `tv_l2` with ``per_image=True``
    and ``group=B`` is ``per_image=False``. Computed in float64. The sums over all images of a group have one gradient.

    Args:
        sums: (B, C, 9) of `prior_sums`.
        tv1, tv2, l2: weights of `tv_l1`, `tv_l2` and `l2_norm` in the objective of each group.
        group: images of a group; consecutive images belong together, and the last group may be smaller.
        height, width: of the images; at least 2, or a mean over no differences is taken to be 0.

    Returns:
        values (G, 3) with G = ceil(B / group): `tv_l1`, `tv_l2` and `l2_norm` of each group, without the weights.
        coefficients (G, 9): where a norm is 0, so is its gradient. Both have the dtype of `sums`.
    """
    B, C, _ = sums.shape
    G = -(-B // group)
    padded = F.pad(sums.double(), (0, 0, 0, 0, 0, G * group - B))
    total = padded.view(G, group * C, 9).sum(1)
    planes = C * (B - group * torch.arange(G, device=sums.device)).clamp(max=group)[:, None].double()
    beside, below, diagonal = height * (width - 1), (height - 1) * width, (height - 1) * (width - 1)
    counts = torch.cat([planes * n for n in (beside, below, diagonal, diagonal)], 1).clamp(min=1)

    norms = total[:, [0, 1, 2, 3, 8]].sqrt()
    values = torch.stack([(total[:, 4:8] / counts).sum(1), norms[:, :4].sum(1), norms[:, 4]], 1)
    half = torch.where(norms == 0, 0, 0.5 / norms)
    coefficients = torch.cat([tv2 * half[:, :4], tv1 / counts, l2 * half[:, 4:]], 1)
    return values.to(sums.dtype), coefficients.to(sums.dtype)
