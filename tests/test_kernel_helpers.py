"""The helpers that kernel tests stand on can fail."""

from __future__ import annotations

import pytest
import torch
from kernels import error, poisoned, within_budget


def test_fresh_memory_is_poisoned_only_inside() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        like = torch.zeros(3, dtype=torch.bfloat16)
        fresh = (torch.empty(2, 3), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2, 2), (1, 2)))
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty(3, dtype=torch.int64).eq(2**63 - 1).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_budgets_allow_the_reference_its_error_and_nothing_its_nan() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert error(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)
    reference = exact * (1 + 1e-3)
    assert within_budget(exact * (1 - 1.4e-3), reference, exact)
    assert not within_budget(exact * (1 - 1.6e-3), reference, exact)
    assert within_budget(exact * (1 + 1e-8), exact, exact)
    assert not within_budget(exact * float("nan"), reference, exact)
    with pytest.raises(ValueError, match="shapes differ"):
        within_budget(exact[:1], exact, exact)
