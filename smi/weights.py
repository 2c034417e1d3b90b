"""What weights are: their hash, and whether they are numbers at all."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from smi.errors import SmiError


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the state dict, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = value.numel() - int(torch.isfinite(value).sum())
            raise SmiError(
                f"the weights are not finite: {bad} of {value.numel()} values of {name!r} are NaN or infinite. "
                f"Use another checkpoint."
            )
