"""Input gradients of the operators that have one, for use apart from `SparseViT`, which calls the ``_dx`` ones itself.

Weights, biases and everything precomputed from them are constants: no gradient reaches them. `stats` counts as a
function of the rows it belongs to, whose gradient includes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any

import torch
from torch import Tensor

from smi_kernels import launch
from smi_kernels.dtypes import wide
from smi_kernels.linear.reference import gelu_slope, gradient_sums


def check_first_derivative(name: str) -> None:
    """Called in the backward of `name`, raises RuntimeError where a second derivative may follow.

    There is none, and autograd would leave it out of sums with other terms without a word.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative, so its gradient cannot be taken with create_graph=True; what needs one "
            f"must run on PyTorch's own operations, such as the model itself, or backend 'reference' for priors."
        )


def like_forward(context: Context | None, backward: Callable[..., Any], *args: Any) -> Any:
    """`backward` under a copy of the forward's `context`, if there is one: on its backend, with its tiles.

    On a GPU autograd runs it in another thread, and anywhere it may run when the context is left. Launches are listed
    for whoever does so at the backward.
    """
    if context is None:
        return backward(*args)
    context = context.copy()  # which can be entered although others are in it
    launch.show_in(context)
    return context.run(backward, *args)


def _attention_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, qk_norm, ctx.eps, ctx.precision, size = inputs
    ctx.save_for_backward(qkv, qk_norm, size)


def _attention(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    qkv, qk_norm, size = ctx.saved_tensors
    unused = torch.zeros(qkv.shape[2:].numel(), dtype=wide(qkv.dtype), device=qkv.device)
    dqkv, _ = torch.ops.smi.attention_dx(qkv, d_out.contiguous(), qk_norm, ctx.eps, unused, unused, ctx.precision, size)
    return dqkv, None, None, None, None


def _class_attention_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, kv, qk_norm, ctx.eps, size = inputs
    ctx.save_for_backward(query, kv, qk_norm, size)


def _class_attention(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    query, kv, qk_norm, size = ctx.saved_tensors
    unused = torch.zeros(kv.shape[2:].numel(), dtype=wide(kv.dtype), device=kv.device)
    half = unused[: unused.numel() // 2]
    d_query, d_kv, _ = torch.ops.smi.class_attention_dx(
        query, kv, d_out.contiguous(), qk_norm, ctx.eps, half, half, unused, unused, size
    )
    return d_query, d_kv, None, None, None


def _embed_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, keep, offsets, weight, _, prefix, ctx.height, ctx.width, ctx.precision = inputs
    ctx.size, ctx.prefix = images.shape[2:], prefix.shape[0]
    ctx.save_for_backward(keep, offsets, weight)
    ctx.mark_non_differentiable(output[2])


def _embed(ctx: Any, dx: Tensor, dx_low: Tensor, _: Tensor) -> tuple[Any, ...]:
    keep, offsets, weight = ctx.saved_tensors
    dx = _joined(dx, dx_low).to(weight.dtype).contiguous()
    d_patches = torch.ops.smi.embed_tokens_dx(dx, weight, ctx.prefix, None, ctx.precision)
    d_images = torch.ops.smi.patches_to_pixels(d_patches, keep, offsets, *ctx.size, ctx.height, ctx.width)
    return d_images, *[None] * 8


def _norm_linear_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, colsum, bias, _, *_, ctx.precision = inputs
    ctx.save_for_backward(x, weight, colsum, bias, output[0], output[-1])
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(output[-1])


def _norm_linear_gelu_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *others, ctx.kind = inputs
    _norm_linear_saved(ctx, tuple(others), output)
    ctx.inputs = len(inputs)


def _norm_linear(ctx: Any, du: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _through_norm(ctx, du)


def _norm_linear_gelu(ctx: Any, du: Tensor, d_activation: Tensor, _: Tensor) -> tuple[Any, ...]:
    u = ctx.saved_tensors[4]
    return _through_norm(ctx, du + d_activation.to(wide(u.dtype)) * gelu_slope(u.to(wide(u.dtype)), ctx.kind))


def _through_norm(ctx: Any, du: Tensor) -> tuple[Any, ...]:
    x, weight, colsum, bias, u, moments = ctx.saved_tensors
    du = du.to(weight.dtype).contiguous()
    dstats = gradient_sums(du, u, colsum, bias)
    dx, dx_low = torch.ops.smi.norm_linear_dx(du, weight, dstats, x, moments, None, None, 1, 1, ctx.precision)
    return dx if dx_low.dtype == dx.dtype else dx_low, *[None] * (ctx.inputs - 1)


def _linear_residual_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, _, ctx.precision = inputs
    ctx.save_for_backward(weight)
    ctx.mark_non_differentiable(output[2])


def _linear_residual(ctx: Any, dx: Tensor, dx_low: Tensor, _: Tensor) -> tuple[Any, ...]:
    (weight,) = ctx.saved_tensors
    dx = _joined(dx, dx_low)
    da = torch.ops.smi.linear_dx(dx.to(weight.dtype).contiguous(), weight, weight.dtype, ctx.precision)
    return da, None, None, dx, None


def _merge_tokens_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, size, target, *_ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(size, target, output[3])
    ctx.mark_non_differentiable(*output[2:])


def _merge_tokens(ctx: Any, dx: Tensor, dx_low: Tensor, *_: Tensor) -> tuple[Any, ...]:
    size, target, total = ctx.saved_tensors
    dx, _ = torch.ops.smi.merge_tokens_dx(_joined(dx, dx_low).contiguous(), size, target, total, ctx.dtype)
    return dx, *[None] * 4


def _prior_sums_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _prior_sums(ctx: Any, d_sums: Tensor) -> Tensor:
    d_images: Tensor = torch.ops.smi.prior_sums_dx(*ctx.saved_tensors, d_sums.contiguous())
    return d_images


DERIVATIVES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention, _attention_saved),
    "class_attention": (_class_attention, _class_attention_saved),
    "embed_tokens": (_embed, _embed_saved),
    "linear_residual": (_linear_residual, _linear_residual_saved),
    "merge_tokens": (_merge_tokens, _merge_tokens_saved),
    "norm_linear": (_norm_linear, _norm_linear_saved),
    "norm_linear_gelu": (_norm_linear_gelu, _norm_linear_gelu_saved),
    "prior_sums": (_prior_sums, _prior_sums_saved),
}


def _joined(dx: Tensor, dx_low: Tensor) -> Tensor:
    """The whole gradient of what went on in two dtypes; the low one is empty where there was no other."""
    return dx + dx_low.to(dx.dtype) if dx_low.numel() else dx
