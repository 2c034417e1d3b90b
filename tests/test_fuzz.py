"""Damaged files of every kind, drawn by hypothesis: what tests/fuzz.py does with them is an error of ours or none."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz import TARGETS, alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import one_thread  # noqa: F401

EXAMPLES = 60


def damaged(good: bytes, draw: Any) -> bytes:
    """`good` with a few bytes changed, a stretch cut out or doubled, or cut short; or bytes of no kind at all."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "double", "short", "other", "digits"]))
    place = draw(st.integers(0, len(good)))
    length = draw(st.integers(1, 64))
    if kind == "other":
        return draw(st.binary(max_size=200))
    if kind == "short":
        return good[:place]
    if kind == "cut":
        return good[:place] + good[place + length :]
    if kind == "double":
        return good[: place + length] + good[place:]
    if kind == "digits":  # numbers in text, larger than anything
        return good[:place] + b"9" * length + good[place:]
    changed = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(good) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_an_error_of_ours_or_none(name: str) -> None:
    with alone(name) as (target, check):

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def run(data: st.DataObject) -> None:
            target.read(damaged(target.good, data.draw))
            check()

        target._read(target.good) if name != "quantization" else target.read(target.good)
        run()
