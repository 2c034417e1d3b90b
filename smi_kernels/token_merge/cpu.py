"""Token merging on a CPU: the reference computes it, on PyTorch's own compiled operators."""

from __future__ import annotations

from smi_kernels.token_merge.reference import match_tokens, merge_tokens, merge_tokens_dx

__all__ = ["match_tokens", "merge_tokens", "merge_tokens_dx"]
