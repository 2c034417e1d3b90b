"""A network in training that is fed some patches of its images."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from torch import Tensor

from smi.adapters.timm import unsupported_reasons
from smi.adapters.timm_slots import GatherSlot
from smi.state import ModelInfo


class TokenFeed:
    """Feeds a Vision Transformer that is being trained only some patches of its images; its weights stay its own.

    Attributes:
        cells: (B, K) int64, fed from now on.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = model.patch_drop
        self._slot = GatherSlot(model.num_prefix_tokens, with_indices=isinstance(model, Eva))
        model.patch_drop = self._slot

    @property
    def cells(self) -> Tensor | None:
        return self._slot.cells

    @cells.setter
    def cells(self, cells: Tensor | None) -> None:
        self._slot.cells = cells

    def remove(self) -> None:
        """The model feeds all patches again."""
        self._model.patch_drop = self._before

    @staticmethod
    def reasons_against(model: Any, info: ModelInfo) -> list[str]:
        """Why `model` cannot be fed the kept patches of images made for `info`; empty if it can."""
        reasons = unsupported_reasons(model)
        if not reasons and tuple(model.patch_embed.grid_size) != info.grid:
            theirs, ours = (f"{rows} x {columns}" for rows, columns in (model.patch_embed.grid_size, info.grid))
            reasons = [f"its patches lie on a grid of {theirs}, the pool's on {ours}"]
        return reasons
