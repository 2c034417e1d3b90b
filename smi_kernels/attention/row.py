"""Triton kernel of the attention row that ranks tokens: one program an image, each key read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.class_row import class_row, class_row_args
from smi_kernels.launch import launch
from smi_kernels.tiles import wait_for_previous


@triton.jit(do_not_specialize=["N"])
def attention_row_kernel(
    query_ptr,  # (B, H, D)
    key_ptr,  # (B, N, H, D)
    row_ptr,  # (B, N)
    SCALE: tl.float64,
    N,
    H,
    D,
    query_stride_b,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_n,
    key_stride_h,
    key_stride_d,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous()
    image = tl.program_id(0)
    row = class_row(
        query_ptr, key_ptr, None, image, SCALE, 0.0, N, H, D, query_stride_b, query_stride_h, query_stride_d,
        key_stride_b, key_stride_n, key_stride_h, key_stride_d, False, COMPUTE, BLOCK_N, BLOCK_D, BLOCK_D,
    )  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    tl.store(row_ptr + image.to(tl.int64) * N + n, row, mask=n < N)


def attention_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """As `smi_kernels.attention_row`."""
    B, _, N, _ = key.shape
    row = torch.empty(B, N, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    args, warps = class_row_args(query, key.transpose(1, 2), scale)
    launch(attention_row_kernel, (B,), {**args, "row_ptr": row}, num_warps=warps)
    return row
