"""Rebirth: several sparse images of one trajectory, against the oracle, on all backends, through pool and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from kernels import BACKENDS
from small import SEMANTICS, N, one_thread, tiny  # noqa: F401
from test_fused_inversion import compare, fused
from typer.testing import CliRunner

import smi
from smi import Config, Inversion, SmiError, SparseModel
from smi.cli import app
from smi.rebirth import taken_at, without

# Where rounding does not grow; 16 patches in threes: five patches an image, one left over.
REBIRTH = Config(strategy="rebirth", division=3, iterations=13, learning_rate=0.05, eps=1e-4, tv2=1e-2, snapshots=4)


def repeated(targets: list[int], times: int = 3) -> list[int]:
    return [target for target in targets for _ in range(times)]


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_parts_are_those_of_the_oracle(semantics: Any) -> None:
    model, config = tiny().double(), REBIRTH.replace(semantics=semantics)
    targets = [0, 3, 1]
    inversion = Inversion(SparseModel(model, backend="reference"), repeated(targets), config)
    noise, offsets = inversion.images.clone(), inversion.offsets
    found = inversion.run()
    info = inversion.model.info
    expected = oracle.invert(model, noise, torch.tensor(targets), offsets, config, info.mean, info.std)
    assert len(expected.detached) == 3
    for part, (images, keep) in enumerate(expected.detached):
        assert torch.equal(found.keep[part::3], keep)
        torch.testing.assert_close(found.images[part::3], images.float(), rtol=0, atol=1e-5)
    assert found.targets.tolist() == repeated(targets) and found.indices.tolist() == list(range(9))
    # No patch belongs to two images of a trajectory, and those that were detached first moved least.
    for trajectory in range(3):
        rows = found.keep[3 * trajectory : 3 * trajectory + 3]
        assert len(rows.unique()) == 15 == 3 * (N // 3)
        for part, row in enumerate(rows):
            updates = found.dropped_at[3 * trajectory + part].clamp_max(taken_at(config, part))
            mine = torch.zeros(N, dtype=torch.bool)
            mine[row] = True
            earlier = torch.zeros(N, dtype=torch.bool)
            earlier[rows[:part].flatten()] = True
            assert (updates[mine] == taken_at(config, part)).all()
            assert (updates[~mine & ~earlier] == taken_at(config, part)).all()
            for before in range(part):
                assert (updates[rows[before]] == 4 * (before + 1)).all()
    assert [phase.kept for phase in found.phases] == [16, 11, 6]


def test_detached_patches_hold_every_bit_of_what_they_were() -> None:
    model = tiny()
    found = smi.invert(model, repeated([2, 4]), REBIRTH)
    size = model.patch_embed.patch_size[0]
    for row in range(6):
        last = found.images[row - row % 3 + 2]
        for cell in found.keep[row].tolist():
            y, x = size * (cell // 4), size * (cell % 4)
            assert torch.equal(found.images[row, :, y : y + size, x : x + size], last[:, y : y + size, x : x + size])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_iterations_give_the_same_parts(backend: str) -> None:
    model = tiny().double()
    short = REBIRTH.replace(iterations=5, division=2) if backend == "triton" else REBIRTH
    targets = repeated([0, 3], short.division)
    runs = [Inversion(network, targets, short) for network in (fused(model, backend), SparseModel(model, backend="reference"))]  # fmt: skip  # noqa: E501
    assert [run.fused for run in runs] == [True, False]
    compare(*(run.run() for run in runs))


def test_a_trajectory_does_not_depend_on_its_batch() -> None:
    model = tiny().double()
    every = Inversion(model, repeated([0, 3, 1]), REBIRTH, backend="reference").run()
    alone = Inversion(model, repeated([3]), REBIRTH, indices=[3, 4, 5], backend="reference").run()
    assert torch.equal(alone.keep, every.keep[3:6])
    torch.testing.assert_close(alone.images, every.images[3:6], rtol=0, atol=1e-6)


def test_what_is_left_keeps_its_order() -> None:
    keep = torch.tensor([[1, 4, 5, 9], [0, 4, 5, 7]])
    taken = torch.tensor([[4, 9], [0, 5]])
    assert without(keep, taken).tolist() == [[1, 5], [4, 7]]
    assert without(keep, keep).shape == (2, 0)


# --- through the command line ---


def test_a_pool_of_rebirth_images_counts_images_and_shares_cost(tmp_path: Path) -> None:
    short = ["--strategy", "rebirth", "--division", "4", "--iterations", "12", "--device", "cpu"]
    args = ["invert", "embedded:teacher", *short, "-n", "16", "-b", "2", "--out", str(tmp_path / "pool")]
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 0, made.output
    pool = smi.Pool(tmp_path / "pool")
    assert len(pool) == 16 and pool.plan.batch_size == 8
    assert pool.plan.targets == tuple(repeated([0, 1, 2, 3], 4))
    data = smi.SyntheticDataset(pool)
    assert [int(data[i][1].sum()) for i in range(16)] == 16 * [16]

    # One trajectory costs 3 iterations of each number of patches and gives four images.
    summary = json.loads(CliRunner().invoke(app, [*args, "--json"]).output.splitlines()[-1])["pool"]
    one = sum(3 * smi.flops.count_flops(SparseModel(smi.load_model("embedded:teacher")), k) for k in (64, 48, 32, 16))  # type: ignore[attr-defined]
    assert summary["images"] == 16 and summary["flops"] == 4 * one
    planned = CliRunner().invoke(app, ["plan", "embedded:teacher", *short, "-n", "16", "-b", "2", "--json"])
    plan = json.loads(planned.output.splitlines()[-1])
    assert plan["flops"] == 4 * one and (plan["images"], plan["batches"]) == (16, 2)
    assert summary["tokens_ratio"] == pytest.approx((65 + 49 + 33 + 17) / (4 * 4 * 65))
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "pool")])
    assert shown.exit_code == 0, shown.output


# --- bad input ---


def test_what_rebirth_cannot_do_is_said() -> None:
    model = tiny()
    for changes, complaint in (
        ({"division": 1}, "division is 1; expected at least 2"),
        ({"iterations": 5}, "iterations is 5 and division 3; .* at least 6 iterations"),
        ({"best": True}, "rebirth has several"),
        ({"result_mask": "reranked"}, "use 'carried'"),
    ):
        with pytest.raises(SmiError, match=complaint):
            REBIRTH.replace(**changes)
    with pytest.raises(SmiError, match="division is 20, but the model has 16 patches"):
        Inversion(model, repeated([0], 20), REBIRTH.replace(division=20, iterations=40))
    with pytest.raises(SmiError, match="4 targets; rebirth makes 3 images"):
        Inversion(model, [0, 0, 0, 1], REBIRTH)
    with pytest.raises(SmiError, match="images 3 to 5 come out of one trajectory and want different targets"):
        Inversion(model, [0, 0, 0, 1, 1, 2], REBIRTH)
    with pytest.raises(SmiError, match=r"image numbers .* are not those of one trajectory"):
        Inversion(model, [0, 0, 0], REBIRTH, indices=[1, 2, 3])
    with pytest.raises(SmiError, match="10 images were asked for, and every trajectory makes 3; ask for 12"):
        smi.WorkPlan.balanced(range(5), 10, 2, 5, repeat=3)
    early = Inversion(model, repeated([0]), REBIRTH)
    early.step()
    with pytest.raises(SmiError, match=r"after 1 iterations 0 of 3 images .* are detached; .* 8 at least"):
        early.result()
