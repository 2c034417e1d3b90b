"""Attention in plain PyTorch: the rows that rank tokens, self-attention, attention of the tokens a classifier reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Meaning of `smi_kernels.attention_row`."""
    compute = query if query.element_size() >= 4 else query.float()
    scores = (compute[:, :, None, :] @ key.to(compute.dtype).transpose(-2, -1)).squeeze(2) * scale
    return scores.softmax(dim=-1).mean(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and queries of the attention each key receives, for models without a class token.

    Args:
        query, key: (B, H, N, d).
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64 input); each row sums to 1.
    """
    compute = query if query.element_size() >= 4 else query.float()
    scores = compute @ key.to(compute.dtype).transpose(-2, -1) * scale
    return scores.softmax(dim=-1).mean(dim=(1, 2))


def received(query: Tensor, key: Tensor, qk_norm: Tensor | None, eps: float) -> Tensor:
    """`received_attention` of (B, N, H, d) queries, which are scaled already, and keys, before any `qk_norm`.

    `qk_norm` and `eps` are as for `attention`.

    Returns:
        (B, N) float32 (float64 for float64).
    """
    q, k = (_wide(tensor).transpose(1, 2) for tensor in (query, key))
    return received_attention(*_normed(q, k, qk_norm, eps, query.dtype), 1.0)


def attention(
    qkv: Tensor, qk_norm: Tensor | None, eps: float, precision: str = "ieee", size: Tensor | None = None
) -> Tensor:
    """Multi-head self-attention ``softmax(q @ k^T) @ v`` of every token of an image to all of them.

    Scores and softmax are in float32, probabilities are rounded to the dtype of `qkv` before they meet the values.

    Args:
        qkv: (B, N, 3, H, d) contiguous, d <= 128; queries are scaled already.
        qk_norm: (4, d) float32 (float64 for float64): weight and bias of a LayerNorm over d of the queries, then of one
            of the keys, both rounded to the dtype of `qkv` again; None for no norm.
        eps: of those norms.
        precision: how kernels multiply float32 matrices, "ieee" or "tf32"; means nothing here.
        size: (B, N) float32 (float64 for float64), how often each token counts as a key: its log is added to the
            scores (Bolya et al., "Token Merging", ICLR 2023, section 3, proportional attention). None for once.

    Returns:
        (B, N, H * d), dtype of `qkv`.
    """
    q, k, v = _heads(qkv, qk_norm, eps)
    probabilities = _probabilities(q, k, size)
    out = _rounded(probabilities, qkv.dtype) @ v
    return out.transpose(1, 2).contiguous().flatten(2).to(qkv.dtype)


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
    """Gradient of `attention` with respect to `qkv`, and its row sums for the norm before the layer that made `qkv`.

    Args:
        qkv, qk_norm, eps, precision, size: of `attention`; `size` is a constant.
        d_out: (B, N, H * d), dtype of `qkv`.
        colsum, bias: (3 * H * d) float32, of the `norm_linear` that made `qkv`.

    Returns:
        dqkv: like `qkv`, before any `qk_norm`.
        dstats: (B * N, H, 2) float32, for each head the sums of ``dqkv colsum`` and ``dqkv (qkv - bias)`` over its
            3 * d columns of a row; of `dqkv` as it is returned.
    """
    B, N, _, H, d = qkv.shape
    q, k, v = _heads(qkv, qk_norm, eps)
    d_heads = _wide(d_out).view(B, N, H, d).transpose(1, 2)
    probabilities = _probabilities(q, k, size)
    d_scores = _rounded(_softmax_dx(probabilities, d_heads @ v.transpose(-2, -1)), qkv.dtype)
    dq = d_scores @ k
    dk = d_scores.transpose(-2, -1) @ q
    dv = _rounded(probabilities, qkv.dtype).transpose(-2, -1) @ d_heads
    if qk_norm is not None:
        dq = _norm_dx(dq, _wide(qkv[:, :, 0]).transpose(1, 2), qk_norm[0], eps)
        dk = _norm_dx(dk, _wide(qkv[:, :, 1]).transpose(1, 2), qk_norm[2], eps)
    dqkv = torch.stack((dq, dk, dv)).permute(1, 3, 0, 2, 4).contiguous().to(qkv.dtype)
    return dqkv, _gradient_sums(dqkv, qkv, colsum, bias).flatten(0, 1)


def class_attention(
    query: Tensor, kv: Tensor, qk_norm: Tensor | None, eps: float, size: Tensor | None = None
) -> Tensor:
    """`attention` of the few tokens that a classifier reads to all tokens; float32 throughout.

    Args:
        query: (B, R, H, d) contiguous, R = 1 or 2, d <= 128; scaled already.
        kv: (B, N, 2, H, d) contiguous, dtype of `query`.
        qk_norm, eps, size: as in `attention`.

    Returns:
        (B, R, H * d), dtype of `query`.
    """
    q, k, v = _class_heads(query, kv, qk_norm, eps)
    out = _probabilities(q, k, size) @ v
    return out.transpose(1, 2).contiguous().flatten(2).to(query.dtype)


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
    """Gradient of `class_attention`, and its row sums for the norm before the layer that made `query` and `kv`.

    Args:
        query, kv, qk_norm, eps, size: of `class_attention`; query r was made from token r < N of its image.
        d_out: (B, R, H * d), dtype of `query`.
        q_colsum, q_bias: (H * d) float32, of the `norm_linear` that made `query`.
        kv_colsum, kv_bias: (2 * H * d) float32, of the `norm_linear` that made `kv`.

    Returns:
        d_query, d_kv: like `query` and `kv`, before any `qk_norm`.
        dstats: (B * N, H, 2) float32, as of `attention_dx`; rows of tokens r < R count the columns of query r too.
    """
    B, R, H, d = query.shape
    q, k, v = _class_heads(query, kv, qk_norm, eps)
    d_heads = _wide(d_out).view(B, R, H, d).transpose(1, 2)
    probabilities = _probabilities(q, k, size)
    d_scores = _softmax_dx(probabilities, d_heads @ v.transpose(-2, -1))
    dq = d_scores @ k
    dk = d_scores.transpose(-2, -1) @ q
    dv = probabilities.transpose(-2, -1) @ d_heads
    if qk_norm is not None:
        dq = _norm_dx(dq, _wide(query).transpose(1, 2), qk_norm[0], eps)
        dk = _norm_dx(dk, _wide(kv[:, :, 0]).transpose(1, 2), qk_norm[2], eps)
    d_query = dq.transpose(1, 2).contiguous().to(query.dtype)
    d_kv = torch.stack((dk, dv)).permute(1, 3, 0, 2, 4).contiguous().to(kv.dtype)
    dstats = _gradient_sums(d_kv, kv, kv_colsum, kv_bias)
    dstats[:, :R] += _gradient_sums(d_query[:, :, None], query[:, :, None], q_colsum, q_bias)
    return d_query, d_kv, dstats.flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    if size is not None:
        scores = scores + size.to(scores.dtype).log()[:, None, None]
    return scores.softmax(dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, in its own dtype."""
    return x.to(dtype).to(x.dtype)


def _heads(qkv: Tensor, qk_norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values behind their norms, (B, H, N, d) in the wide dtype."""
    q, k, v = _wide(qkv).permute(2, 0, 3, 1, 4)
    return (*_normed(q, k, qk_norm, eps, qkv.dtype), v)


def _class_heads(query: Tensor, kv: Tensor, qk_norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _wide(kv).permute(2, 0, 3, 1, 4)
    return (*_normed(_wide(query).transpose(1, 2), k, qk_norm, eps, kv.dtype), v)


def _normed(q: Tensor, k: Tensor, qk_norm: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if qk_norm is None:
        return q, k
    q_weight, q_bias, k_weight, k_bias = qk_norm.to(q.dtype)
    q = F.layer_norm(q, q_weight.shape, q_weight, q_bias, eps)
    k = F.layer_norm(k, k_weight.shape, k_weight, k_bias, eps)
    return _rounded(q, dtype), _rounded(k, dtype)


def _norm_dx(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of a LayerNorm over the last axis with respect to its input `x`."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    g = dy * weight.to(dy.dtype)
    return rstd * (g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True))


def _softmax_dx(probabilities: Tensor, dp: Tensor) -> Tensor:
    return probabilities * (dp - (probabilities * dp).sum(-1, keepdim=True))


def _gradient_sums(du: Tensor, u: Tensor, colsum: Tensor, bias: Tensor) -> Tensor:
    """(B, N, H, 2) sums of ``du colsum`` and ``du (u - bias)`` of each row and head of (B, N, parts, H, d) tensors."""
    du, u = du.to(colsum.dtype), u.to(colsum.dtype)
    columns = du.shape[2:]
    parts = torch.stack((du * colsum.view(columns), du * (u - bias.view(columns))), dim=-1)
    return parts.sum(dim=(2, 4))
