"""One Transformer block over folded weights: forward in five kernels, input-only backward in five.

Rows are the tokens of all images, (B N, D). `x` is the residual stream in the wide dtype, `x_low` the same rounded to
the dtype of matrix operands, `stats` its row statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import rotary
from smi_kernels.folding import SWIGLU, Folded, Pool
from smi_kernels.linear.reference import gradient_sums
from smi_kernels.tuning import dot_precision


class How(NamedTuple):
    """How a block runs.

    Attributes:
        tokens: of each image in front of it.
        heads: H.
        dot: precision of its products.
        by: `rotary.angles` of its tokens, or None.
        first: of a last block, how many first tokens of each image go through, the only ones that the head reads: all
            that comes out, (B first, D). 0 for all of them.
        prefix, fewer: so many tokens of each image are merged into others, and none of the first `prefix`.
    """

    tokens: int
    heads: int
    dot: str
    by: Tensor | None = None
    first: int = 0
    prefix: int = 0
    fewer: int = 0


class Input(NamedTuple):
    """What `recompute` needs of a block: ``x, stats`` and (B, N) patches in each token, None for one in each."""

    x: Tensor
    stats: Tensor
    size: Tensor | None


class Saved(NamedTuple):
    """What a block's backward needs: 18 bytes times width a token in 16 bits, and 16 of statistics.

    Attributes:
        x_low, moments: input, and mean and rstd of its rows.
        qkv: (B N, 3 D); of a last block and of a pooling (B N, 2 D), keys and values alone.
        x_mid_low, moments_mid: stream between attention and MLP, and its moments.
        u: pre-activation of the MLP.
        query: (B R, D) of a last block or a pooling.
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
    w: Folded | Pool, x: Tensor, x_low: Tensor, stats: Tensor, size: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """``x, x_low, stats`` behind a block or an attention pooling, and what its backward needs.

    A pooling has the one learned query, with which its residual stream begins: (B, D).
    """
    ops = torch.ops.smi
    x, x_low, stats, kept = _attend(w, x, x_low, stats, size, how)
    w = _layers(w)
    if w.activation == SWIGLU:
        u, moments = ops.norm_linear(x_low, stats, *w.fc1, w.eps[1], x_low.dtype, how.dot)
        gate, value = u.to(x.dtype).chunk(2, dim=1)
        activation = (F.silu(gate) * value).to(u.dtype)
    else:
        u, activation, moments = ops.norm_linear_gelu(x_low, stats, *w.fc1, w.eps[1], how.dot, w.activation)
    x, low, stats = ops.linear_residual(activation, w.fc2.weight, w.fc2.bias, x, how.dot)
    return x, low_of(x, low), stats, Saved(**kept, u=u, moments_mid=moments)


def recompute(w: Folded | Pool, before: Input, how: How) -> Saved:
    """What `forward` says that the backward needs, bit for bit, and nothing beyond."""
    x, stats, size = before
    layers = _layers(w)
    _, x_low, stats, kept = _attend(w, x, x.to(layers.fc1.weight.dtype), stats, size, how)
    u, moments = torch.ops.smi.norm_linear(x_low, stats, *layers.fc1, layers.eps[1], x_low.dtype, how.dot)
    return Saved(**kept, u=u, moments_mid=moments)


def _layers(w: Folded | Pool) -> Folded:
    return w.block if isinstance(w, Pool) else w


def _attend(
    w: Folded | Pool, x: Tensor, x_low: Tensor, stats: Tensor, size: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """``x, x_low, stats`` between attention and MLP, and what is known of `Saved` by then."""
    ops = torch.ops.smi
    layers = _layers(w)
    if isinstance(w, Pool):
        out, around, kept = _pool_attention(w, x, x_low, stats, how)
    else:
        out, around, kept = (_last_attention if how.first else _attention)(w, x, x_low, stats, size, how)
    x, low, stats = ops.linear_residual(out.view(around.shape), layers.proj.weight, layers.proj.bias, around, how.dot)
    if how.fewer:
        x, low, stats, kept["merged_size"] = ops.merge_tokens(
            x, size, kept["target"], how.tokens - how.fewer, x_low.dtype
        )
    low = low_of(x, low)
    return x, low, stats, {**kept, "x_low": x_low, "size": size, "x_mid_low": low}


def _attention(
    w: Folded, x: Tensor, x_low: Tensor, stats: Tensor, size: Tensor | None, how: How
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The attention's output, the stream around it, and what its backward needs."""
    ops = torch.ops.smi
    qkv, moments = ops.norm_linear(x_low, stats, *w.qkv, w.eps[0], x_low.dtype, how.dot)
    parts = qkv.view(-1, how.tokens, 3, how.heads, x.shape[1] // how.heads)
    if how.by is not None:
        rotary.turn_(parts[:, :, :2], how.by)
    out = ops.attention(parts, w.qk_norm, w.qk_eps, dot_precision(how.dot), size)
    kept = {"moments": moments, "qkv": qkv}
    if how.fewer:
        kept["target"] = ops.match_tokens(parts[:, :, 1], w.qk_norm, w.qk_eps, how.prefix, how.fewer)
    return out, x, kept


def _last_attention(
    w: Folded, x: Tensor, x_low: Tensor, stats: Tensor, size: Tensor | None, how: How
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """As `_attention`, of the first tokens alone. These have no place in the image, so only keys are turned."""
    ops = torch.ops.smi
    d = x.shape[1] // how.heads
    kv, moments = ops.norm_linear(x_low, stats, *w.of_key_and_value(), w.eps[0], x_low.dtype, how.dot)
    query, _ = ops.norm_linear(_first(x_low, how), _first(stats, how), *w.of_query(), w.eps[0], x_low.dtype, how.dot)
    parts = kv.view(-1, how.tokens, 2, how.heads, d)
    if how.by is not None:
        rotary.turn_(parts[:, :, :1], how.by)
    out = ops.class_attention(query.view(-1, how.first, how.heads, d), parts, w.qk_norm, w.qk_eps, size)
    return out, _first(x, how), {"moments": moments, "qkv": kv, "query": query}


def _pool_attention(
    pool: Pool, x: Tensor, x_low: Tensor, stats: Tensor, how: How
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """As `_attention`, of the one learned query, with which the stream begins."""
    ops = torch.ops.smi
    w, d = pool.block, x.shape[1] // how.heads
    kv, moments = ops.norm_linear(x_low, stats, *w.qkv, w.eps[0], x_low.dtype, how.dot)
    query = pool.query.repeat(x.shape[0] // how.tokens, 1)
    out = ops.class_attention(query.view(-1, 1, how.heads, d), kv.view(-1, how.tokens, 2, how.heads, d), None, 0.0)
    return out, x.new_zeros(query.shape), {"moments": moments, "qkv": kv, "query": query}


def backward(w: Folded | Pool, saved: Saved | Input, dx: Tensor, dx_low: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """``dx, dx_low`` of all tokens in front of a block or a pooling from those of what comes out of it."""
    if isinstance(saved, Input):
        saved = recompute(w, saved, how)
    dx, d_out = _rest_dx(_layers(w), saved, dx, dx_low, how.dot)
    if isinstance(w, Pool):
        dx, dx_low = _pool_attention_dx(w, saved, d_out, how)
    else:
        dx, dx_low = (_last_attention_dx if how.first else _attention_dx)(w, saved, dx, d_out, how)
    return dx, low_of(dx, dx_low)


def _attention_dx(w: Folded, saved: Saved, dx: Tensor, d_out: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """``dx, dx_low`` of the block's input out of the gradients of the stream around the attention and of its output."""
    ops = torch.ops.smi
    D = dx.shape[1]
    dqkv, dstats = ops.attention_dx(
        saved.qkv.view(-1, how.tokens, 3, how.heads, D // how.heads),
        d_out.view(-1, how.tokens, D),
        w.qk_norm,
        w.qk_eps,
        w.qkv.colsum,
        w.qkv.bias,
        dot_precision(how.dot),
        saved.size,
    )
    if how.by is not None:
        rotary.turn_dx_(dqkv[:, :, :2], how.by, dstats, w.qkv.colsum[: 2 * D], w.qkv.bias[: 2 * D])
    made: tuple[Tensor, Tensor] = ops.norm_linear_dx(
        dqkv.view(-1, 3 * D), w.qkv.weight, dstats, saved.x_low, saved.moments, dx, None, 1, 1, how.dot
    )
    return made


def _last_attention_dx(w: Folded, saved: Saved, dx: Tensor, d_out: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """As `_attention_dx`, out of gradients of the first tokens alone."""
    ops = torch.ops.smi
    D, d = dx.shape[1], dx.shape[1] // how.heads
    assert saved.query is not None
    query, kv = w.of_query(), w.of_key_and_value()
    d_query, d_kv, dstats = ops.class_attention_dx(
        saved.query.view(-1, how.first, how.heads, d),
        saved.qkv.view(-1, how.tokens, 2, how.heads, d),
        d_out.view(-1, how.first, D),
        w.qk_norm,
        w.qk_eps,
        query.colsum,
        query.bias,
        kv.colsum,
        kv.bias,
        saved.size,
    )
    if how.by is not None:
        rotary.turn_dx_(d_kv[:, :, :1], how.by, dstats, kv.colsum[:D], kv.bias[:D])
    extra = ops.linear_dx(d_query.view(-1, D), query.weight, dx.dtype, how.dot)
    made: tuple[Tensor, Tensor] = ops.norm_linear_dx(
        d_kv.view(-1, 2 * D), kv.weight, dstats, saved.x_low, saved.moments, dx, extra, how.tokens, how.first, how.dot
    )
    return made


def _pool_attention_dx(pool: Pool, saved: Saved, d_out: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """As `_attention_dx`; the stream around the attention does not depend on the tokens."""
    ops = torch.ops.smi
    w, D, d = pool.block, d_out.shape[1], d_out.shape[1] // how.heads
    assert saved.query is not None
    # Of the query, which is constant, nothing may reach the sums: it counts as its own bias.
    constant = pool.query.to(w.qkv.bias.dtype)
    _, d_kv, dstats = ops.class_attention_dx(
        saved.query.view(-1, 1, how.heads, d),
        saved.qkv.view(-1, how.tokens, 2, how.heads, d),
        d_out.view(-1, 1, D),
        None,
        0.0,
        torch.zeros_like(constant),
        constant,
        w.qkv.colsum,
        w.qkv.bias,
    )
    made: tuple[Tensor, Tensor] = ops.norm_linear_dx(
        d_kv.view(-1, 2 * D), w.qkv.weight, dstats, saved.x_low, saved.moments, None, None, 1, 1, how.dot
    )
    return made


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


def _first(rows: Tensor, how: How) -> Tensor:
    """Rows of the first tokens; a view if that is one of each image."""
    return rows.view(-1, how.tokens, *rows.shape[1:])[:, : how.first].reshape(-1, *rows.shape[1:])
