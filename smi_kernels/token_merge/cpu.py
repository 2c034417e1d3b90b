"""Token merging on a CPU: the reference computes it, on PyTorch's own compiled operators."""

from __future__ import annotations

from torch import Tensor

from smi_kernels import native
from smi_kernels.token_merge import reference
from smi_kernels.token_merge.reference import merge_tokens, merge_tokens_dx

__all__ = ["match_tokens", "merge_tokens", "merge_tokens_dx"]


def match_tokens(key: Tensor, norm: Tensor | None, eps: float, prefix: int, fewer: int) -> Tensor:
    """As `smi_kernels.token_merge.reference.match_tokens`."""
    found: Tensor = native.by_image(reference.match_tokens, (key, norm, eps, prefix, fewer), (0,))
    return found
