"""What the attention kernels share: rows of one head in and out, and a LayerNorm over a head's columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, N, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, AGAIN: tl.constexpr = False):
    """(rows, BLOCK_D) of one head; zeros beyond the last token and the last column. AGAIN: they will be read again."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (column < D)[None, :]
    at = ptr + rows[:, None] * stride_n + column[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_last" if AGAIN else "")


@triton.jit
def load_transposed(ptr, rows, N, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, AGAIN: tl.constexpr = False):
    """(BLOCK_D, rows), as `load_rows`."""
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[:, None] & (rows < N)[None, :]
    at = ptr + column[:, None] + rows[None, :] * stride_n
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_last" if AGAIN else "")


@triton.jit
def store_rows(ptr, x, rows, N, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (column < D)[None, :]
    tl.store(ptr + rows[:, None] * stride_n + column[None, :], x, mask=inside)


@triton.jit
def load_columns(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(1, BLOCK_D) of a vector over one head's columns; zeros beyond the last."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(ptr + column, mask=column < D, other=0.0)[None, :]


@triton.jit
def sized(scores, size_ptr, keys, N, HAS_SIZE: tl.constexpr):
    """(queries, keys) scores plus the log of how often each key counts; `scores` themselves without HAS_SIZE."""
    if HAS_SIZE:
        return scores + tl.log(tl.load(size_ptr + keys, mask=keys < N, other=1.0))[None, :]
    else:
        return scores


@triton.jit
def softmax_step(scores, highest, total):
    """What (queries, keys) more scores make of a softmax so far, of which `highest` and `total` are known.

    Returns their exponentials, what all sums so far have to be multiplied by, and the new `highest` and `total`.
    """
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    p = tl.exp(scores - higher[:, None])
    shrink = tl.exp(highest - higher)
    return p, shrink, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def pairs(ptr, rows, stride_n):
    """Pointers (rows, 2) to the sums of each row."""
    return ptr + rows[:, None] * stride_n + tl.arange(0, 2)[None, :]


@triton.jit
def _standardise(x, EPS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of `x` with mean 0 and variance 1, zeros beyond D, and (rows, 1) of 1 / standard deviation."""
    column = tl.arange(0, BLOCK_D)
    mean = tl.sum(x, axis=1) / D
    centred = tl.where((column < D)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    return centred * rstd[:, None], rstd[:, None]


@triton.jit
def normed(
    x,
    norm_ptr,  # (parts, 2, D): weights and biases, or unused
    rows,
    N,
    EPS,
    PART: tl.constexpr,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`x` behind its norm, in its own dtype; `x` itself without HAS_NORM."""
    if HAS_NORM:
        normalised, _ = _standardise(x.to(COMPUTE), EPS, D, BLOCK_D)
        weight = load_columns(norm_ptr + PART * 2 * D, D, BLOCK_D)
        y = normalised * weight + load_columns(norm_ptr + PART * 2 * D + D, D, BLOCK_D)
        # Rows beyond the last token must stay zero, or the bias would put them into sums over rows.
        return tl.where((rows < N)[:, None], y, 0.0).to(x.dtype)
    else:
        return x


@triton.jit
def load_keys(
    ptr,
    norm_ptr,
    rows,
    N,
    stride_n,
    EPS,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """(BLOCK_D, rows) of keys behind their norm."""
    # A tile loaded as a product wants it goes through shared memory; one transposed later stays in registers.
    if HAS_NORM:
        k = load_rows(ptr, rows, N, stride_n, D, BLOCK_D, AGAIN)
        return tl.trans(normed(k, norm_ptr, rows, N, EPS, 1, HAS_NORM, COMPUTE, D, BLOCK_D))
    else:
        return load_transposed(ptr, rows, N, stride_n, D, BLOCK_D, AGAIN)


@triton.jit
def normed_dx(
    dy,
    x,
    norm_ptr,  # (parts, 2, D) or unused
    EPS,
    PART: tl.constexpr,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of `normed` with respect to `x`, in COMPUTE."""
    if HAS_NORM:
        normalised, rstd = _standardise(x.to(COMPUTE), EPS, D, BLOCK_D)
        g = dy * load_columns(norm_ptr + PART * 2 * D, D, BLOCK_D)
        along = tl.sum(g * normalised, axis=1) / D
        return rstd * (g - (tl.sum(g, axis=1) / D)[:, None] - normalised * along[:, None])
    else:
        return dy


@triton.jit
def store_gradient(
    dy,
    x_ptr,
    norm_ptr,
    colsum_ptr,
    bias_ptr,
    dx_ptr,
    EPS,
    rows,
    N,
    stride_n,
    PART: tl.constexpr,
    HAS_NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store `normed_dx` of the rows at `x_ptr`; (rows, 2) sums of it times `colsum` and times ``x - bias``.

    The sums are over the gradient as it is stored, since that is what the next product reads: what leaves the norm in
    front then stays orthogonal to all that the norm removes.
    """
    sums = tl.zeros((rows.shape[0], 2), COMPUTE)
    # Always true. Without a branch the sums are put off to the end of the kernel, with all they need kept in registers.
    if N > 0:
        x = load_rows(x_ptr, rows, N, stride_n, D, BLOCK_D)
        dx = normed_dx(dy, x, norm_ptr, EPS, PART, HAS_NORM, COMPUTE, D, BLOCK_D).to(x.dtype)
        store_rows(dx_ptr, dx, rows, N, stride_n, D, BLOCK_D)
        dx = dx.to(COMPUTE)
        with_colsum = dx * load_columns(colsum_ptr, D, BLOCK_D)
        with_x = dx * (x.to(COMPUTE) - load_columns(bias_ptr, D, BLOCK_D))
        sums = tl.sum(tl.join(with_colsum, with_x), axis=1)
    return sums
