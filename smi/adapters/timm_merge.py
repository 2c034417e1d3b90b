"""Tokens merged inside timm's blocks: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import smi_kernels
from smi.errors import SmiError


class Merging:
    """What the blocks of one network hand on to each other in one forward.

    Args:
        prefix: tokens in front of the patches, which are never merged.
        blocks: of the network.
        merge_to: see `smi_kernels.merge_counts`.

    Attributes:
        size: (B, N) float32 (float64 for float64), patches in each token; None while there is one in each.
    """

    def __init__(self, prefix: int, blocks: int, merge_to: float) -> None:
        self.prefix, self.blocks, self.merge_to = prefix, blocks, merge_to
        self.size: Tensor | None = None
        self._left: tuple[int, ...] = ()
        self._key: Tensor | None = None

    def begin(self, tokens: int) -> None:
        """A forward of so many tokens, prefix among them."""
        self.size = None
        self._left = smi_kernels.merge_counts(tokens - self.prefix, self.blocks, self.merge_to)

    def see_key(self, _module: Any, _args: Any, key: Tensor) -> None:
        """A forward hook on what makes the keys, (B, H, N, d)."""
        self._key = key.detach()

    def bias(self, x: Tensor) -> Tensor | None:
        """(B, 1, 1, N) log of the sizes, so that a token counts in attention as often as patches went into it."""
        return None if self.size is None else self.size.log().to(x.dtype)[:, None, None]

    def merge(self, x: Tensor, number: int) -> Tensor:
        """Tokens (B, N, D) between attention and MLP of block `number` -> (B, N', D)."""
        key, self._key = self._key, None
        left = self.prefix + self._left[number]
        fewer = x.shape[1] - left
        if not fewer:
            return x
        assert key is not None
        target = smi_kernels.match_tokens(key.transpose(1, 2), self.prefix, fewer)
        x, self.size = smi_kernels.merge_tokens(x, self.size, target, left)
        return x


class MergingBlock(Block):
    """timm's block with merging between attention and MLP; made of one by `merge_inside`."""

    merging: Merging
    number: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self.number:
            self.merging.begin(x.shape[1])
        mask = self.merging.bias(x) if attn_mask is None else attn_mask
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=mask, is_causal=is_causal)))
        x = self.merging.merge(x, self.number)
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class PatchMean(nn.Module):
    """Behind the last norm of a head that takes the mean of its tokens: makes it the mean of the patches."""

    def __init__(self, merging: Merging) -> None:
        super().__init__()
        self.merging = merging

    def forward(self, x: Tensor) -> Tensor:
        size, prefix = self.merging.size, self.merging.prefix
        if size is None:
            return x
        weight = size[:, prefix:] / size[:, prefix:].mean(1, keepdim=True)
        return torch.cat((x[:, :prefix], (x[:, prefix:] * weight[..., None]).to(x.dtype)), 1)


def merge_inside(twin: Any, merge_to: float) -> Merging:
    """Put merging into the blocks of a network of timm's without `merging_reasons`; they keep their names.

    Returns:
        What they share; with another `merge_to` they merge to that.

    Raises:
        SmiError: the blocks cannot merge its patches so far.
    """
    try:
        smi_kernels.merge_counts(twin.patch_embed.num_patches, len(twin.blocks), merge_to)
    except ValueError as error:
        raise SmiError(str(error)) from None
    merging = Merging(twin.num_prefix_tokens, len(twin.blocks), merge_to)
    for number, block in enumerate(twin.blocks):
        block.__class__ = MergingBlock  # and no wrapper, so that hooks, names and weights stay where they are
        block.merging, block.number = merging, number
        block.attn.k_norm.register_forward_hook(merging.see_key)
    if twin.global_pool == "avg":
        twin.norm = nn.Sequential(twin.norm, PatchMean(merging))
    return merging


def merging_reasons(model: Any) -> list[str]:
    """Every reason why tokens cannot be merged inside a supported `model`; empty if they can."""
    if type(model).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        return ["expected timm's VisionTransformer or VisionTransformerDistilled (ViT, DeiT, DeiT-III, DINO, ...)"]
    reasons = []
    kinds = sorted({type(block).__name__ for block in model.blocks} - {"Block"})
    attentions = {type(block.attn).__name__ for block in model.blocks if type(block).__name__ == "Block"}
    if kinds:
        reasons.append(f"its blocks are {', '.join(kinds)}, not timm's Block")
    if others := sorted(attentions - {"Attention"}):
        reasons.append(f"its attention is {', '.join(others)}, not timm's Attention")
    if model.global_pool not in ("token", "avg"):
        reasons.append(f"its head pools by {model.global_pool!r}, which knows nothing of sizes; expected token or avg")
    elif model.global_pool == "avg" and getattr(model, "pool_include_prefix", False):
        reasons.append("its head takes the mean of prefix tokens and patches together")
    return reasons
