"""Schedules by target: what they leave, what they cost by an independent count, and what `smi schedule` shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import N, one_thread, tiny  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

import smi
from smi import Config, SmiError, SparseModel
from smi.cli import app
from smi.cli_schedule import drawing
from smi.flops import count_flops
from smi.pool import Pool
from smi.schedules import SCHEDULES, phases, scheduled, share_of_flops

EMPTY = Config(prune_at=(), prune_ratio=())
TINY = ["test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]  # 16 patches


def counts(config: Config, num_patches: int) -> list[int]:
    return list(config.schedule(num_patches).values())


def test_the_papers_is_the_published_setting() -> None:
    assert scheduled(EMPTY, "paper", 196) == Config()
    fast = scheduled(EMPTY.replace(iterations=400), "paper", 196)
    assert fast.schedule(196) == {5: 137, 10: 95, 20: 66, 30: 46}


def test_uniform_stops_equally_many_each_time() -> None:
    config = scheduled(EMPTY.replace(iterations=160), "uniform", 100, sparsity=0.8)
    assert config.schedule(100) == {10: 80, 20: 60, 30: 40, 40: 20}


def test_cosine_stops_most_in_the_middle() -> None:
    config = scheduled(EMPTY.replace(iterations=160), "cosine", 100, sparsity=0.8)
    expected = [round(20 + 80 * (1 + math.cos(math.pi * i / 4)) / 2) for i in (1, 2, 3)]
    assert config.schedule(100) == {10: expected[0], 20: expected[1], 30: expected[2], 40: 20}
    assert expected == [88, 60, 32]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_patches", [9, 16, 64, 196, 1369])
def test_the_last_count_is_the_target_exactly(name: str, num_patches: int) -> None:
    for sparsity in (0.12, 0.3, 0.5, 0.77, 0.88):
        config = scheduled(EMPTY, name, num_patches, sparsity=sparsity)
        left = counts(config, num_patches)
        assert left[-1] == math.floor(round(num_patches * (1 - sparsity), 9))
        assert left == sorted(set(left), reverse=True)
        assert Config.from_dict(config.to_dict()) == config
    assert counts(scheduled(EMPTY, name, 196), 196)[-1] == 46


def quadratic(kept: int) -> float:
    return 300.0 * kept + kept**2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("budget", [0.25, 0.4, 0.7, 0.97])
def test_a_budget_is_met_within_one_patch(name: str, budget: float) -> None:
    config = scheduled(EMPTY, name, 196, budget=budget, flops=quadratic)
    share = share_of_flops(config, 196, quadratic)
    last = counts(config, 196)[-1]
    expected = sum((stop - start) * quadratic(kept) for start, stop, kept in phases(config, 196)) / 4000
    assert share == pytest.approx(expected / quadratic(196)) and share <= budget
    if last < 195:
        one_more = scheduled(EMPTY, name, 196, sparsity=1 - (last + 1.5) / 196)
        assert counts(one_more, 196)[-1] == last + 1
        assert share_of_flops(one_more, 196, quadratic) > budget


def counted(model: Any, kept: int) -> int:
    """torch's count for timm's own modules on so many patches of one image, forward and backward to the pixels."""
    patches = torch.zeros(kept, 3, 4, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        tokens = model.patch_embed.proj(patches).flatten(1)[None]
        x = torch.cat((model.cls_token, tokens), 1)
        model.forward_head(model.norm(model.blocks(x))).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_budget_is_met_on_a_model_by_torchs_own_count(name: str) -> None:
    model = tiny(embed_dim=64, depth=3).requires_grad_(False)
    for block in model.blocks:
        block.attn.fused_attn = False  # plain products, which every version of torch can count
    sparse = SparseModel(tiny(embed_dim=64, depth=3), backend="reference")
    config = scheduled(EMPTY, name, N, budget=0.4, flops=lambda kept: count_flops(sparse, kept))
    dense = 4000 * counted(model, N)
    share = sum((stop - start) * counted(model, kept) for start, stop, kept in phases(config, N)) / dense
    # Fused attention is counted with the scores it computes again; that is all the two counts differ by.
    assert share <= 0.4 + 0.01
    one_patch = (counted(model, N) - counted(model, N - 1)) / counted(model, N)
    assert share > 0.4 - 2 * one_patch
    assert share == pytest.approx(share_of_flops(config, N, lambda kept: count_flops(sparse, kept)), abs=0.01)


def test_a_schedule_inverts() -> None:
    config = scheduled(EMPTY.replace(iterations=32, tv2=0.0), "cosine", N, sparsity=0.75)
    result = smi.invert(tiny(), [0, 1], config)
    assert result.keep.shape == (2, 4)
    assert [phase.kept for phase in result.phases] == [kept for _, _, kept in phases(config, N)]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("unknown schedule 'cosin'.*cosine", lambda: scheduled(EMPTY, "cosin", 196)),
        ("strategy 'dense' takes no", lambda: scheduled(EMPTY.replace(strategy="dense"), "paper", 196)),
        ("exclude each other", lambda: scheduled(EMPTY, "paper", 196, sparsity=0.5, budget=0.5, flops=quadratic)),
        ("sparsity is 1.0", lambda: scheduled(EMPTY, "paper", 196, sparsity=1.0)),
        ("budget is 0", lambda: scheduled(EMPTY, "paper", 196, budget=0, flops=quadratic)),
        ("needs flops=", lambda: scheduled(EMPTY, "paper", 196, budget=0.5)),
        ("leaves none of 16", lambda: scheduled(EMPTY, "uniform", 16, sparsity=0.99)),
        ("0.1 is out of reach", lambda: scheduled(EMPTY, "uniform", 196, budget=0.1, flops=quadratic)),
        (r"prune at \[0, 0, 0, 1\] of 10", lambda: scheduled(EMPTY.replace(iterations=10), "paper", 196)),
        ("leaves none", lambda: scheduled(EMPTY, "paper", 2)),
    ],
)
def test_what_cannot_be_is_refused(message: str, make: Callable[[], Config]) -> None:
    with pytest.raises(SmiError, match=message):
        make()


# --- command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments], prog_name="smi")
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_smi_schedule_shows_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["schedule", *TINY, "--iterations", 400, "--budget", 0.4]
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["share_of_flops"] <= 0.4
    spent = sum((phase["stop"] - phase["start"]) * phase["flops"] for phase in told["phases"])
    assert told["share_of_flops"] == pytest.approx(spent / (400 * told["phases"][0]["flops"]))
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and f"{told['share_of_flops']:.1%} of dense" in out
    assert all(f"{phase['start']}-{phase['stop'] - 1}" in out for phase in told["phases"])
    again = out.splitlines()[-1].split()[2:]  # the options it names
    code, out, _ = run(capsys, "schedule", *TINY, *again, "--json")
    assert code == 0 and json.loads(out) == told


def test_the_drawing_is_as_high_as_what_is_kept() -> None:
    config = Config(iterations=60, prune_at=(15, 30), prune_ratio=(0.5, 0.5))
    lines = drawing(config, 16)
    bars = [line.partition("┤")[2] for line in lines[:8]]
    heights = [sum(row[column] == "█" for row in bars) for column in range(60)]
    assert heights == [8] * 15 + [4] * 15 + [2] * 30
    assert lines[0].startswith("16 ") and lines[-1].endswith("60")


def test_an_inversion_follows_the_schedule_and_its_pool_records_it(capsys: Any, tmp_path: Any) -> None:
    arguments = ["invert", *TINY, "--iterations", 40, "-n", 2, "--out", tmp_path / "pool"]
    scheduling = ["--schedule", "uniform", "--sparsity", 0.75, "--ranking", "gradient_input"]
    code, _, err = run(capsys, *arguments, *scheduling)
    assert code == 0, err
    config = Pool(tmp_path / "pool").config
    expected = scheduled(EMPTY.replace(iterations=40), "uniform", 16, sparsity=0.75)
    assert (config.prune_at, config.prune_ratio) == (expected.prune_at, expected.prune_ratio)
    assert config.ranking == "gradient_input"
    code, _, err = run(capsys, *arguments, "--schedule", "cosine", "--sparsity", 0.75)
    assert code == 2 and "another" in err
    code, _, err = run(capsys, *arguments, "--budget", 0.5, "--prune-at", "3")
    assert code == 2 and "--schedule, --sparsity and --budget" in err
