"""Images that nobody inverted, real ones, drawn ones or noise, in the form of those that were."""

from __future__ import annotations

import torch
from torch import Tensor

import smi


@torch.no_grad()
def as_inverted(images: Tensor, targets: Tensor, numbers: range, model: smi.SparseModel, iterations: int) -> smi.Result:
    """A batch with all patches kept, and what the teacher says of it.

    Args:
        images: (B, C, H, W) float32, normalised.
        targets: (B,) int64.
        numbers: of the images in their plan.
        iterations: that an inversion would have had.
    """
    patches = model.info.num_patches
    logits, _ = model(images.to(model.device, model.dtype))
    return smi.Result(
        images=images,
        keep=torch.arange(patches).repeat(len(images), 1),
        dropped_at=torch.full((len(images), patches), iterations, dtype=torch.int32),
        targets=targets,
        indices=torch.tensor(numbers),
        logits=logits.float().cpu(),
        losses={},
        history={},
        snapshots=torch.zeros(0, 0, *model.info.input_size, dtype=torch.uint8),
        snapshot_at=[],
    )
