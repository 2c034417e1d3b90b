"""Tensors in, tensors out: the operations that sparse inversion of a frozen Vision Transformer is made of.

Every operation is a public function whose meaning is fixed by a plain PyTorch reference. Importing this package touches
neither torch nor CUDA nor Triton; the first use of an operation imports what it needs.
``python -m smi_kernels.backends`` tells which implementations are live, and every reason why one is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smi_kernels.attention.reference import attention_row, received_attention
    from smi_kernels.image_prior.reference import l2_norm, tv_l1, tv_l2
    from smi_kernels.patch_embed.reference import augment, embed_patches, gather_patches, map_cells
    from smi_kernels.pixel_update.reference import adam_clamp_, patch_mask
    from smi_kernels.token_select.reference import select_tokens

_HOME = {
    "adam_clamp_": "pixel_update",
    "attention_row": "attention",
    "augment": "patch_embed",
    "embed_patches": "patch_embed",
    "gather_patches": "patch_embed",
    "l2_norm": "image_prior",
    "map_cells": "patch_embed",
    "patch_mask": "pixel_update",
    "received_attention": "attention",
    "select_tokens": "token_select",
    "tv_l1": "image_prior",
    "tv_l2": "image_prior",
}

__all__ = [
    "adam_clamp_",
    "attention_row",
    "augment",
    "embed_patches",
    "gather_patches",
    "l2_norm",
    "map_cells",
    "patch_mask",
    "received_attention",
    "select_tokens",
    "tv_l1",
    "tv_l2",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smi_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"smi_kernels.{_HOME[name]}.reference"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
