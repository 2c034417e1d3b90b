"""Token selection on CUDA operators; signatures and meanings as in ``reference.py``. Ranking is a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels import native, native_cuda
from smi_kernels.token_select.kernels import rank_tokens

__all__ = ["rank_tokens", "select_tokens"]


def select_tokens(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """As `smi_kernels.select_tokens`."""
    B, K = keep.shape
    native.expect(scores=(scores, (B, K)))
    native.expect_dtype(torch.int64, keep=keep)
    if not 1 <= count <= K:
        raise ValueError(f"count is {count}; expected 1 to {K}, the number of tokens still kept.")
    if K >= 2**31:
        raise ValueError(f"there are {K} tokens; expected fewer than 2^31.")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).contiguous()  # of the same order
    chosen = keep.new_empty(B, count)
    native_cuda.call("select_tokens", scores.dtype, scores, keep.contiguous(), chosen, B, K, count)
    return chosen
