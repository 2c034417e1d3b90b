"""One Transformer block over folded weights: forward in five kernels, input-only backward in five.

Rows are the tokens of all images, (B N, D). `x` is the residual stream in the wide dtype, `x_low` the same rounded to
the dtype of matrix operands, `stats` its row statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import rotary
from smi_kernels.folding import SWIGLU, Folded, Pool
from smi_kernels.linear.reference import gradient_sums
from smi_kernels.tuning import dot_precision


class Saved(NamedTuple):
    """What a block's backward needs: 18 bytes times width a token in 16 bits, and 16 of statistics.

    Attributes:
        x_low, moments: input, and mean and rstd of its rows.
        qkv: (B N, 3 D); of a last block (B N, 2 D), keys and values alone.
        x_mid_low, moments_mid: stream between attention and MLP, and its moments.
        u: pre-activation of the MLP.
        query: (B R, D) of a last block.
        size: (B, N) patches in each token in front of the block, None for one in each.
        target, merged_size: (B, N) int64 and (B, N') of a block that merges, between attention and MLP.
    """

    x_low: Tensor
    moments: Tensor
    qkv: Tensor
    x_mid_low: Tensor
    moments_mid: Tensor
    u: Tensor
    query: Tensor | None = None
    size: Tensor | None = None
    target: Tensor | None = None
    merged_size: Tensor | None = None


def forward(
    w: Folded,
    x: Tensor,
    x_low: Tensor,
    stats: Tensor,
    tokens: int,
    heads: int,
    dot: str,
    by: Tensor | None = None,
    size: Tensor | None = None,
    prefix: int = 0,
    fewer: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """``x, x_low, stats`` behind a block that merges `fewer` tokens of each image, and what its backward needs.

    `by` are the `rotary.angles`, if it has any.
    """
    ops = torch.ops.smi
    D = x.shape[1]
    qkv, moments = ops.norm_linear(x_low, stats, *w.qkv, w.eps[0], x_low.dtype, dot)
    parts = qkv.view(-1, tokens, 3, heads, D // heads)
    if by is not None:
        rotary.turn_(parts[:, :, :2], by)
    out = ops.attention(parts, w.qk_norm, w.qk_eps, dot_precision(dot), size)
    target = ops.match_tokens(parts[:, :, 1], w.qk_norm, w.qk_eps, prefix, fewer) if fewer else None
    return _rest(w, out.view(-1, D), x, dot, Saved(x_low, moments, qkv, x, x, x, None, size, target), tokens - fewer)


def last_forward(
    w: Folded,
    x: Tensor,
    x_low: Tensor,
    stats: Tensor,
    tokens: int,
    heads: int,
    first: int,
    dot: str,
    by: Tensor | None = None,
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """As `forward`, for the `first` tokens of each image alone, the only ones that the head reads: (B first, D).

    These have no place in the image, so only keys are turned.
    """
    ops = torch.ops.smi
    D = x.shape[1]
    kv, moments = ops.norm_linear(x_low, stats, *w.of_key_and_value(), w.eps[0], x_low.dtype, dot)
    query, _ = ops.norm_linear(
        _first(x_low, tokens, first), _first(stats, tokens, first), *w.of_query(), w.eps[0], x_low.dtype, dot
    )
    parts = kv.view(-1, tokens, 2, heads, D // heads)
    if by is not None:
        rotary.turn_(parts[:, :, :1], by)
    out = ops.class_attention(query.view(-1, first, heads, D // heads), parts, w.qk_norm, w.qk_eps, size)
    x = _first(x, tokens, first)
    return _rest(w, out.view(-1, D), x, dot, Saved(x_low, moments, kv, x, x, x, query, size), first)


def pool_forward(
    pool: Pool, x: Tensor, x_low: Tensor, stats: Tensor, tokens: int, dot: str
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """As `forward`, for the one learned query of an attention pooling: (B, D). Its residual stream begins with it."""
    ops = torch.ops.smi
    w, D = pool.block, x_low.shape[1]
    kv, moments = ops.norm_linear(x_low, stats, *w.qkv, w.eps[0], x_low.dtype, dot)
    query = pool.query.repeat(x_low.shape[0] // tokens, 1)
    out = ops.class_attention(
        query.view(-1, 1, pool.heads, D // pool.heads), kv.view(-1, tokens, 2, pool.heads, D // pool.heads), None, 0.0
    )
    x = x.new_zeros(query.shape)
    return _rest(w, out.view(-1, D), x, dot, Saved(x_low, moments, kv, x, x, x, query), 1)


def _rest(w: Folded, out: Tensor, x: Tensor, dot: str, saved: Saved, left: int) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """From the attention's output to the end of the block, with `left` tokens of each image behind a merging."""
    ops = torch.ops.smi
    x_mid, x_mid_low, stats_mid = ops.linear_residual(out, w.proj.weight, w.proj.bias, x, dot)
    merged_size = None
    if saved.target is not None:
        x_mid, x_mid_low, stats_mid, merged_size = ops.merge_tokens(x_mid, saved.size, saved.target, left, out.dtype)
    x_mid_low = low_of(x_mid, x_mid_low)
    if w.activation == SWIGLU:
        u, moments_mid = ops.norm_linear(x_mid_low, stats_mid, *w.fc1, w.eps[1], x_mid_low.dtype, dot)
        gate, value = u.to(x.dtype).chunk(2, dim=1)
        activation = (F.silu(gate) * value).to(u.dtype)
    else:
        u, activation, moments_mid = ops.norm_linear_gelu(x_mid_low, stats_mid, *w.fc1, w.eps[1], dot, w.activation)
    x, low, stats = ops.linear_residual(activation, w.fc2.weight, w.fc2.bias, x_mid, dot)
    saved = saved._replace(x_mid_low=x_mid_low, moments_mid=moments_mid, u=u, merged_size=merged_size)
    return x, low_of(x, low), stats, saved


def backward(
    w: Folded, saved: Saved, dx: Tensor, dx_low: Tensor, tokens: int, heads: int, dot: str, by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``dx, dx_low`` in front of a block from those behind it."""
    ops = torch.ops.smi
    D = dx.shape[1]
    dx, d_out = _rest_dx(w, saved, dx, dx_low, dot)
    qkv = saved.qkv.view(-1, tokens, 3, heads, D // heads)
    dqkv, dstats = ops.attention_dx(
        qkv, d_out.view(-1, tokens, D), w.qk_norm, w.qk_eps, w.qkv.colsum, w.qkv.bias, dot_precision(dot), saved.size
    )
    if by is not None:
        rotary.turn_dx_(dqkv[:, :, :2], by, dstats, w.qkv.colsum[: 2 * D], w.qkv.bias[: 2 * D])
    dx, dx_low = ops.norm_linear_dx(
        dqkv.view(-1, 3 * D), w.qkv.weight, dstats, saved.x_low, saved.moments, dx, None, 1, 1, dot
    )
    return dx, low_of(dx, dx_low)


def last_backward(
    w: Folded,
    saved: Saved,
    dx: Tensor,
    dx_low: Tensor,
    tokens: int,
    heads: int,
    first: int,
    dot: str,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``dx, dx_low`` of all tokens in front of the last block from those of the `first` ones behind it."""
    ops = torch.ops.smi
    D = dx.shape[1]
    dx, d_out = _rest_dx(w, saved, dx, dx_low, dot)
    assert saved.query is not None
    query, kv = w.of_query(), w.of_key_and_value()
    d_query, d_kv, dstats = ops.class_attention_dx(
        saved.query.view(-1, first, heads, D // heads),
        saved.qkv.view(-1, tokens, 2, heads, D // heads),
        d_out.view(-1, first, D),
        w.qk_norm,
        w.qk_eps,
        query.colsum,
        query.bias,
        kv.colsum,
        kv.bias,
        saved.size,
    )
    if by is not None:
        rotary.turn_dx_(d_kv[:, :, :1], by, dstats, kv.colsum[:D], kv.bias[:D])
    extra = ops.linear_dx(d_query.view(-1, D), query.weight, dx.dtype, dot)
    dx, dx_low = ops.norm_linear_dx(
        d_kv.view(-1, 2 * D), kv.weight, dstats, saved.x_low, saved.moments, dx, extra, tokens, first, dot
    )
    return dx, low_of(dx, dx_low)


def pool_backward(pool: Pool, saved: Saved, dx: Tensor, dx_low: Tensor, tokens: int, dot: str) -> tuple[Tensor, Tensor]:
    """``dx, dx_low`` of all tokens in front of an attention pooling from those of (B, D) behind it."""
    ops = torch.ops.smi
    w, D = pool.block, dx.shape[1]
    _, d_out = _rest_dx(w, saved, dx, dx_low, dot)
    assert saved.query is not None
    # Of the query, which is constant, nothing may reach the sums: it counts as its own bias.
    constant = pool.query.to(dx.dtype)
    _, d_kv, dstats = ops.class_attention_dx(
        saved.query.view(-1, 1, pool.heads, D // pool.heads),
        saved.qkv.view(-1, tokens, 2, pool.heads, D // pool.heads),
        d_out.view(-1, 1, D),
        None,
        0.0,
        torch.zeros_like(constant),
        constant,
        w.qkv.colsum,
        w.qkv.bias,
    )
    dx, dx_low = ops.norm_linear_dx(
        d_kv.view(-1, 2 * D), w.qkv.weight, dstats, saved.x_low, saved.moments, None, None, 1, 1, dot
    )
    return dx, low_of(dx, dx_low)


def _rest_dx(w: Folded, saved: Saved, dx: Tensor, dx_low: Tensor, dot: str) -> tuple[Tensor, Tensor]:
    """Gradients of the stream between attention and MLP, and of the attention's output."""
    ops = torch.ops.smi
    if w.activation == SWIGLU:
        du, dstats = _swiglu_dx(w, saved.u, ops.linear_dx(dx_low, w.fc2.weight, dx.dtype, dot))
    else:
        du, dstats = ops.linear_gelu_dx(dx_low, w.fc2.weight, saved.u, w.fc1.colsum, w.fc1.bias, dot, w.activation)
    dx, dx_low = ops.norm_linear_dx(du, w.fc1.weight, dstats, saved.x_mid_low, saved.moments_mid, dx, None, 1, 1, dot)
    if saved.target is not None:
        dx, dx_low = ops.merge_tokens_dx(dx, saved.size, saved.target, saved.merged_size, dx_low.dtype)
    return dx, ops.linear_dx(low_of(dx, dx_low), w.proj.weight, w.proj.weight.dtype, dot)


def _swiglu_dx(w: Folded, u: Tensor, d_activation: Tensor) -> tuple[Tensor, Tensor]:
    """As ``linear_gelu_dx``, for u = (gate, value) and ``silu(gate) value`` (Shazeer, arXiv:2002.05202)."""
    gate, value = u.to(d_activation.dtype).chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    du = torch.cat((d_activation * value * slope, d_activation * gate * sigmoid), dim=1).to(u.dtype)
    return du, gradient_sums(du, u, w.fc1.colsum, w.fc1.bias)


def low_of(x: Tensor, x_low: Tensor) -> Tensor:
    """`x_low`, for which an operation returns an empty tensor where it would be `x` itself."""
    return x if x_low.dtype == x.dtype else x_low


def _first(rows: Tensor, tokens: int, first: int) -> Tensor:
    """The `first` rows of each `tokens`; a view if that is one."""
    return rows.view(-1, tokens, *rows.shape[1:])[:, :first].reshape(-1, *rows.shape[1:])
