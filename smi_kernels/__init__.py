"""Tensors in, tensors out: the operations that sparse inversion of a frozen Vision Transformer is made of.

Every operation is a public function whose meaning is fixed by a plain PyTorch reference; on a GPU Triton kernels
compute it. `accelerate` puts a whole timm model on them. Importing this package touches neither torch nor CUDA nor
Triton; the first use of an operation imports what it needs. ``python -m smi_kernels.backends`` tells which
implementations are live, and every reason why one is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smi_kernels.accelerated import accelerate
    from smi_kernels.api import (
        adam_clamp_,
        attention_row,
        flop_formulas,
        l2_norm,
        match_tokens,
        merge_tokens,
        select_tokens,
        tv_l1,
        tv_l2,
    )
    from smi_kernels.attention.reference import received_attention
    from smi_kernels.backends import use_backend
    from smi_kernels.cosine import CosineClassifier
    from smi_kernels.descent import PixelDescent
    from smi_kernels.folding import unsupported_reasons
    from smi_kernels.marks import spans
    from smi_kernels.patch_embed.reference import augment, embed_patches, gather_patches, map_cells
    from smi_kernels.pixel_update.reference import patch_mask
    from smi_kernels.profiling import Operation, ceilings, proton, record_operations, timed
    from smi_kernels.token_merge.reference import merge_counts
    from smi_kernels.vit import SparseViT

_HOME = {
    "CosineClassifier": "cosine",
    "Operation": "profiling",
    "PixelDescent": "descent",
    "SparseViT": "vit",
    "accelerate": "accelerated",
    "adam_clamp_": "api",
    "attention_row": "api",
    "augment": "patch_embed.reference",
    "ceilings": "profiling",
    "embed_patches": "patch_embed.reference",
    "flop_formulas": "api",
    "gather_patches": "patch_embed.reference",
    "l2_norm": "api",
    "map_cells": "patch_embed.reference",
    "match_tokens": "api",
    "merge_counts": "token_merge.reference",
    "merge_tokens": "api",
    "patch_mask": "pixel_update.reference",
    "proton": "profiling",
    "received_attention": "attention.reference",
    "record_operations": "profiling",
    "select_tokens": "api",
    "spans": "marks",
    "timed": "profiling",
    "tv_l1": "api",
    "tv_l2": "api",
    "unsupported_reasons": "folding",
    "use_backend": "backends",
}

__all__ = [
    "CosineClassifier",
    "Operation",
    "PixelDescent",
    "SparseViT",
    "accelerate",
    "adam_clamp_",
    "attention_row",
    "augment",
    "ceilings",
    "embed_patches",
    "flop_formulas",
    "gather_patches",
    "l2_norm",
    "map_cells",
    "match_tokens",
    "merge_counts",
    "merge_tokens",
    "patch_mask",
    "proton",
    "received_attention",
    "record_operations",
    "select_tokens",
    "spans",
    "timed",
    "tv_l1",
    "tv_l2",
    "unsupported_reasons",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smi_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"smi_kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
