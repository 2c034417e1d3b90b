"""The classifier of models of images and text: scaled cosine similarity to frozen embeddings of the classes' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineClassifier(nn.Module):
    """``logits = logit_scale * x / |x| . t / |t| + bias`` for each row t of `embeddings`.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, figure 3; with a
    bias Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1.

    Args:
        embeddings: (classes, E) floating, not necessarily of length 1.
        logit_scale: the factor itself, not its logarithm.
        bias: added to every logit.

    Attributes:
        weight: (classes, E), the embeddings of length `logit_scale`.
        bias: (classes,).

    Raises:
        ValueError: embeddings of another shape or dtype, not finite or of length 0; a scale or bias not finite.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, embeddings: Tensor, logit_scale: float = 100.0, bias: float = 0.0) -> None:
        super().__init__()
        if embeddings.ndim != 2 or not embeddings.is_floating_point() or not embeddings.numel():
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)} and dtype {embeddings.dtype}; expected one floating "
                f"row for each class, (classes, E)."
            )
        lengths = embeddings.detach().double().norm(dim=1)
        usable = torch.isfinite(lengths) & (lengths > 0)
        if not usable.all():
            first = int((~usable).nonzero()[0])
            raise ValueError(
                f"row {first} of the embeddings has length {float(lengths[first])}; expected a finite one above 0."
            )
        scalars = torch.tensor([logit_scale, bias], dtype=torch.float64)
        if not torch.isfinite(scalars).all() or not logit_scale > 0:
            raise ValueError(
                f"logit_scale is {logit_scale} and bias {bias}; expected a finite factor above 0 and a finite bias. "
                f"If a checkpoint holds the scale's logarithm, as CLIP's do, give its exp()."
            )
        unit = embeddings.detach().double() / lengths[:, None]
        self.register_buffer("weight", (logit_scale * unit).to(embeddings.dtype))
        self.register_buffer("bias", torch.full_like(self.weight[:, 0], bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, E) to (B, classes)."""
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)
