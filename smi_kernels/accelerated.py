"""One line in somebody's inversion loop: a timm model whose forward and input gradient run on kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smi_kernels.vit import Memory, Precision, SparseViT


def accelerate(
    model: nn.Module, precision: Precision = "fp32", *, memory: Memory = "fast", batch_invariant: bool = False
) -> Accelerated:
    """A timm ``VisionTransformer`` behind the same call, made for loops that optimise the image and not the weights.

        model = smi_kernels.accelerate(model.eval(), precision="bf16")
        logits = model(images)                            # as before
        logits = model(images, keep=keep, jitter=jitter)  # only these patches

    The weights count as frozen: gradients reach the images alone. If weights change, or buffers such as the embeddings
    of texts, they are folded again at the next call, unless they are written through ``parameter.data`` in place, which
    leaves no trace, or the call is compiled by `torch.compile`: then one ordinary call folds them.

    Args:
        model: in evaluation mode; not modified.
        precision, memory, batch_invariant: see `SparseViT.from_timm`.

    Raises:
        ValueError: a model that the kernels cannot run, with every reason, or one in training mode.
    """
    return Accelerated(model, precision, memory, batch_invariant)


class Accelerated(nn.Module):
    """What `accelerate` returns; parameters, buffers and attributes are those of the model inside.

    Attributes:
        model: the caller's model.
        vit: its folded form.
    """

    def __init__(self, model: nn.Module, precision: Precision, memory: Memory, batch_invariant: bool) -> None:
        super().__init__()
        self.model = model
        self._options: dict[str, Any] = {"memory": memory, "batch_invariant": batch_invariant}
        self._precision = precision
        self._fold()

    def forward(self, x: Tensor, keep: Tensor | None = None, jitter: Tensor | None = None, **options: Any) -> Any:
        """Logits as the model itself gives them, of `keep` alone if given; see `SparseViT`.

        With ``class_attention=True`` also the attention that ranks patches.
        """
        if not torch.compiler.is_compiling() and (self.model.training or self._changed()):
            self._fold()
        return self.vit(x, keep, jitter, **options)

    def restore(self) -> nn.Module:
        """The caller's model, which is and was as it came."""
        return self.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _apply(self, function: Any, recurse: bool = True) -> Accelerated:
        self.vit._apply(function)  # which may refuse, and then the caller's model stays what it is
        super()._apply(function, recurse)
        return self

    def _fold(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode, where dropout may act; call .eval() on it first.")
        self.vit = SparseViT.from_timm(self.model, self._precision, **self._options)
        # Another walk through the modules would cost more than all checks of a call.
        self._members = [
            members
            for module in self.model.modules()
            for members in (module._parameters, module._buffers, module._modules)
        ]
        self._places = [(members, name, value) for members in self._members for name, value in members.items()]
        self._tensors = [value for _, _, value in self._places if isinstance(value, Tensor)]
        self._folded_at = self._state()

    def _changed(self) -> bool:
        """Whether a weight, buffer or module was written to, replaced or moved since the fold."""
        replaced = any(members.get(name) is not value for members, name, value in self._places)
        return replaced or self._state() != self._folded_at

    def _state(self) -> list[Any]:
        # Tensors of inference mode count no versions.
        return [
            *map(len, self._members),
            *((t.data_ptr(), None if t.is_inference() else t._version, t.device, t.dtype) for t in self._tensors),
        ]
