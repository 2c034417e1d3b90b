"""The image priors on compiled operators; signatures and meanings as in ``reference.py``."""

from __future__ import annotations

from torch import Tensor

from smi_kernels import native
from smi_kernels.image_prior import reference


def prior_sums(images: Tensor) -> Tensor:
    """As `smi_kernels.image_prior.reference.prior_sums`."""
    if not native.takes(images.dtype):
        return reference.prior_sums(images)
    B, C, H, W = images.shape
    sums = images.new_empty(B, C, 9)
    native.call("prior_sums", images.dtype, images.contiguous(), sums, B * C, H, W)
    return sums


def prior_sums_dx(images: Tensor, d_sums: Tensor) -> Tensor:
    """As `smi_kernels.image_prior.reference.prior_sums_dx`."""
    if not native.takes(images.dtype, d_sums.dtype):
        return reference.prior_sums_dx(images, d_sums)
    B, C, H, W = images.shape
    native.expect(d_sums=(d_sums, (B, C, 9)))
    d_images = images.new_empty(images.shape)
    native.call("prior_sums_dx", images.dtype, images.contiguous(), d_sums.contiguous(), d_images, B * C, H, W)
    return d_images


def prior_coefficients(
    sums: Tensor, tv1: float, tv2: float, l2: float, group: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.image_prior.reference.prior_coefficients`."""
    if not native.takes(sums.dtype):
        return reference.prior_coefficients(sums, tv1, tv2, l2, group, height, width)
    B, C, _ = sums.shape
    native.expect(sums=(sums, (B, C, 9)))
    if group < 1:
        raise ValueError(f"group is {group}; expected at least 1.")
    G = -(-B // group)
    values, coefficients = sums.new_empty(G, 3), sums.new_empty(G, 9)
    native.call(
        "prior_coefficients", sums.dtype, sums.contiguous(), float(tv1), float(tv2), float(l2), group, height, width,
        values, coefficients, B, C,
    )  # fmt: skip
    return values, coefficients
