"""The call convention of the published SMI loop, so that such a loop runs on fused kernels unmodified.

Hu et al.'s loop asks its teacher for ``model(images, current_abs_index, next_relative_index)`` and expects logits, the
attention maps of all blocks, and the tokens that were fed. It reads of the maps one row: of the last block, averaged
over heads, of the class token. That row is what kernels give; the rest is computed only for a loop that looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smi.adapters.timm import SparseModel
from smi.errors import SmiError


class PublishedTeacher(nn.Module):
    """A timm ViT with one prefix token, the class token, behind the published call.

    Args:
        model: in any mode; not modified. Its weights count as frozen.
        options: of `SparseModel`: ``device``, ``precision``, ``backend``.

    Raises:
        SmiError: an unsupported model, or one with other prefix tokens, for which the convention has no numbers.

    Example::

        teacher = PublishedTeacher(timm.create_model("deit_base_patch16_224", pretrained=True))
        logits, attention, tokens = teacher(images, tokens, chosen)
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self._sparse = SparseModel(model, ranking="class_attention", **options)
        prefix = self._sparse.info.num_prefix_tokens
        if prefix != 1:
            raise SmiError(f"the published call numbers one class token, this model has {prefix} prefix tokens.")

    def forward(
        self, images: Tensor, current_abs_index: Tensor, next_relative_index: Tensor
    ) -> tuple[Tensor, AttentionMaps, Tensor]:
        """Logits of the fed tokens, their attention, and which they are.

        Args:
            images: (B, C, H, W), normalised, augmented as the loop likes.
            current_abs_index: (B, T) int64, tokens before this call, class token first: 0, then 1 + cell.
            next_relative_index: (B, T') int64, places in `current_abs_index` of the tokens to go on with; of as many
                columns as that, it is not looked at.

        Returns:
            logits (B, classes), differentiable in `images`; the maps; and (B, T') the tokens fed.

        Raises:
            SmiError: indices of another shape, or that leave the class token out or leave the grid.
        """
        tokens = current_abs_index
        if tokens.ndim != 2 or next_relative_index.ndim != 2 or len(tokens) != len(images):
            raise SmiError(
                f"token indices have shapes {tuple(tokens.shape)} and {tuple(next_relative_index.shape)}; expected "
                f"({len(images)}, tokens)."
            )
        if next_relative_index.shape[1] != tokens.shape[1]:
            tokens = tokens.gather(1, next_relative_index)
        cells = tokens[:, 1:] - 1
        if not cells.is_cuda:  # on a GPU a look would wait for it
            self._check(tokens, cells)
        logits, row = self._sparse.feed(images, cells, scores=True)
        assert row is not None
        return logits, AttentionMaps(self._sparse, images, cells, row.detach()), tokens

    def _check(self, tokens: Tensor, cells: Tensor) -> None:
        if (tokens[:, 0] != 0).any():
            raise SmiError("the first token is not the class token; index 0 must lead every row.")
        wrong = cells[(cells < 0) | (cells >= self._sparse.info.num_patches)]
        if len(wrong):
            raise SmiError(
                f"token {int(wrong[0]) + 1} does not exist; the model has patches 1 to {self._sparse.info.num_patches}."
            )


class AttentionMaps(Sequence[Any]):
    """One map for each block; the last knows its class row, all else is computed at the first look, once."""

    def __init__(self, model: SparseModel, images: Tensor, cells: Tensor, row: Tensor) -> None:
        self._model, self._images, self._cells, self._row = model, images, cells, row
        self._full: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return self._model.depth

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} attention maps")
        return LastMap(self) if place % len(self) == len(self) - 1 else self.full()[place]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def full(self) -> tuple[Tensor, ...]:
        """All maps: (B, heads, tokens, tokens) each, differentiable in the images."""
        if self._full is None:
            self._full = self._model.attention_maps(self._images, self._cells)
        return self._full

    @property
    def class_row(self) -> Tensor:
        """(B, tokens): the last block's, of the class token, mean over heads; the class token's own share first."""
        return torch.cat([1 - self._row.sum(1, keepdim=True), self._row], 1)


class _Late:
    """A tensor for whoever treats it as one, computed only then."""

    def __init__(self, maps: AttentionMaps) -> None:
        self._maps = maps

    def tensor(self) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, place: Any) -> Tensor:
        return self.tensor()[place]

    def __len__(self) -> int:
        return len(self.tensor())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))


def _operator(name: str) -> Any:
    def apply(self: _Late, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*_computed(others))

    return apply


_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Late, f"__{_name}__", _operator(f"__{_name}__"))  # Python looks for these in the class alone


def _computed(value: Any) -> Any:
    """`value` with tensors for all that is late in it."""
    if isinstance(value, _Late):
        return value.tensor()
    if isinstance(value, dict):
        return {name: _computed(one) for name, one in value.items()}
    return type(value)(map(_computed, value)) if type(value) in (tuple, list) else value


class LastMap(_Late):
    """The last block's map (B, heads, tokens, tokens), of which the mean over heads need not be computed as a whole."""

    def tensor(self) -> Tensor:
        return self._maps.full()[-1]

    def mean(self, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs["dim"] if "dim" in kwargs else args[0] if args else None
        alone = len(args) + len(kwargs) == 1
        return MeanMap(self._maps) if dim in (1, -3) and alone else self.tensor().mean(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mean and args and isinstance(args[0], LastMap):
            return args[0].mean(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class MeanMap(_Late):
    """The last map averaged over heads (B, tokens, tokens), of which only the first row is known as yet."""

    def tensor(self) -> Tensor:
        return self._maps.full()[-1].mean(1)

    def __getitem__(self, place: Any) -> Tensor:
        first_row = isinstance(place, tuple) and len(place) >= 2 and type(place[1]) is int and place[1] == 0
        if first_row and isinstance(place[0], slice) and place[0] == slice(None):
            return self._maps.class_row[(slice(None), *place[2:])]
        return self.tensor()[place]
