"""Attention on compiled operators; signatures and meanings as in ``reference.py``.

With norms of queries and keys, or with sizes of tokens, the reference computes it, an image at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.attention import reference


def attention_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """As `smi_kernels.attention_row`."""
    if not native.takes(query.dtype, key.dtype):
        return reference.attention_row(query, key, scale)
    B, H, N, d = key.shape
    native.expect(query=(query, (B, H, d)))
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    row = query.new_empty(B, N)
    native.call(
        "attention_row", query.dtype, native.Rows(query), *query.stride()[:2], native.Rows(key), *key.stride()[:3],
        float(scale), row, B, H, N, d,
    )  # fmt: skip
    return row


def attention(
    qkv: Tensor, qk_norm: Tensor | None, eps: float, precision: str = "ieee", size: Tensor | None = None
) -> Tensor:
    """As `smi_kernels.attention.reference.attention`."""
    if qk_norm is not None or size is not None or not native.takes(qkv.dtype):
        return native.by_image(reference.attention, (qkv, qk_norm, eps, precision, size), (0, 4))
    B, N, _, H, d = qkv.shape
    native.expect(qkv=(qkv, (B, N, 3, H, d)))
    out = qkv.new_empty(B, N, H * d)
    native.call("attention", qkv.dtype, qkv.contiguous(), out, B, N, H, d)
    return out


def attention_dx(
    qkv: Tensor,
    d_out: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    colsum: Tensor,
    bias: Tensor,
    precision: str = "ieee",
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `smi_kernels.attention.reference.attention_dx`."""
    dtypes = (qkv.dtype, d_out.dtype, colsum.dtype, bias.dtype)
    if qk_norm is not None or size is not None or not native.takes(*dtypes):
        args = (qkv, d_out, qk_norm, eps, colsum, bias, precision, size)
        return native.by_image(reference.attention_dx, args, (0, 1, 7))
    B, N, _, H, d = qkv.shape
    native.expect(
        qkv=(qkv, (B, N, 3, H, d)),
        d_out=(d_out, (B, N, H * d)),
        colsum=(colsum, (3 * H * d,)),
        bias=(bias, (3 * H * d,)),
    )
    dqkv, dstats = torch.empty_like(qkv, memory_format=torch.contiguous_format), qkv.new_empty(B * N, H, 2)
    native.call(
        "attention_dx", qkv.dtype, qkv.contiguous(), d_out.contiguous(), colsum.contiguous(), bias.contiguous(), dqkv,
        dstats, B, N, H, d,
    )  # fmt: skip
    return dqkv, dstats


def class_attention(
    query: Tensor, kv: Tensor, qk_norm: Tensor | None, eps: float, size: Tensor | None = None
) -> Tensor:
    """As `smi_kernels.attention.reference.class_attention`."""
    if qk_norm is not None or size is not None or not native.takes(query.dtype, kv.dtype):
        return native.by_image(reference.class_attention, (query, kv, qk_norm, eps, size), (0, 1, 4))
    (B, R, H, d), N = query.shape, kv.shape[1]
    native.expect(kv=(kv, (B, N, 2, H, d)))
    out = query.new_empty(B, R, H * d)
    native.call("class_attention", query.dtype, query.contiguous(), kv.contiguous(), out, B, N, R, H, d)
    return out


def class_attention_dx(
    query: Tensor,
    kv: Tensor,
    d_out: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    q_colsum: Tensor,
    q_bias: Tensor,
    kv_colsum: Tensor,
    kv_bias: Tensor,
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `smi_kernels.attention.reference.class_attention_dx`."""
    constants = (q_colsum, q_bias, kv_colsum, kv_bias)
    dtypes = (query.dtype, kv.dtype, d_out.dtype, *(t.dtype for t in constants))
    if qk_norm is not None or size is not None or not native.takes(*dtypes):
        args = (query, kv, d_out, qk_norm, eps, *constants, size)
        return native.by_image(reference.class_attention_dx, args, (0, 1, 2, 9))
    (B, R, H, d), N = query.shape, kv.shape[1]
    native.expect(
        kv=(kv, (B, N, 2, H, d)),
        d_out=(d_out, (B, R, H * d)),
        q_colsum=(q_colsum, (H * d,)),
        q_bias=(q_bias, (H * d,)),
        kv_colsum=(kv_colsum, (2 * H * d,)),
        kv_bias=(kv_bias, (2 * H * d,)),
    )
    d_query, d_kv = query.new_empty(query.shape), kv.new_empty(kv.shape)
    dstats = query.new_empty(B * N, H, 2)
    native.call(
        "class_attention_dx", query.dtype, query.contiguous(), kv.contiguous(), d_out.contiguous(),
        *(t.contiguous() for t in constants), d_query, d_kv, dstats, B, N, R, H, d,
    )  # fmt: skip
    return d_query, d_kv, dstats
