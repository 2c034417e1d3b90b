"""A timm VisionTransformer fed some of its patches, and the augmentation, for the baselines: plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.errors import SmiError


class Network:
    """The forward of a plain VisionTransformer, out of timm's own modules.

    Args:
        model: with one class token, without registers or query norms.
        maps: write out the attention maps of every block, and rank patches by the last one's.

    Raises:
        SmiError: another kind of model, with every reason.
    """

    def __init__(self, model: Any, *, maps: bool) -> None:
        reasons = self.reasons_against(model)
        if reasons:
            raise SmiError(f"no baseline runs {type(model).__name__}: {'; '.join(reasons)}. Use a plain DeiT or ViT.")
        self.model, self.maps = model, maps
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        self.patch: tuple[int, int] = model.patch_embed.patch_size
        self.num_patches = self.grid[0] * self.grid[1]

    @staticmethod
    def reasons_against(model: Any) -> list[str]:
        """Why `model` cannot run here; empty if it can."""
        wanted = {
            "it has not exactly one class token": getattr(model, "num_prefix_tokens", 0) == 1,
            "its class token takes no position embedding": not getattr(model, "no_embed_class", True),
            "its head does not read the class token": getattr(model, "global_pool", "") == "token",
        }
        reasons = [reason for reason, holds in wanted.items() if not holds]
        if not reasons and not isinstance(model.blocks[0].attn.q_norm, nn.Identity):
            reasons.append("its attention normalises queries")
        return reasons

    def __call__(self, images: Tensor, cells: Tensor | None, lean: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits (B, classes), and with `maps` the scores (B, K) in the order of `cells`.

        Args:
            images: (B, C, H, W), augmented.
            cells: (B, K) int64 that are fed; None feeds all in grid order.
            lean: embed the fed patches alone, and compute the last block for the class token alone.
        """
        model = self.model
        x = model.norm_pre(self._tokens(images, cells, lean))
        probabilities = None
        blocks = list(model.blocks)
        for block in blocks[:-1] if lean else blocks:
            mixed, probabilities = self._attention(block.attn, block.norm1(x))
            x = x + block.ls1(mixed)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        if lean:
            x = self._class_row(blocks[-1], x)
        logits = model.head(model.fc_norm(model.norm(x[:, :1] if lean else x)[:, 0]))
        return logits, None if probabilities is None else probabilities[:, :, 0, 1:].mean(1)

    def _tokens(self, images: Tensor, cells: Tensor | None, lean: bool) -> Tensor:
        model = self.model
        embed, position = model.patch_embed, model.pos_embed
        if lean:
            patches = as_patches(images, self.patch)
            if cells is not None:
                patches = patches.gather(1, cells[..., None].expand(-1, -1, patches.shape[2]))
            weight = embed.proj.weight
            tokens = embed.norm(F.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias))
            tokens = tokens + (position[:, 1:] if cells is None else position[0, 1:][cells])
        else:
            tokens = embed(images.to(embed.proj.weight.dtype)) + position[:, 1:]
            if cells is not None:
                tokens = tokens.gather(1, cells[..., None].expand(-1, -1, tokens.shape[2]))
        first = (model.cls_token + position[:, :1]).to(tokens.dtype).expand(len(images), -1, -1)
        return torch.cat((first, tokens), 1)

    def _attention(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        B, L, D = x.shape
        H = attn.num_heads
        query, key, value = attn.qkv(x).reshape(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
        probabilities = None
        if self.maps:
            probabilities = (query * attn.scale @ key.transpose(2, 3)).softmax(-1)
            mixed = probabilities @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.proj(mixed.transpose(1, 2).reshape(B, L, D)), probabilities

    @staticmethod
    def _class_row(block: Any, x: Tensor) -> Tensor:
        """(B, 1, D): the class token after `block`; of the others only keys and values are computed."""
        B, L, D = x.shape
        attn = block.attn
        H = attn.num_heads
        weight, bias = attn.qkv.weight, attn.qkv.bias
        normed, first = block.norm1(x), x[:, :1]
        query = F.linear(normed[:, :1], weight[:D], None if bias is None else bias[:D])
        both = F.linear(normed, weight[D:], None if bias is None else bias[D:])
        query = query.reshape(B, 1, H, D // H).transpose(1, 2)
        key, value = both.reshape(B, L, 2, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, 1, D)
        first = first + block.ls1(attn.proj(mixed))
        return first + block.ls2(block.mlp(block.norm2(first)))


def as_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, C * p * q), patches in grid order."""
    B, C, H, W = images.shape
    p, q = patch
    cut = images.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(B, (H // p) * (W // q), C * p * q)


def augment(images: Tensor, offset: tuple[int, int, int]) -> Tensor:
    """Roll by (dy, dx) pixels, then flip columns if asked."""
    dy, dx, flip = offset
    images = images.roll((dy, dx), (2, 3))
    return images.flip(3) if flip else images


def permuted(images: Tensor, offset: Tensor) -> Tensor:
    """`augment` for an offset (3,) that lies on the device, so that it can change between replays of a graph."""
    H, W = images.shape[2:]
    y, x = (torch.arange(n, device=images.device) for n in (H, W))
    dy, dx, flip = offset.unbind(0)
    seen = torch.where(flip.bool(), W - 1 - x, x)
    source = (y - dy)[:, None] % H * W + (seen - dx) % W
    column = (x + dx) % W
    inverse = (y + dy)[:, None] % H * W + torch.where(flip.bool(), W - 1 - column, column)
    return _Permute.apply(images, source.flatten(), inverse.flatten())


class _Permute(torch.autograd.Function):
    """Pixels by index; as no pixel is read twice, the gradient is read by the inverse and never added up."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return images.flatten(2).index_select(2, source).view(images.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return grad.flatten(2).index_select(2, inverse).view(grad.shape), None, None


def grid_cells(keep: Tensor, offset: Any, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """(B, K): where kept patches lie under the augmentation, offsets rounded to whole patches."""
    rows, columns = grid
    down, across = (offset[i] // patch[i] + (2 * (offset[i] % patch[i]) >= patch[i]) for i in range(2))
    row, column = (keep // columns + down) % rows, (keep % columns + across) % columns
    if isinstance(offset, Tensor):
        column = torch.where(offset[2].bool(), columns - 1 - column, column)
    elif offset[2]:
        column = columns - 1 - column
    return row * columns + column
