"""Small networks for tests, with weights of a size that leaves no layer without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.models import randomise as randomise

N, CLASSES, PATCH = 16, 5, 4  # of `tiny`
PRUNED = {"iterations": 14, "prune_at": (3, 6, 9), "prune_ratio": (0.3, 0.3, 0.3)}  # 16, 11, 7, 4 patches
UNPRUNED = {"prune_at": (), "prune_ratio": ()}
SEMANTICS = ["strict", "official"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed: int = 7, **options: Any) -> Any:
    """16 x 16 pixels, 16 patches, a class token, 5 classes, unless told otherwise."""
    small = {"img_size": 16, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return randomise(VisionTransformer(**{**small, **options}), seed)


def alive(keep: Tensor) -> Tensor:
    """(B, N) bool, whether each patch is among those kept."""
    return torch.stack([torch.tensor([n in row for n in range(N)]) for row in keep.tolist()])
