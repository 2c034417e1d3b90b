"""Every operation as a registered torch operator: schema, shapes of its results, and which implementation runs.

``torch.ops.smi.<name>`` runs `<name>` of ``<folder>/reference.py``, ``<folder>/kernels.py`` (Triton),
``<folder>/cpu.py`` or ``<folder>/cuda.py`` (compiled), which have one signature; `smi_kernels.backends.choose` decides.
Where a folder has no ``cuda.py``, backend ``cuda`` runs its Triton kernels. Nothing here imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

from smi_kernels import backends
from smi_kernels.derivatives import DERIVATIVES, check_first_derivative, like_forward
from smi_kernels.dtypes import chunks, empty_low, wide
from smi_kernels.launch import recording

_library = torch.library.Library("smi", "DEF")
OPERATORS: dict[str, str] = {}
_MODULES = {"reference": "reference", "triton": "kernels", "cpu": "cpu", "cuda": "cuda"}


def _define(folder: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an operator of `folder`; the decorated function makes empty results of the right shapes."""
    name = schema.split("(")[0]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema)
        _library.impl(name, functools.partial(_run, folder, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"smi::{name}", _recordable(folder, name, fake), lib=_library)
        OPERATORS[name] = folder
        return fake

    return register


def _run(folder: str, name: str, *args: Any, **kwargs: Any) -> Any:
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    run = getattr(_implementation(folder, backends.choose(device)), name)
    with outside_autocast(device):
        return run(*args, **kwargs)


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within this context a caller's `torch.autocast` is off, so that operators compute in the dtypes they are given.

    Else the matrix products of a network folded for float32 would be rounded to 16 bits unasked.
    """
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _recordable(folder: str, name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, or where launches are recorded the launcher itself, which needs no data either."""

    @functools.wraps(fake)
    def shapes(*args: Any, **kwargs: Any) -> Any:
        if recording():
            return getattr(_implementation(folder, "triton"), name)(*args, **kwargs)
        return fake(*args, **kwargs)

    return shapes


@functools.cache
def _implementation(folder: str, backend: str) -> Any:
    module = f"smi_kernels.{folder}.{_MODULES[backend]}"
    if backend == "cuda" and importlib.util.find_spec(module) is None:
        module = f"smi_kernels.{folder}.kernels"
    return importlib.import_module(module)


@_define("token_select", "select_tokens(Tensor scores, Tensor keep, SymInt count) -> Tensor")
def _(scores, keep, count):
    return keep.new_empty(keep.shape[0], count)


@_define(
    "token_select",
    "rank_tokens(Tensor query, Tensor key, float scale, Tensor? qk_norm, float eps, Tensor keep, SymInt count,"
    " SymInt prefix) -> (Tensor, Tensor)",
)
def _(query, key, scale, qk_norm, eps, keep, count, prefix):
    scores = query.new_empty(keep.shape, dtype=wide(query.dtype))
    return keep.new_empty(keep.shape[0], count), scores


@_define(
    "patch_embed",
    "embed_tokens(Tensor images, Tensor? keep, Tensor? offsets, Tensor weight, Tensor position, Tensor prefix,"
    " int patch_height, int patch_width, str precision) -> (Tensor, Tensor, Tensor)",
)
def _(images, keep, offsets, weight, position, prefix, patch_height, patch_width, precision):
    B, D = images.shape[0], weight.shape[0]
    N = prefix.shape[0] + (position.shape[0] if keep is None else keep.shape[1])
    x = images.new_empty(B, N, D)
    return x, empty_low(x, weight.dtype), images.new_empty(B * N, chunks(D), 2)


@_define(
    "patch_embed",
    "embed_tokens_dx(Tensor dx_low, Tensor weight, SymInt prefix_tokens, Tensor? scale, str precision) -> Tensor",
)
def _(dx_low, weight, prefix_tokens, scale, precision):
    B, N, _ = dx_low.shape
    return dx_low.new_empty(B, N - prefix_tokens, weight.shape[1], dtype=wide(dx_low.dtype))


@_define(
    "patch_embed",
    "patches_to_pixels(Tensor d_patches, Tensor? keep, Tensor? offsets, SymInt height, SymInt width,"
    " int patch_height, int patch_width) -> Tensor",
)
def _(d_patches, keep, offsets, height, width, patch_height, patch_width):
    channels = d_patches.shape[2] // (patch_height * patch_width)
    return d_patches.new_empty(d_patches.shape[0], channels, height, width)


@_define("attention", "attention_row(Tensor query, Tensor key, float scale) -> Tensor")
def _(query, key, scale):
    return query.new_empty(key.shape[0], key.shape[2], dtype=wide(query.dtype))


@_define(
    "attention",
    "attention(Tensor qkv, Tensor? qk_norm, float eps, str precision, Tensor? size=None) -> Tensor",
)
def _(qkv, qk_norm, eps, precision, size=None):
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H * d)


@_define(
    "attention",
    "attention_dx(Tensor qkv, Tensor d_out, Tensor? qk_norm, float eps, Tensor colsum, Tensor bias, str precision,"
    " Tensor? size=None) -> (Tensor, Tensor)",
)
def _(qkv, d_out, qk_norm, eps, colsum, bias, precision, size=None):
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(qkv.shape), colsum.new_empty(B * N, H, 2)


@_define(
    "attention",
    "class_attention(Tensor query, Tensor kv, Tensor? qk_norm, float eps, Tensor? size=None) -> Tensor",
)
def _(query, kv, qk_norm, eps, size=None):
    B, R, H, d = query.shape
    return query.new_empty(B, R, H * d)


@_define(
    "attention",
    "class_attention_dx(Tensor query, Tensor kv, Tensor d_out, Tensor? qk_norm, float eps, Tensor q_colsum,"
    " Tensor q_bias, Tensor kv_colsum, Tensor kv_bias, Tensor? size=None) -> (Tensor, Tensor, Tensor)",
)
def _(query, kv, d_out, qk_norm, eps, q_colsum, q_bias, kv_colsum, kv_bias, size=None):
    B, N, _, H, d = kv.shape
    return query.new_empty(query.shape), kv.new_empty(kv.shape), q_colsum.new_empty(B * N, H, 2)


@_define("token_merge", "match_tokens(Tensor key, Tensor? norm, float eps, SymInt prefix, SymInt fewer) -> Tensor")
def _(key, norm, eps, prefix, fewer):
    return key.new_empty(key.shape[:2], dtype=torch.int64)


@_define(
    "token_merge",
    "merge_tokens(Tensor x, Tensor? size, Tensor target, SymInt left, ScalarType low)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _(x, size, target, left, low):
    B, D = target.shape[0], x.shape[1]
    out = x.new_empty(B * left, D)
    return out, empty_low(out, low), x.new_empty(B * left, chunks(D), 2), x.new_empty(B, left)


@_define(
    "token_merge",
    "merge_tokens_dx(Tensor dx, Tensor? size, Tensor target, Tensor total, ScalarType low) -> (Tensor, Tensor)",
)
def _(dx, size, target, total, low):
    out = dx.new_empty(target.numel(), dx.shape[1])
    return out, empty_low(out, low)


@_define(
    "linear",
    "norm_linear(Tensor x, Tensor stats, Tensor weight, Tensor colsum, Tensor bias, float eps, ScalarType out_dtype,"
    " str precision) -> (Tensor, Tensor)",
)
def _(x, stats, weight, colsum, bias, eps, out_dtype, precision):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype), stats.new_empty(x.shape[0], 2)


@_define(
    "linear",
    "norm_linear_gelu(Tensor x, Tensor stats, Tensor weight, Tensor colsum, Tensor bias, float eps, str precision,"
    ' str kind="erf") -> (Tensor, Tensor, Tensor)',
)
def _(x, stats, weight, colsum, bias, eps, precision, kind="erf"):
    u = x.new_empty(x.shape[0], weight.shape[0])
    return u, torch.empty_like(u), stats.new_empty(x.shape[0], 2)


@_define(
    "linear",
    "linear_residual(Tensor a, Tensor weight, Tensor bias, Tensor residual, str precision) -> (Tensor, Tensor, Tensor)",
)
def _(a, weight, bias, residual, precision):
    x = residual.new_empty(a.shape[0], weight.shape[0])
    return x, empty_low(x, a.dtype), x.new_empty(a.shape[0], chunks(weight.shape[0]), 2)


@_define("linear", "linear_dx(Tensor dy, Tensor weight, ScalarType out_dtype, str precision) -> Tensor")
def _(dy, weight, out_dtype, precision):
    return dy.new_empty(dy.shape[0], weight.shape[1], dtype=out_dtype)


@_define(
    "linear",
    "linear_gelu_dx(Tensor dy, Tensor weight, Tensor u, Tensor colsum, Tensor bias, str precision,"
    ' str kind="erf") -> (Tensor, Tensor)',
)
def _(dy, weight, u, colsum, bias, precision, kind="erf"):
    return u.new_empty(u.shape), colsum.new_empty(u.shape[0], chunks(u.shape[1]), 2)


@_define(
    "linear",
    "norm_linear_dx(Tensor du, Tensor weight, Tensor dstats, Tensor x, Tensor moments, Tensor? residual,"
    " Tensor? extra, SymInt tokens, SymInt first, str precision) -> (Tensor, Tensor)",
)
def _(du, weight, dstats, x, moments, residual, extra, tokens, first, precision):
    dx = moments.new_empty(du.shape[0], weight.shape[1])
    return dx, empty_low(dx, weight.dtype)


@_define("image_prior", "prior_sums(Tensor images) -> Tensor")
def _(images):
    return images.new_empty(images.shape[0], images.shape[1], 9)


@_define("image_prior", "prior_sums_dx(Tensor images, Tensor d_sums) -> Tensor")
def _(images, d_sums):
    return images.new_empty(images.shape)


@_define(
    "image_prior",
    "prior_coefficients(Tensor sums, float tv1, float tv2, float l2, SymInt group, SymInt height, SymInt width)"
    " -> (Tensor, Tensor)",
)
def _(sums, tv1, tv2, l2, group, height, width):
    G = -(-sums.shape[0] // group)
    return sums.new_empty(G, 3), sums.new_empty(G, 9)


@_define(
    "pixel_update",
    "begin_step(Tensor step, Tensor table, Tensor sums, float tv1, float tv2, float l2, SymInt group, SymInt height,"
    " SymInt width, float beta1, float beta2, Tensor(a!)? history) -> (Tensor, Tensor, Tensor)",
)
def _(step, table, sums, tv1, tv2, l2, group, height, width, beta1, beta2, history):
    G = -(-sums.shape[0] // group)
    return table.new_empty(table.shape[1:]), sums.new_empty(2), sums.new_empty(G, 9)


@_define(
    "pixel_update",
    "pixel_step(Tensor images, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor d_patches, Tensor? d_images,"
    " Tensor? keep_slots, Tensor? offsets, Tensor coefficients, SymInt group, Tensor bias_correction, float lr,"
    " float beta1, float beta2, float eps, Tensor low, Tensor high, bool frozen, int patch_height,"
    " int patch_width) -> (Tensor, Tensor)",
)
def _(
    images, exp_avg, exp_avg_sq, d_patches, d_images, keep_slots, offsets, coefficients, group, bias_correction, lr,
    beta1, beta2, eps, low, high, frozen, patch_height, patch_width,
):  # fmt: skip
    B, C, H, W = images.shape
    return images.new_empty(images.shape), images.new_empty(B, C, H, 9)


@_define(
    "pixel_update",
    "finish_prior_sums(Tensor images, Tensor row_sums, Tensor(a!)? step) -> Tensor",
)
def _(images, row_sums, step):
    return images.new_empty(images.shape[0], images.shape[1], 9)


@_define(
    "pixel_update",
    "adam_clamp_(Tensor(a!) images, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, int step, float lr,"
    " float beta1, float beta2, float eps, Tensor low, Tensor high, Tensor? live=None) -> ()",
)
def _(images, grad, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, low, high, live=None):
    return None


@_define(
    "loss_head",
    "cross_entropy_head(Tensor logits, Tensor targets, Tensor colsum, Tensor bias, Tensor? grad_scale,"
    " ScalarType low_dtype, Tensor(a!)? history, Tensor? step) -> (Tensor, Tensor, Tensor)",
)
def _(logits, targets, colsum, bias, grad_scale, low_dtype, history, step):
    R, B, classes = logits.shape
    return (
        logits.new_empty(B),
        logits.new_empty(B, classes, dtype=low_dtype),
        logits.new_empty(R, B, 1, 2),
    )


def _like_its_forward(
    name: str, backward: Callable[..., Any], setup: Callable[..., None]
) -> tuple[Callable[..., Any], ...]:
    """The two, with the backward under the context of the forward."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.context = copy_context()
        setup(ctx, inputs, output)

    def run(ctx: Any, *gradients: Tensor) -> Any:
        check_first_derivative(f"smi::{name}")
        return like_forward(ctx.context, backward, ctx, *gradients)

    return run, remember


for _name, _pair in DERIVATIVES.items():
    _backward, _setup = _like_its_forward(_name, *_pair)
    torch.library.register_autograd(f"smi::{_name}", _backward, setup_context=_setup, lib=_library)
