"""Configs: schedules by the floor rule, what is refused and in which words, YAML there and back, presets."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smi
from smi import PRESETS, Config, SmiError

SEMANTICS = ["strict", "official"]
percents = st.lists(st.integers(1, 99), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), percents, st.lists(st.integers(2, 40), min_size=6, max_size=6))
def test_schedules_follow_the_floor_rule(count: int, ratios: list[int], gaps: list[int]) -> None:
    at = tuple(itertools.accumulate(gaps[: len(ratios)]))
    config = Config(prune_at=at, prune_ratio=tuple(r / 100 for r in ratios))
    kept, expected = count, {}
    for t, ratio in zip(at, ratios, strict=True):
        kept = kept * (100 - ratio) // 100
        if kept < 1:
            with pytest.raises(SmiError, match=f"at iteration {t} leaves none"):
                config.schedule(count)
            return
        expected[t] = kept
    assert config.schedule(count) == expected
    assert config.replace(strategy="random").schedule(count) == expected
    assert config.replace(strategy="dense").schedule(count) == {}
    assert Config.from_dict(config.to_dict()) == config


def test_published_schedule() -> None:
    assert list(Config().schedule(196).values()) == [137, 95, 66, 46]
    assert list(PRESETS["demo"].schedule(64).values()) == [44, 30, 21, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_at": (5, 6), "prune_ratio": (0.3, 0.3)}, "adjacent iterations 5 and 6"),
        ({"prune_at": (5, 5), "prune_ratio": (0.3, 0.3)}, "5 follows 5. Sort it"),
        ({"prune_at": (9, 5), "prune_ratio": (0.3, 0.3)}, "5 follows 9"),
        ({"prune_at": (0,), "prune_ratio": (0.3,)}, "starts with 0"),
        ({"prune_at": (-3,), "prune_ratio": (0.3,)}, "starts with -3"),
        ({"prune_at": (5,)}, "prune_at has 1 entries and prune_ratio has 4"),
        ({"prune_at": (5,), "prune_ratio": (1.0,)}, "prune_ratio contains 1.0; expected shares strictly between"),
        ({"prune_at": (5,), "prune_ratio": (0.0,)}, "prune_ratio contains 0.0"),
        ({"prune_at": (5,), "prune_ratio": (math.nan,)}, "prune_ratio contains nan"),
        ({"iterations": 300}, "prune_at contains 300, but iterations is 300. Raise iterations above 300"),
        ({"iterations": 0}, "iterations is 0; expected at least 1"),
        ({"iterations": 10**7 + 1}, "iterations is 10000001; expected at most 10,000,000"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tv2": -1.0}, "tv2 is -1.0; expected a finite number"),
        ({"tv1": math.nan}, "tv1 is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"lr_schedule": "cosin"}, "lr_schedule is 'cosin'. Did you mean 'cosine'?"),
        ({"warmup": 4000}, "warmup is 4000; expected fewer than the 4000 iterations"),
        ({"warmup": -1}, "warmup is -1; expected at least 0"),
        ({"beta1": 1.0}, "beta1 is 1.0; expected 0 <= beta1 < 1"),
        ({"strategy": "sparce"}, "strategy is 'sparce'. Did you mean 'sparse'"),
        ({"semantics": "exact"}, "semantics is 'exact'. Choose one of: strict, official"),
        ({"iterations": 10.5}, "iterations is 10.5; expected int"),
        ({"iterations": True}, "iterations is True"),
        ({"flip": 1}, "flip is 1; expected bool"),
        ({"prune_at": "50"}, "prune_at is '50'; expected a list"),
        ({"tv2": "much"}, "tv2 is 'much'; expected a number"),
        ({"itterations": 5}, "unknown config option 'itterations'. Did you mean 'iterations'"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SmiError) as error:
        Config().replace(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_presets_round_trip_as_yaml(name: str, semantics: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for config in (smi.preset(name), smi.preset(name).replace(semantics=semantics).resolved()):
        config.save(path)
        assert Config.load(path) == config == config.replace() == Config.from_dict(config.to_dict())
        assert config.resolved() == config.resolved().resolved()


def test_yaml_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: fast\ntv2: 1e-3\nsemantics: official\nprune_at: [10, 20]\nprune_ratio: [0.5, 0.5]\n")
    assert Config.load(path) == smi.preset("fast").replace(
        tv2=1e-3, semantics="official", prune_at=(10, 20), prune_ratio=(0.5, 0.5)
    )
    for text, message in {
        "[1, 2]": "holds list; expected option: value",
        "a: [": "not valid YAML",
        "preset: fastest": "unknown preset 'fastest'. Did you mean 'fast'",
        "tv3: 1": "unknown config option 'tv3'",
    }.items():
        path.write_text(text)
        with pytest.raises(SmiError) as error:
            Config.load(path)
        assert message in str(error.value)
    with pytest.raises(SmiError, match="cannot read the config"):
        Config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["[fast]", "5", "null"])
def test_presets_are_named_in_words(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"preset: {name}\n")
    with pytest.raises(SmiError, match="unknown preset"):
        Config.load(tmp_path / "config.yaml")


def test_semantics_resolve() -> None:
    followed = ("jitter", "augment_per", "stopped", "norm", "result_mask")

    def values(config: Config) -> list[Any]:
        return [getattr(config.resolved(), name) for name in followed]

    assert values(Config()) == ["patch", "image", "frozen", "image", "carried"]
    assert values(Config(semantics="official")) == ["pixel", "batch", "evolve", "batch", "reranked"]
    assert values(Config(semantics="official", stopped="frozen"))[2] == "frozen"
    assert smi.preset("paper-transfer").batch_size == 100
