"""What an inversion is asked for, before it begins: whether it fits the model and makes sense."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config


def check_fit(model: SparseModel, config: Config) -> None:
    """Raises `SmiError` if `model` cannot be inverted as `config` says."""
    if model.precision != config.precision:
        raise SmiError(
            f"the model runs in {model.precision}, the config asks for {config.precision}; give both the same."
        )
    if config.model_ranking not in ("auto", model.info.ranking):
        raise SmiError(
            f"the model ranks by {model.info.ranking}, the config asks for {config.ranking}; give both the same."
        )
    if model.merge_to != config.model_merge_to:
        raise SmiError(
            f"the model was made with merge_to={model.merge_to}, the config asks for {config.model_merge_to} (strategy "
            f"{config.strategy!r}); give both the same."
        )
    if config.cross_entropy and not model.has_head:
        raise SmiError(
            f"{model.info.name} has no classification head for cross-entropy to the targets; create it with "
            f"num_classes= or a tag that has one, or set cross_entropy to 0 and give objectives of your own."
        )
    config.schedule(model.info.num_patches)


def check_indices(indices: Sequence[int]) -> list[int]:
    """Image numbers as integers. Raises `SmiError` if they are none."""
    try:
        numbers = [operator.index(number) for number in indices]
    except TypeError:
        raise SmiError(f"image numbers are {list(indices)}; expected integers.") from None
    if min(numbers, default=0) < 0:
        raise SmiError(f"image number {min(numbers)} does not exist; expected numbers from 0.")
    return numbers


def check_targets(targets: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """(B,) int64 classes or (B, classes) probabilities. Raises `SmiError` if they are neither."""
    try:
        tensor = torch.as_tensor(targets)
    except (TypeError, ValueError) as error:
        raise SmiError(f"targets are not numbers: {error}; expected class indices or probabilities.") from None
    if tensor.ndim == 2 and len(tensor) and tensor.is_floating_point():
        if tensor.shape[1] != num_classes:
            raise SmiError(f"soft targets have {tensor.shape[1]} columns; expected {num_classes}, one for each class.")
        if not torch.isfinite(tensor).all() or (tensor < 0).any() or not tensor.sum(1).sub(1).abs().lt(1e-3).all():
            raise SmiError("soft targets are not probabilities; expected rows of numbers >= 0 that sum to 1.")
        return tensor
    if (
        tensor.ndim != 1
        or not len(tensor)
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        raise SmiError(
            f"targets have shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected class indices (B,) or "
            f"probabilities (B, {num_classes})."
        )
    wrong = tensor[(tensor < 0) | (tensor >= num_classes)]
    if len(wrong):
        raise SmiError(f"class {wrong[0].item()} does not exist; the model has classes 0 to {num_classes - 1}.")
    return tensor.long()
