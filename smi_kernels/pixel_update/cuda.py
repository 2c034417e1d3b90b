"""The pixel update on CUDA operators; signatures and meanings as in ``reference.py``.

`pixel_step` and `finish_prior_sums` are compiled; `begin_step` and `adam_clamp_` are Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native, native_cuda
from smi_kernels.pixel_update.kernels import adam_clamp_, begin_step, copy_back

__all__ = ["adam_clamp_", "begin_step", "finish_prior_sums", "pixel_step"]

_DTYPES = (torch.float32, torch.float64)


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
    """As `smi_kernels.pixel_update.reference.pixel_step`; a tile's sums are in its first row, without differences to
    the next tile, and all other rows are zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; with ``SMI_CHECK=1`` a slot that is not there, too.
    """
    B, C, H, W = images.shape
    _expect_images(images)
    K, cells = d_patches.shape[1], _cells(H, W, patch_height, patch_width)
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
    native.expect_dtype(torch.int32, keep_slots=keep_slots)
    if keep_slots is not None and keep_slots.numel() and native_cuda.checks_indices(images.device):
        last = int(keep_slots.max())
        if last >= K:
            raise ValueError(f"keep_slots has {last}; expected at most {K - 1}, patches were {K}.")
    images, moments = images.contiguous(), (exp_avg.contiguous(), exp_avg_sq.contiguous())
    new_images, row_sums = images.new_empty(images.shape), images.new_empty(B, C, H, 9)
    native_cuda.call(
        "pixel_step", images.dtype, images, *moments, d_patches.contiguous(), native.dense(d_images),
        native.dense(keep_slots), native.dense(offsets), offsets is not None and offsets.shape[0] == 1,
        coefficients.contiguous(), group, bias_correction.contiguous(), float(lr), float(beta1), float(beta2),
        float(eps), low.contiguous(), high.contiguous(), frozen, new_images, row_sums, B, C, K, H, W, patch_height,
        patch_width,
    )  # fmt: skip
    native.written(*moments)
    copy_back((exp_avg, exp_avg_sq), moments)
    return new_images, row_sums


def finish_prior_sums(images: Tensor, row_sums: Tensor, step: Tensor | None) -> Tensor:
    """As `smi_kernels.pixel_update.reference.finish_prior_sums`."""
    B, C, H, W = images.shape
    _expect_images(images)
    native.expect(row_sums=(row_sums, (B, C, H, 9)), step=(step, (1,)))
    native.expect_dtype(torch.int64, step=step)
    sums = images.new_empty(B, C, 9)
    if not images.numel():  # nothing is launched, which would count
        if step is not None:
            step += 1
        return sums.zero_()
    native_cuda.call(
        "finish_prior_sums", images.dtype, images.contiguous(), row_sums.contiguous(), step, sums, B * C, H, W
    )
    if step is not None:
        native.written(step)
    return sums


def _expect_images(images: Tensor) -> None:
    if images.dtype not in _DTYPES:
        raise ValueError(f"images has dtype {images.dtype}; expected float32 or float64.")
    if images.shape[2] * images.shape[3] > 2**30:  # coordinates are 32-bit, and some are sums of two
        raise ValueError(f"images are {images.shape[2]} x {images.shape[3]}; expected at most 2^30 pixels.")


def _cells(H: int, W: int, patch_height: int, patch_width: int) -> int:
    if H % patch_height or W % patch_width:
        raise ValueError(f"images are {H} x {W}; expected a multiple of the patch, {patch_height} x {patch_width}.")
    return H // patch_height * (W // patch_width)
