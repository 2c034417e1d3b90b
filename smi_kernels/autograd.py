"""The thin autograd layer: a `SparseViT` as one differentiable function of the image."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

from smi_kernels.derivatives import check_first_derivative, like_forward
from smi_kernels.vit import SparseViT, Trace


def apply_network(
    vit: SparseViT, images: Tensor, keep: Tensor | None, offsets: Tensor | None, class_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, classes), differentiable in `images`, and on request the class attention (B, K), which is not."""
    logits, scores = _Network.apply(images, keep, offsets, vit, class_attention, torch.is_grad_enabled())
    return logits, scores if class_attention else None


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        keep: Tensor | None,
        offsets: Tensor | None,
        vit: SparseViT,
        class_attention: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        # The context asks for gradients of whatever requires them, even under `torch.no_grad`.
        differentiable = grad_enabled and ctx.needs_input_grad[0]
        trace = vit.run(images.contiguous(), keep, offsets, trace=differentiable)
        if class_attention:
            fed = trace.tokens - vit.weights.prefix.shape[0]
            everything = torch.arange(fed, device=images.device).repeat(images.shape[0], 1)
            _, scores = vit.rank(trace, everything, fed)
        else:
            scores = images.new_empty(0)
        ctx.mark_non_differentiable(scores)
        if differentiable:
            ctx.vit, ctx.shape = vit, images.shape
            ctx.tokens = trace.tokens
            ctx.context = None if torch.compiler.is_compiling() else copy_context()
            ctx.save_for_backward(keep, offsets, *trace.tensors())
        return trace.parts.sum(0), scores

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("a SparseViT")
        gradients: tuple[Tensor | None, ...] = like_forward(ctx.context, _Network._backward, ctx, d_logits)
        return gradients

    @staticmethod
    def _backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        vit: SparseViT = ctx.vit
        keep, offsets, *tensors = ctx.saved_tensors
        trace = Trace.of(tensors, vit.memory, ctx.tokens)
        d_patches = vit.backward_of(trace, d_logits)
        _, _, height, width = ctx.shape
        d_images = torch.ops.smi.patches_to_pixels(d_patches, keep, offsets, height, width, *vit.weights.patch_size)
        return d_images, None, None, None, None, None
