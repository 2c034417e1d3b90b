"""Small networks for tests, with weights of a size that leaves no layer without effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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


def randomise(model: nn.Module, seed: int = 7) -> Any:
    """In place of fresh weights, which have zeros, layer scales of 1e-5 and attention too even to rank by."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):
                noise *= 1.5 / math.sqrt(parameter[0].numel())
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.3
            parameter.copy_(noise)
    return model.eval()


def tiny(seed: int = 7, **options: Any) -> Any:
    """16 x 16 pixels, 16 patches, a class token, 5 classes, unless told otherwise."""
    small = {"img_size": 16, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return randomise(VisionTransformer(**{**small, **options}), seed)


def alive(keep: Tensor) -> Tensor:
    """(B, N) bool, whether each patch is among those kept."""
    return torch.stack([torch.tensor([n in row for n in range(N)]) for row in keep.tolist()])
