"""Where features meet: strategies, losses, pools, predictions and reports used together, as one would."""

from __future__ import annotations

import pytest
from small import N, one_thread, tiny  # noqa: F401

from smi import Config, SparseModel, WorkPlan
from smi.predict import predict

REBIRTH = Config(strategy="rebirth", division=8, iterations=16, batch_size=1, snapshots=1)


# --- predictions ---


@pytest.mark.parametrize("prune_ratio", [(), (0.3, 0.3)])
def test_rebirth_is_predicted_whatever_the_schedule_of_others(prune_ratio: tuple[float, ...]) -> None:
    config = REBIRTH.replace(prune_at=(4, 8)[: len(prune_ratio)], prune_ratio=prune_ratio)
    found = predict(SparseModel(tiny()), WorkPlan((0,) * 8, 8), config.resolved())
    assert [(p.start, p.kept) for p in found.phases] == [(2 * k, N - 2 * k) for k in range(8)]
