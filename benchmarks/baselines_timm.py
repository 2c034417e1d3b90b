"""Peers that a user of timm may know, as a gradient on the pixels through timm's own forward. They are not SMI.

Neither ranks patches by the image, prunes in phases, augments or has priors: only the work of their networks compares.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines_vit import Network
from smi.errors import SmiError

PEERS = {
    "PatchDropout": "not SMI: timm PatchDropout, a random choice of as many patches at each step; bf16 autocast",
    "ToMe": "not SMI: ToMe-style merging in each block of timm's own forward, to about as many tokens at the end; "
    "bf16 autocast",
}


class Peer:
    """Cross-entropy descent on the pixels through a frozen network that leaves out or merges tokens.

    Args:
        name: of `PEERS`.
        model: a timm ``VisionTransformer`` with one class token; copied, not modified.
        images: (B, C, H, W), where it runs.
        targets: (B,) int64.
        kept: patches that PatchDropout lets through, or that are left after the last merging, at least nearly so.
        exact: compute in the model's own dtype in place of bf16 autocast.

    Raises:
        SmiError: no such peer, or another model.
    """

    def __init__(
        self, name: str, model: Any, images: Tensor, targets: Tensor, kept: int, lr: float = 0.25, exact: bool = False
    ) -> None:
        if name not in PEERS:
            raise SmiError(f"unknown peer {name!r}; choose one of: {', '.join(PEERS)}.")
        if reasons := Network.reasons_against(model):
            raise SmiError(
                f"{name} does not run {type(model).__name__}: {'; '.join(reasons)}. Use a plain DeiT or ViT."
            )
        self.name, self.exact = name, exact
        self.model = copy.deepcopy(model).to(images.device).eval().requires_grad_(False)
        patches = self.model.patch_embed.num_patches
        if name == "PatchDropout":
            self.model.patch_drop = PatchDropout(max(0, 1 - (kept + 0.5) / patches), ordered=True).train()
        else:
            merge_tokens(self.model, kept)
        self.images = images.clone().requires_grad_(True)
        self.targets = targets.to(images.device)
        self.logits = torch.empty(0)
        self._adam = torch.optim.Adam([self.images], lr=lr, betas=(0.5, 0.99))

    def gradient(self) -> Tensor:
        """(B, C, H, W), of the mean cross-entropy; sets `logits`."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=not self.exact):
            logits = self.model(self.images)
        self.logits = logits.detach().to(self.images.dtype)
        return torch.autograd.grad(F.cross_entropy(logits.to(self.images.dtype), self.targets), self.images)[0]

    def step(self) -> None:
        """One gradient and one step of Adam."""
        self.images.grad = self.gradient()
        self._adam.step()


def merge_tokens(model: Any, kept: int) -> None:
    """Put merging into every block, as many tokens in each, so that at least `kept` patch tokens are left."""
    patches, depth = model.patch_embed.num_patches, len(model.blocks)
    if not 1 <= kept <= patches:
        raise SmiError(f"kept is {kept}; expected 1 to {patches}, the patches of the model.")
    fewer, sizes = (patches - kept) // depth, _Sizes()
    model.blocks = nn.Sequential(*(_Merging(block, fewer, sizes, i == 0) for i, block in enumerate(model.blocks)))


class _Sizes:
    """How many patches went into each token: (B, L, 1), handed from block to block."""

    value: Tensor


class _Merging(nn.Module):
    """A block of timm's that merges `fewer` tokens between attention and MLP.

    Bolya et al., "Token Merging", ICLR 2023, section 3: bipartite soft matching of keys averaged over heads, means
    weighted by size, and attention that counts a token as often as patches went into it.
    """

    def __init__(self, block: Any, fewer: int, sizes: _Sizes, first: bool) -> None:
        super().__init__()
        self.block, self.fewer, self.sizes, self.first = block, fewer, sizes, first

    def forward(self, x: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        size = torch.ones_like(x[..., :1]) if self.first else self.sizes.value
        B, L, D = x.shape
        H = attn.num_heads
        query, key, value = attn.qkv(block.norm1(x)).reshape(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
        bias = size.detach().log().transpose(1, 2)[:, None].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(B, 1, L, L))
        x = x + block.ls1(attn.proj(mixed.transpose(1, 2).reshape(B, L, D)))
        x, self.sizes.value = merge(x, size, key.mean(1).detach(), self.fewer)
        return x + block.ls2(block.mlp(block.norm2(x)))


def merge(x: Tensor, size: Tensor, metric: Tensor, fewer: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, D) and their sizes (B, L, 1), `fewer` of them merged into the most alike of the others.

    Every second token, from the class token on, may go; the class token stays and comes first again. At most half go.

    Args:
        metric: (B, L, E), what is compared, by cosine.
    """
    fewer = min(fewer, (x.shape[1] - 1) // 2)
    if not fewer:
        return x, size
    metric = F.normalize(metric, dim=-1)
    likeness = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    likeness[:, 0] = -torch.inf
    best, partner = likeness.max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    going, staying = order[:, :fewer], order[:, fewer:].sort(1).values
    into = partner.gather(1, going)[..., None]

    def combined(values: Tensor) -> Tensor:
        width = values.shape[2]
        odd, even = values[:, ::2], values[:, 1::2]
        gone = odd.gather(1, going[..., None].expand(-1, -1, width))
        even = even.scatter_add(1, into.expand(-1, -1, width), gone)
        return torch.cat((odd.gather(1, staying[..., None].expand(-1, -1, width)), even), 1)

    total = combined(size)
    return combined(x * size) / total, total
