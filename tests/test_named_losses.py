"""Losses named in a line of text, and pools that remember which losses they were made with."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CLASSES, one_thread, randomise, tiny  # noqa: F401
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from typer.testing import CliRunner

import smi
from smi import Objective, SmiError, losses
from smi.cli import app
from smi.named_losses import IN_PYTHON, NAMED, make_losses, parse_loss, usage
from smi.pool import Pool
from smi.pool_tools import merge
from smi.run import run
from smi.state import WorkPlan

CONFIG = smi.Config(iterations=3, prune_at=(2,), prune_ratio=(0.5,), batch_size=2, snapshots=0)
PLAN = WorkPlan((0, 1, 2, 3), 2)


@pytest.fixture(scope="module")
def model() -> smi.SparseModel:
    return smi.SparseModel(tiny(), name="tiny")


def resnet(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return randomise(ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(4, 4, 4, 4), num_classes=CLASSES), seed)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """What every name of a second network stands for."""
    network = resnet()
    asked: list[dict[str, Any]] = []

    def load(name: str, **given: Any) -> nn.Module:
        asked.append({"name": name, **given})
        return network

    monkeypatch.setattr("smi.models.load_model", load)
    network.asked = asked
    return network


def refused(text: str) -> str:
    with pytest.raises(SmiError) as error:
        parse_loss(text)
    return str(error.value)


def test_every_loss_is_listed_and_every_setting_is_an_argument() -> None:
    assert {*NAMED, *IN_PYTHON} == set(losses.__all__)
    for name, loss in NAMED.items():
        arguments = set(inspect.signature(getattr(losses, name)).parameters)
        assert set(loss.settings) - {"model", "checkpoint", "num_classes"} <= arguments
        parsed = parse_loss(usage(name))
        assert (parsed.name, set(parsed.settings)) == (name, {*loss.settings, "weight"})


def test_values_are_read_as_they_are_written() -> None:
    spec = parse_loss(" patch-similarity-entropy: blocks=0+2 , bandwidth=.2,weight=-1e-2")
    assert (spec.name, spec.settings) == (
        "patch_similarity_entropy",
        {"blocks": (0, 2), "bandwidth": 0.2, "weight": -0.01},
    )
    spec = parse_loss("batch_norm_statistics:model=resnet18.a1_in1k,size=64x48,per-image=false")
    assert spec.settings == {"model": "resnet18.a1_in1k", "size": (64, 48), "per_image": False}
    assert parse_loss("margin").settings == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("margni", "unknown loss 'margni'. Did you mean 'margin'?"),
        ("bce", "cannot be named in a line (binary cross-entropy of every class apart; takes labels); use"),
        ("margin:5", "'5' is not KEY=VALUE; write e.g. margin:weight=0.1."),
        ("margin:confidnce=5", "margin has no setting 'confidnce'. Did you mean 'confidence'?"),
        ("margin:confidence=high", "confidence is 'high'; expected e.g. confidence=5."),
        ("margin:weight=1,weight=2", "weight is given twice"),
        ("adversarial", "adversarial looks through a second network; name it with model=NAME."),
        ("adversarial:model=x,size=64", "size is '64'; expected e.g. size=224x224."),
        ("batch_norm_statistics:model=x,per_image=1", "per_image is '1'; expected e.g. per_image=true."),
        ("adversarial:model=embedded:judge", "could no longer be believed; name another network."),
    ],
)
def test_what_cannot_be_read_is_said(text: str, says: str) -> None:
    found = refused(text)
    assert found.startswith(f"--loss {text!r}: ") and says in found


@pytest.mark.parametrize("name", NAMED)
def test_a_named_loss_is_the_one_made_in_python(name: str, model: smi.SparseModel, second: Any) -> None:
    texts = {
        "margin": ("margin:confidence=2,weight=0.5", lambda: losses.margin(2.0, weight=0.5)),
        "low_pass": ("low_pass:cutoff=0.2", lambda: losses.low_pass(0.2)),
        "patch_similarity_entropy": (
            "patch_similarity_entropy:blocks=1,bandwidth=0.2",
            lambda: losses.patch_similarity_entropy(model.original, blocks=[1], bandwidth=0.2),
        ),
        "head_similarity": ("head_similarity:weight=2", lambda: losses.head_similarity(model.original, weight=2.0)),
        "batch_norm_statistics": (
            "batch_norm_statistics:model=r,size=32x32,checkpoint=c",
            lambda: losses.batch_norm_statistics(second, model.info, size=(32, 32)),
        ),
        "adversarial": (
            "adversarial:model=r,size=32x32,num_classes=5",
            lambda: losses.adversarial(second, model.info, size=(32, 32)),
        ),
    }
    text, make = texts[name]
    (named,), direct = make_losses([parse_loss(text)], model), make()
    assert named.identity == direct.identity and named.identity.startswith(f"{direct.weight!r} * {name}(")
    mine, theirs = (smi.invert(model, [0, 1], CONFIG, objectives=[term]) for term in (named, direct))
    assert torch.equal(mine.images, theirs.images)
    assert not torch.equal(mine.images, smi.invert(model, [0, 1], CONFIG).images)
    if NAMED[name].needs_network:
        extra = {"checkpoint": "c"} if "checkpoint" in text else {"num_classes": 5}
        assert second.asked == [{"name": "r", **extra}]


def test_descriptions_differ_where_losses_do(model: smi.SparseModel) -> None:
    info, entropy = model.info, losses.patch_similarity_entropy
    terms = [
        losses.margin(),
        losses.margin(weight=2.0),
        losses.margin(1.0),
        losses.low_pass(0.1),
        losses.low_pass(0.2),
        losses.bce([0.0] * CLASSES),
        losses.bce([1.0] * CLASSES),
        losses.embedding([1.0, 2.0]),
        losses.embedding([1.0, 2.0], distance="l2"),
        losses.embedding([1.0, 2.0], feature="norm"),
        losses.embedding([2.0, 1.0]),
        entropy(model.original),
        entropy(model.original, blocks=[0]),
        entropy(model.original, bandwidth=0.2),
        losses.head_similarity(model.original),
        losses.head_similarity(model.original, blocks=[0]),
        losses.batch_norm_statistics(resnet(1), info),
        losses.batch_norm_statistics(resnet(2), info),
        losses.batch_norm_statistics(resnet(1), info, per_image=True),
        losses.batch_norm_statistics(resnet(1), info, size=(32, 32)),
        losses.batch_norm_statistics(resnet(1), info, mean=(0.1, 0.2, 0.3)),
        losses.adversarial(resnet(1), info, size=(32, 32)),
        losses.adversarial(resnet(1), info, size=(32, 32), std=(0.1, 0.2, 0.3)),
    ]
    assert len({term.identity for term in terms}) == len(terms)
    assert losses.bce([0.0] * CLASSES).identity == losses.bce(torch.zeros(CLASSES)).identity
    assert losses.batch_norm_statistics(resnet(1), info).identity == terms[16].identity


def brightness(context: smi.Context) -> Tensor:
    return context.images.mean((1, 2, 3))


def other_brightness(context: smi.Context) -> Tensor:
    return -context.images.mean((1, 2, 3))


def test_a_pool_remembers_its_losses(model: smi.SparseModel, tmp_path: Path) -> None:
    terms = [losses.margin(2.0, weight=0.5), Objective(brightness, 2.0)]
    run(model, PLAN, CONFIG, tmp_path, objectives=terms, shard=(0, 2))
    assert Pool(tmp_path).objectives == (
        "0.5 * margin(confidence=2.0)",
        "2.0 * brightness (known by its name alone)",
    )
    for others in ([], [losses.margin(2.0, weight=0.4), terms[1]], terms[::-1], [terms[0], Objective(brightness)]):
        for how in ({}, {"join": True}):
            with pytest.raises(SmiError, match=r"was made with the losses 0\.5 \* margin") as error:
                run(model, PLAN, CONFIG, tmp_path, objectives=others, **how)
            assert "give the same losses in the same order" in str(error.value)
    assert run(model, PLAN, CONFIG, tmp_path, objectives=terms).batches_done == 1
    run(model, PLAN, CONFIG, tmp_path, objectives=[losses.low_pass()], overwrite=True)
    assert Pool(tmp_path).objectives == ("1.0 * low_pass(cutoff=0.25)",)


def test_a_function_is_known_by_its_name_or_by_what_it_is_said_to_be(model: smi.SparseModel, tmp_path: Path) -> None:
    run(model, PLAN, CONFIG, tmp_path / "a", objectives=[Objective(brightness)], shard=(0, 2))
    same_name = Objective(other_brightness, name="brightness")
    assert run(model, PLAN, CONFIG, tmp_path / "a", objectives=[same_name]).complete  # as the documentation warns
    described = Objective(brightness, description="mean pixel")
    run(model, PLAN, CONFIG, tmp_path / "b", objectives=[described], shard=(0, 2))
    with pytest.raises(SmiError, match=r"losses 1\.0 \* mean pixel, this run has 1\.0 \* minus the mean pixel;"):
        run(model, PLAN, CONFIG, tmp_path / "b", objectives=[Objective(brightness, description="minus the mean pixel")])


def test_parts_of_other_losses_are_not_merged(model: smi.SparseModel, tmp_path: Path) -> None:
    for part, term in enumerate((losses.margin(1.0), losses.margin(1.0), losses.margin(3.0))):
        run(model, PLAN, CONFIG, tmp_path / str(part), objectives=[term], shard=(part % 2, 2))
    merged = merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    assert merged.complete and merged.objectives == ("1.0 * margin(confidence=1.0)",)
    with pytest.raises(SmiError, match="differ in their losses"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "wrong")


def test_pools_of_before_have_no_losses_of_their_own(model: smi.SparseModel, tmp_path: Path) -> None:
    run(model, PLAN, CONFIG, tmp_path, shard=(0, 2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.pop("objectives") == []
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Pool(tmp_path).objectives == ()
    assert run(model, PLAN, CONFIG, tmp_path).complete
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "objectives": [1]}))
    with pytest.raises(SmiError, match=r"is damaged \(objectives is \[1\], expected a list of texts\)"):
        Pool(tmp_path)


def test_on_the_command_line(tmp_path: Path) -> None:
    command = ["invert", "test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]
    command += ["--iterations", "3", "--prune-at", "2", "--prune-ratio", ".5", "-n", "2", "--out", str(tmp_path / "p")]
    call = CliRunner().invoke
    done = call(app, [*command, "--loss", "margin:weight=0.5", "--loss", "low_pass:cutoff=0.3"])
    assert done.exit_code == 0, done.output
    assert Pool(tmp_path / "p").objectives == ("0.5 * margin(confidence=None)", "1.0 * low_pass(cutoff=0.3)")
    assert {"margin", "low_pass"} <= set(Pool(tmp_path / "p").load(0).history)
    shown = call(app, ["info", str(tmp_path / "p")])
    assert "losses    those of the config, 0.5 * margin(confidence=None), 1.0 * low_pass(cutoff=0.3)" in shown.output
    other = call(app, command)
    assert other.exit_code == 2 and "this run has none of its own; give the same losses" in other.stderr
    twice = call(app, [*command, "--overwrite", "--loss", "margin", "--loss", "margin:weight=2"])
    assert twice.exit_code == 2 and "--loss margin is given 2 times; give it once" in twice.stderr
    planned = call(app, ["plan", *command[1:], "--loss", "margin", "--json"])
    assert planned.exit_code == 0 and json.loads(planned.stdout)["flops"] > 0
    assert call(app, ["plan", *command[1:], "--loss", "nothing"]).exit_code == 2


def test_the_list_names_them_all() -> None:
    shown = CliRunner().invoke(app, ["losses"]).output
    for name in losses.__all__:
        assert any(line.startswith(name + " ") for line in shown.splitlines())
    listed = json.loads(CliRunner().invoke(app, ["losses", "--json"]).output)
    assert {name: entry["about"] for name, entry in listed.items()} == {n: loss.about for n, loss in NAMED.items()}
