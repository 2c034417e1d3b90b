"""What is put into a copy of a timm model, so that it feeds some patches and shows its attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import smi_kernels


class EmbedSlot(nn.Module):
    """In place of timm's patch embedding: embeds only `cells` and lays their tokens out on the grid."""

    def __init__(self, inner: PatchEmbed, grid: tuple[int, int]) -> None:
        super().__init__()
        self.inner = inner
        self.grid = grid
        self.cells: Tensor | None = None
        self.offsets: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """timm reads geometry (grid_size, num_patches, ...) from this slot."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, images: Tensor) -> Tensor:
        weight, bias = self.inner.proj.weight, self.inner.proj.bias
        if self.cells is None:
            if self.offsets is not None:
                images = smi_kernels.augment(images, self.offsets)
            dense: Tensor = self.inner(images.to(weight.dtype))
            return dense
        tokens = self.inner.norm(smi_kernels.embed_patches(images, self.cells, self.offsets, weight, bias))
        B, _, D = tokens.shape
        rows, columns = self.grid
        laid_out = tokens.new_zeros(B, rows * columns, D).scatter(1, self.cells[..., None].expand(-1, -1, D), tokens)
        return laid_out if self.inner.flatten else laid_out.view(B, rows, columns, D)


class GatherSlot(nn.Module):
    """In place of timm's patch dropout: prefix tokens and the tokens of `cells`, in that order."""

    def __init__(self, num_prefix_tokens: int, with_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.with_indices = with_indices
        self.cells: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if self.cells is not None:
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            kept = patches.gather(1, self.cells[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat((prefix, kept), dim=1)
        return (x, self.cells) if self.with_indices else x


class AttentionTap(TorchFunctionMode):
    """Sees query and key of every fused attention call, whatever projections, norms and rotations made them.

    Attributes:
        everything: of all blocks, differentiable, not of the last one alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, float]] = []
        self.everything = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            if not self.everything:
                query, key = query.detach(), key.detach()
            self.calls.append((query, key, scale))
        return func(*args, **kwargs)


def frozen_twin(model: nn.Module) -> Any:
    """A copy of the module tree on the same storage, with no parameter requiring a gradient."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo.update((id(buffer), buffer) for buffer in model.buffers())
    return copy.deepcopy(model, memo)
