"""The simulation of many runs: under heavy trouble nothing is lost or made twice, and it would show if it were."""

from __future__ import annotations

import pytest

from benchmarks.simulate import Trouble, simulate
from smi.workers import Workers

ROUGH = Trouble(killed=4.0, asleep=4.0, leaves=2.0, slow=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_made_twice(seed: int) -> None:
    found = simulate(30, 120, 120.0, ramp=300.0, trouble=ROUGH, seed=seed)
    assert found["lost"] == 0 and found["counts"]["made twice"] == 0
    assert min(found["counts"][what] for what in ("killed", "asleep", "left")) > 0
    assert 30 < found["counts"]["joined"] <= 30 + found["counts"]["killed"] + found["counts"]["left"]
    left = {name.split(".")[0] for name in found["left_behind"] if not name.endswith(".claim")}
    assert len(left) <= 3  # killed in the last minute, so not known to be dead
    assert 0 < found["wasted_share"] < 0.5 and 0 < found["calls_a_second"]["at work"] < 100


def test_an_undisturbed_run_takes_as_long_as_its_batches() -> None:
    still = Trouble(killed=0.0, asleep=0.0, leaves=0.0, slow=0.0)
    found = simulate(4, 40, 100.0, ramp=0.0, trouble=still)
    assert found["done_after_hours"] * 3600 == pytest.approx(1000, rel=0.25)
    assert found["wasted_share"] == 0 and found["counts"]["joined"] == 4


def test_a_batch_in_two_hands_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "take", lambda self, batch: True)
    monkeypatch.setattr(Workers, "holds", lambda self, batch: True)
    assert simulate(10, 30, 100.0, ramp=0.0)["counts"]["made twice"] > 0
