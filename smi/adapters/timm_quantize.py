"""A timm Vision Transformer as quantization wants it: every matrix product in the open, tokens chosen freely.

The caller's model is copied, never changed. In the copy attention is made of its two products and a softmax, dropout is
gone, and the embedding is written out here, so that patches which are not fed are never computed: no value of theirs
can reach an observer. Blocks, norms and head are timm's own code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi.adapters.timm import unsupported_reasons
from smi.errors import SmiError
from smi.modes import evaluating

# Of the logits from timm's own, relative: two orders of magnitude above what another order of sums does in float32.
_DIFFERENCE = 1e-4


class TokenModel(nn.Module):
    """Logits of whole images, or of some patches of them.

    Args:
        model: a timm ``VisionTransformer`` (or subclass: DeiT, distilled, ...); copied, as float32 on the CPU.

    Raises:
        SmiError: not such a model (with every reason), or the copy's logits differ from the model's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        reasons = unsupported_reasons(model)
        if not reasons and not isinstance(model, VisionTransformer):
            reasons = [f"{type(model).__name__} rotates queries and keys, which is not written for quantization yet"]
        if reasons:
            raise SmiError(
                f"{type(model).__name__} cannot be quantized: {'; '.join(reasons)}. Use a timm VisionTransformer "
                f"(ViT, DeiT, DeiT-III, DINOv2)."
            )
        vit = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        for name, module in list(vit.named_modules()):
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
            if isinstance(module, nn.Dropout):
                vit.set_submodule(name, nn.Identity())
        self.vit = vit
        D, N = vit.embed_dim, vit.patch_embed.num_patches
        tokens = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = torch.cat([torch.zeros(1, 0, D), *(token for token in tokens if token is not None)], dim=1)
        position = torch.zeros(prefix.shape[1] + N, D)
        if vit.pos_embed is not None:
            position[-vit.pos_embed.shape[1] :] = vit.pos_embed[0]  # prefix tokens may have none
        self.register_buffer("prefix", prefix.clone())
        self.register_buffer("position", position)
        self._check(model)

    def forward(self, images: Tensor, cells: Tensor | None = None) -> Tensor:
        """Logits (B, classes) float32.

        Args:
            images: (B, C, H, W) float32, normalised.
            cells: (B, K) int64, the patches that are fed; None feeds all.
        """
        vit, embed = self.vit, self.vit.patch_embed
        prefix, position = self.prefix, self.position
        assert isinstance(prefix, Tensor) and isinstance(position, Tensor)
        if cells is None:
            tokens = embed.proj(images).flatten(2).transpose(1, 2)
        else:
            (B, C, _, _), K = images.shape, cells.shape[1]
            (rows, columns), (height, width) = embed.grid_size, embed.patch_size
            patches = images.reshape(B, C, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
            patches = patches.reshape(B, rows * columns, C * height * width)
            fed = patches.gather(1, cells[..., None].expand(-1, -1, C * height * width))
            tokens = embed.proj(fed.reshape(B * K, C, height, width)).reshape(B, K, -1)
            first = torch.arange(prefix.shape[1], device=cells.device).expand(B, -1)
            position = position[torch.cat((first, cells + prefix.shape[1]), dim=1)]
        tokens = torch.cat((prefix.expand(images.shape[0], -1, -1), embed.norm(tokens)), dim=1)
        found: Tensor = vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(tokens + position))))
        return found

    def _check(self, model: Any) -> None:
        """All patches at once and each by name must give what timm gives."""
        embed = self.vit.patch_embed
        images = torch.randn(1, embed.proj.in_channels, *embed.img_size, generator=torch.Generator().manual_seed(0))
        first = next(model.parameters())
        with evaluating(model), torch.no_grad():
            expected = model(images.to(first)).float().cpu()
        cells = torch.arange(embed.num_patches).flip(0)[None]
        with torch.no_grad():
            found = self(images), self(images, cells)
        error = max(((logits - expected).norm() / expected.norm().clamp_min(1e-12)).item() for logits in found)
        limit = _DIFFERENCE if first.dtype in (torch.float32, torch.float64) else 0.1
        if not error <= limit:
            raise SmiError(
                f"{type(model).__name__} cannot be quantized: its embedding is not that of a plain Vision Transformer; "
                f"logits differ by {error:.1e} (relative; at most {limit:g} is expected)."
            )
