"""Knowledge transfer: what the student is fed and taught, that it learns, goes on after a kill, and refuses clearly."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import one_thread, tiny  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

import smi
from smi.cli import app
from smi.dataset import SyntheticDataset
from smi.evaluation import data_config, data_transform
from smi.export import export_pool
from smi.files import atomic_write
from smi.lessons import Stored
from smi.pool import Pool, PoolWriter
from smi.run import invert_batch, run
from smi.transfer import TransferConfig, divergence, teach

SHORT = TransferConfig(epochs=3, batch_size=8, holdout=0.25)
IMAGES, CLASSES = 32, 5


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 noisy images of a random teacher, some patches kept, and its logits eight times as large."""
    path = tmp_path_factory.mktemp("pools") / "noise"
    model = smi.SparseModel(tiny(num_classes=CLASSES), name="teacher")
    config = smi.Config(iterations=2, prune_at=(1,), prune_ratio=(0.6,), batch_size=16)
    plan = smi.WorkPlan(tuple(i % CLASSES for i in range(IMAGES)), 16)
    writer = PoolWriter(path, info=model.info, config=config, plan=plan, device="cpu")
    for batch in writer.missing:
        numbers = plan.batch(batch)
        result = smi.invert(model, [plan.targets[i] for i in numbers], config, indices=list(numbers))
        writer.write(batch, replace(result, logits=8 * result.logits))
    return path


def student() -> nn.Module:
    return tiny(num_classes=CLASSES, depth=1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is taught ---


def test_the_loss_is_the_divergence_of_softened_distributions() -> None:
    logits, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = 0.0
    for ours, theirs in zip(logits, teacher, strict=True):
        p, q = (theirs / 20).softmax(0), (ours / 20).softmax(0)
        expected += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True)) * 400 / 3
    assert divergence(logits, teacher, 20.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", ["kept", "all"])
def test_the_first_loss_is_that_of_the_student_as_it_came(pool: Path, tmp_path: Path, tokens: Any) -> None:
    """With no step to speak of; kept patches fed, or the whole image with the mean in dropped ones."""
    model, data = student(), SyntheticDataset(pool, fill="mean")
    config = TransferConfig(epochs=1, batch_size=64, holdout=0.25, tokens=tokens, learning_rate=1e-12)
    found = teach(model, pool, tmp_path, config)
    assert found.fed == tokens
    held = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:8].tolist()
    images, masks, _, wanted = (torch.stack(part) for part in zip(*(data[i] for i in held), strict=True))
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))  # type: ignore[operator]
        if tokens == "kept":
            x = torch.cat([x[:, :1], x[:, 1:][masks].view(len(x), -1, x.shape[-1])], 1)
        logits = model.forward_head(model.norm(model.blocks(x)))  # type: ignore[operator]
    assert found.curve[0].holdout_loss == pytest.approx(divergence(logits, wanted, 20.0).item(), rel=1e-4)
    assert found.curve[0].agreement == (logits.argmax(1) == wanted.argmax(1)).float().mean().item()
    assert not hasattr(model.patch_drop, "cells"), "the student feeds all patches again"


def test_pixels_of_dropped_patches_do_not_reach_a_student_that_is_fed_kept_ones(pool: Path, tmp_path: Path) -> None:
    found = [
        teach(
            student(),
            pool,
            tmp_path / f"{fill} {tokens}",
            TransferConfig(epochs=2, batch_size=8, fill=fill, tokens=tokens),
        ).curve
        for fill, tokens in (("black", "kept"), ("noise", "kept"), ("black", "all"), ("noise", "all"))
    ]
    assert found[0] == found[1] and found[2] != found[3] and found[0] != found[2]


def test_other_networks_see_the_filled_image_in_their_own_normalisation(pool: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen = []
    cnn = timm.create_model("resnet10t", num_classes=CLASSES)
    cnn.pretrained_cfg = {**cnn.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    hook = cnn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = teach(cnn, pool, tmp_path, TransferConfig(epochs=1, batch_size=64, mode="finetune", fill="mean"))
    hook.remove()
    assert found.fed == "all"
    info, data = Pool(pool).info, SyntheticDataset(pool, fill="mean")
    held = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:3].sort().values
    theirs = torch.stack([data[int(i)][0] for i in held])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    expected = (theirs * std + mean - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]
    ).view(-1, 1, 1)
    torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-5)


def test_a_student_of_one_channel_sees_what_its_teacher_does(tmp_path: Path) -> None:
    teacher = smi.SparseModel(tiny(num_classes=CLASSES, in_chans=1), name="teacher")
    run(teacher, smi.WorkPlan.balanced(range(CLASSES), 10, 10, CLASSES), MEANWHILE, tmp_path / "pool")
    seen: list[Tensor] = []
    model = tiny(num_classes=CLASSES, in_chans=1, depth=1)
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teach(model, tmp_path / "pool", tmp_path / "out", TransferConfig(epochs=1, holdout=0.1, fill="as-is"))
    hook.remove()
    held = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:1]
    torch.testing.assert_close(seen[-1], Pool(tmp_path / "pool").load(0).images[held], rtol=1e-5, atol=1e-6)


def test_however_it_ends_the_student_is_fed_and_trainable_as_it_came(pool: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number, (model, complaint, more) in enumerate(
        (
            (student(), None, {}),
            (student(), KeyboardInterrupt, {"progress": stop}),
            (tiny(num_classes=4), smi.SmiError, {}),
            (tiny(num_classes=CLASSES, in_chans=1), smi.SmiError, {}),
        )
    ):
        before = model.patch_drop
        model.cls_token.requires_grad_(False)
        with pytest.raises(complaint) if complaint else contextlib.nullcontext():
            teach(model, pool, tmp_path / str(number), TransferConfig(epochs=1, tokens="kept"), **more)
        assert model.patch_drop is before
        assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["cls_token"]


# --- what is learnt ---


def test_a_probe_changes_the_classifier_alone_and_finetuning_everything(pool: Path, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in student().state_dict().items()}
    for mode in ("probe", "finetune"):
        model = student()
        teach(model, pool, tmp_path / mode, TransferConfig(**{**SHORT.__dict__, "mode": mode}))
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == ({"head.weight", "head.bias"} if mode == "probe" else set(before))


def test_a_student_learns_what_the_teacher_says(pool: Path, tmp_path: Path) -> None:
    config = TransferConfig(epochs=60, batch_size=8, mode="finetune", learning_rate=3e-3, holdout=0.1)
    found = teach(student(), pool, tmp_path, config)
    assert found.curve[-1].loss < 0.3 * found.curve[0].loss
    data = SyntheticDataset(pool, fill="mean")
    best = student()
    best.load_state_dict(load_file(tmp_path / "student.safetensors"))
    wanted = min(range(60), key=lambda n: (-found.curve[n].agreement, found.curve[n].holdout_loss))
    assert found.best == wanted
    held = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:3].tolist()
    images, masks, _, logits = (torch.stack(part) for part in zip(*(data[i] for i in held), strict=True))
    keep = torch.stack([mask.nonzero().flatten() for mask in masks])
    ours, _ = smi.SparseModel(best, backend="reference").feed(images, keep)
    assert (ours.argmax(1) == logits.argmax(1)).float().mean().item() == found.curve[wanted].agreement
    assert F.mse_loss(ours, logits).isfinite()


# --- files ---


def test_an_interrupted_run_goes_on_bit_for_bit(pool: Path, tmp_path: Path) -> None:
    config = TransferConfig(epochs=4, batch_size=8, mode="finetune")
    whole = teach(student(), pool, tmp_path / "whole", config)

    def stop(number: int, _: object) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(student(), pool, tmp_path / "parts", config, progress=stop)
    told: list[int] = []
    parts = teach(student(), pool, tmp_path / "parts", config, progress=lambda number, _: told.append(number))
    assert told == [2, 3] and parts.curve == whole.curve and parts.best == whole.best
    for name in ("student.safetensors", "last.safetensors"):
        assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name))
    record = json.loads((tmp_path / "parts" / "transfer.json").read_text())
    assert record["epochs"] == 4 and record["teacher"] == "teacher" and len(record["curve"]) == 4
    again = teach(student(), pool, tmp_path / "parts", config, progress=lambda *_: pytest.fail("it was done"))
    assert again.curve == whole.curve


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_best_student_is_never_of_an_epoch_that_is_trained_again(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """On a GPU the epoch may bring something else the second time, and another student be the best."""
    config = TransferConfig(epochs=2, batch_size=8, mode="finetune", learning_rate=3e-3)
    whole = teach(student(), pool, tmp_path / "whole", config)
    assert whole.best == 1
    left = [3 + writes]  # three in the first epoch

    def killed(path: Path, data: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        atomic_write(path, data)

    monkeypatch.setattr("smi.transfer.atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        teach(student(), pool, tmp_path / "parts", config)
    monkeypatch.undo()
    with safe_open(tmp_path / "parts/student.safetensors", framework="pt") as file:
        found = int(file.metadata()["epoch"])
    again: list[int] = []
    teach(student(), pool, tmp_path / "parts", config, progress=lambda number, _: again.append(number))
    assert found not in again and again == [1] * (not writes)
    for name in ("student.safetensors", "transfer.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_student_with_tied_weights_is_kept_and_goes_on(pool: Path, tmp_path: Path) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        first, second = nn.Linear(768, 768), nn.Linear(768, 768)
        second.weight = first.weight
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Linear(768, CLASSES))

    config = TransferConfig(epochs=2, mode="finetune")
    whole = teach(tied(), pool, tmp_path / "whole", config)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(tied(), pool, tmp_path / "parts", config, progress=stop)
    assert teach(tied(), pool, tmp_path / "parts", config).curve == whole.curve
    kept = load_file(tmp_path / "parts/student.safetensors")
    assert torch.equal(kept["1.weight"], kept["3.weight"]) and same(kept, load_file(whole.path / "student.safetensors"))


def test_images_of_one_trajectory_are_not_on_both_sides_of_the_split(tmp_path: Path) -> None:
    config = smi.Config(strategy="rebirth", division=4, iterations=8, batch_size=5, snapshots=0)
    plan = smi.WorkPlan.balanced(range(CLASSES), 40, 5, CLASSES, repeat=4)
    run(smi.SparseModel(tiny(num_classes=CLASSES), name="teacher"), plan, config, tmp_path / "pool")
    lessons = Stored(tmp_path / "pool", "as-is", 0.3, seed=0).lessons(0)
    taught, held = (set((rows // 4).tolist()) for rows in (lessons.taught, lessons.held))
    assert (len(taught), len(held)) == (7, 3) and not taught & held
    assert sorted([*lessons.taught.tolist(), *lessons.held.tolist()]) == list(range(40))


# --- images made meanwhile ---

MEANWHILE = smi.Config(iterations=6, prune_at=(2,), prune_ratio=(0.5,), batch_size=10, seed=4, snapshots=0)


def synthesis(**changes: Any) -> smi.Synthesis:
    torch.manual_seed(0)
    return smi.Synthesis(smi.SparseModel(tiny(num_classes=CLASSES), name="teacher"), MEANWHILE.replace(**changes))


def test_every_epoch_is_of_a_fresh_batch_and_the_first_batch_only_chooses(tmp_path: Path) -> None:
    """By hand: batch 0 is held out, epoch n steps down the divergence on batch n + 1, in SGD with momentum."""
    config = TransferConfig(epochs=3, passes=2, batch_size=10, mode="finetune", optimizer="sgd", weight_decay=1e-4)
    taught = student()
    found = teach(taught, synthesis(), tmp_path, config)
    pool = Pool(tmp_path / "pool")
    assert pool.complete and len(pool) == 40
    for batch in pool.batches:  # ten images: every one of five classes twice
        assert sorted(pool.load(batch).targets.tolist()) == sorted(2 * list(range(CLASSES)))

    mine = student()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    held, curve = pool.load(0), []

    def loss(result: smi.Result) -> Tensor:
        x = mine._pos_embed(mine.patch_embed(result.images))  # type: ignore[operator]
        chosen = torch.cat([torch.zeros(len(x), 1, dtype=torch.int64), 1 + result.keep], 1)
        x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        logits = mine.forward_head(mine.norm(mine.blocks(x)))  # type: ignore[operator]
        return divergence(logits, result.logits, 20.0)

    for epoch in range(3):
        for step in range(2):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * (epoch + step / 2) / 3))
            optimizer.zero_grad()
            loss(pool.load(epoch + 1)).backward()
            optimizer.step()
        curve.append(loss(held).item())
    assert [epoch.holdout_loss for epoch in found.curve] == pytest.approx(curve, rel=1e-3)
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(taught.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_synthesis_interrupted_within_a_batch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = TransferConfig(epochs=2, batch_size=4)
    whole = teach(student(), synthesis(), tmp_path / "whole", config)

    def stop(batch: int, loop: smi.Inversion) -> None:
        if (batch, loop.iteration) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(student(), replace(synthesis(), on_iteration=stop), tmp_path / "parts", config)
    made: set[int] = set()
    parts = teach(
        student(),
        replace(synthesis(), on_iteration=lambda batch, _: made.add(batch)),
        tmp_path / "parts",
        config,
    )
    assert made == {2} and parts.curve == whole.curve
    assert same(load_file(tmp_path / "whole/last.safetensors"), load_file(tmp_path / "parts/last.safetensors"))
    with pytest.raises(smi.SmiError, match="holds another run: its pool"):
        teach(student(), synthesis(tv2=0.5), tmp_path / "parts", config)


def test_images_are_made_in_competition_with_what_the_student_has_learnt(tmp_path: Path) -> None:
    """Batch 2 comes after the first epoch; alone, against a copy of the student of that moment, it is the same."""
    asked, taught, moment = synthesis(), student(), student()
    info = asked.teacher.info
    rivals = [smi.losses.adversarial(taught, info, weight=2.0)]
    teach(
        taught,
        replace(asked, objectives=rivals),
        tmp_path,
        TransferConfig(epochs=2, batch_size=4, mode="finetune"),
        progress=lambda epoch, _: None if epoch else moment.load_state_dict(taught.state_dict()),
    )
    pool = Pool(tmp_path / "pool")
    assert pool.objectives == tuple(one.identity for one in rivals)
    alone = invert_batch(asked.teacher, pool.plan, MEANWHILE, 2, [smi.losses.adversarial(moment, info, weight=2.0)])
    assert torch.equal(pool.load(2).images, alone.images)
    first = invert_batch(asked.teacher, pool.plan, MEANWHILE, 2, [smi.losses.adversarial(student(), info, weight=2.0)])
    assert not torch.equal(first.images, alone.images)
    with pytest.raises(smi.SmiError, match="holds another run: its pool"):
        teach(student(), asked, tmp_path, TransferConfig(epochs=2, batch_size=4, mode="finetune"))


def test_a_second_run_on_the_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    config, refused = TransferConfig(epochs=1, batch_size=4), []

    def second(batch: int, loop: smi.Inversion) -> None:
        if (batch, loop.iteration) == (1, 3):
            with pytest.raises(smi.SmiError, match=r"another run is at work on .*pool.*Wait for it or stop it"):
                teach(student(), synthesis(), tmp_path, config)
            refused.append(batch)

    teach(student(), replace(synthesis(), on_iteration=second), tmp_path, config)
    assert refused == [1] and Pool(tmp_path / "pool").complete and not (tmp_path / "pool" / "workers").exists()
    teach(student(), synthesis(), tmp_path, config)


def test_the_command_inverts_the_teacher_meanwhile(tmp_path: Path) -> None:
    MEANWHILE.save(tmp_path / "inversion.yaml")
    args = [
        "transfer", "resnet10t", "--no-pretrained", "--num-classes", "10", "--teacher", "embedded:teacher", "--out",
        str(tmp_path / "out"), "--epochs", "1", "--inversion", str(tmp_path / "inversion.yaml"), "--device", "cpu",
        "--loss", "margin:weight=0.5",
    ]  # fmt: skip
    found = CliRunner().invoke(app, [*args, "--json"])
    assert found.exit_code == 0, found.output
    assert Pool(tmp_path / "out" / "pool").objectives == (smi.losses.margin(weight=0.5).identity,)
    assert len(json.loads(found.output)["curve"]) == 1 and len(Pool(tmp_path / "out" / "pool")) == 20
    for wrong, complaint in (
        (["--pool", "p", "--teacher", "embedded:teacher"], "either --pool"),
        ([], "either --pool"),
        (["--pool", "p", "--inversion", "demo"], "--inversion goes with --teacher"),
        (["--pool", "p", "--backend", "triton"], "--backend triton goes with --teacher"),
        (["--teacher", "embedded:teacher", "--holdout", "0.3"], "--holdout 0.3 goes with --pool"),
        (["--pool", "p", "--teacher-classes", "0"], "--teacher-classes goes with --teacher"),
        (["--pool", "p", "--loss", "margin"], "--loss goes with --teacher"),
        (["--teacher", "embedded:teacher", "--loss", "margn"], "unknown loss 'margn'"),
        (["--teacher", "embedded:teacher", "--inversion", "dmo"], "unknown preset 'dmo'"),
    ):
        shown = CliRunner().invoke(app, ["transfer", "resnet10t", "--no-pretrained", "--out", "o", *wrong])
        assert shown.exit_code == 2 and complaint in shown.output.replace("\n", " "), shown.output


# --- bad input ---


def test_what_does_not_fit_is_said(pool: Path, tmp_path: Path) -> None:
    for change, complaint in (
        ({"mode": "tune"}, r"mode is 'tune'; expected one of probe, finetune"),
        ({"temperature": 0}, r"temperature is 0; expected a positive number"),
        ({"holdout": 1.0}, r"holdout is 1.0; expected a share between 0 and 1"),
        ({"epochs": 0}, r"epochs is 0; expected at least 1"),
        ({"seed": -1}, r"seed is -1; expected a whole number from 0, below 8796093022208"),
        ({"seed": 2**50}, r"seed is 1125899906842624; expected a whole number from 0, below 8796093022208"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1; expected 0 or a positive number"),
        ({"weight_decay": math.nan}, r"weight_decay is nan; expected 0 or a positive number"),
    ):
        with pytest.raises(smi.SmiError, match=complaint):
            TransferConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(smi.SmiError, match=r"the student has 4 classes, the images' teacher 5; .*--num-classes"):
        teach(tiny(num_classes=4), pool, tmp_path)
    for outputs in (1, 4):  # a single one would be broadcast against the teacher's
        with pytest.raises(smi.SmiError, match=rf"the student gives \(1, {outputs}\) for an image; expected \(1, 5\)"):
            teach(nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, outputs)), pool, tmp_path, SHORT)
    with pytest.raises(smi.SmiError, match=r"does not take images of 16 x 16 pixels in 3 channels: .*--img-size"):
        teach(tiny(num_classes=CLASSES, img_size=32), pool, tmp_path)
    with pytest.raises(smi.SmiError, match=r"in 3 channels: .*expected input.* to have 1 channels.*in_chans=3"):
        teach(tiny(num_classes=CLASSES, in_chans=1), pool, tmp_path)
    with pytest.raises(
        smi.SmiError, match=r"kept patches alone: its patches lie on a grid of 2 x 2, the pool's on 4 x 4"
    ):
        teach(tiny(num_classes=CLASSES, patch_size=8), pool, tmp_path, TransferConfig(tokens="kept"))
    with pytest.raises(smi.SmiError, match=r"32 images, of which a share of 0.01 held out leaves 0"):
        teach(student(), pool, tmp_path, TransferConfig(holdout=0.01))
    one_left = TransferConfig(epochs=1, batch_size=14, mode="finetune")
    with pytest.raises(smi.SmiError, match=r"a single image, the last of 29 in batches of 14: .*another batch_size"):
        teach(timm.create_model("resnet10t", num_classes=CLASSES), pool, tmp_path, one_left)
    with pytest.raises(smi.SmiError, match=r"no classifier to train alone; use mode='finetune'"):
        teach(nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, CLASSES)), pool, tmp_path)


def test_a_folder_of_another_run_or_a_damaged_one_is_refused(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(smi.SmiError, match=r"holds 'thesis\.tex' and no transfer; choose another folder"):
        teach(student(), pool, tmp_path, SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    teach(student(), pool, tmp_path, SHORT)
    other: Any = student()
    other.head.bias.data.add_(1)
    with pytest.raises(smi.SmiError, match=r"holds another run: its weights_sha256"):
        teach(other, pool, tmp_path, SHORT)
    with pytest.raises(smi.SmiError, match=r"holds another run: its config"):
        teach(student(), pool, tmp_path, TransferConfig(**{**SHORT.__dict__, "seed": 3}))
    (tmp_path / "last.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(smi.SmiError, match=r"last.safetensors' is damaged .*; remove it to begin again"):
        teach(student(), pool, tmp_path, SHORT)


def test_the_command_prints_what_was_found(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [
        "transfer", "resnet10t", "--no-pretrained", "--num-classes", str(CLASSES), "--pool", str(pool), "--out",
        str(tmp_path / "r10"), "--epochs", "2", "--mode", "finetune", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setattr("smi.cli_progress.LINE_EVERY", 0.0)
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert re.fullmatch(r"1/2 epochs: loss [\d.]+, agreement [\d.]+%\n2/2 epochs: .*\n", shown.stderr), "no terminal"
    assert "resnet10t, fed all patches: epoch" in shown.output and "student.safetensors" in shown.output
    found = json.loads(CliRunner().invoke(app, [*args, "--json"]).output)
    assert len(found["curve"]) == 2 and found["fed"] == "all"
    assert f"epoch {found['best'] + 1} of 2 is the best" in shown.output
    again = CliRunner().invoke(app, args)  # done already, and no terminal
    assert again.stderr == "" and again.stdout == shown.stdout
    export_pool(pool, tmp_path / "images", "imagefolder")
    words = shlex.split(shown.stdout.splitlines()[-1].removeprefix("next: smi "))
    evaluated = CliRunner().invoke(app, [*(str(tmp_path / "images") if w == "IMAGES" else w for w in words), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    right: Any = timm.create_model("resnet10t", num_classes=CLASSES)
    right.load_state_dict(load_file(tmp_path / "r10" / "student.safetensors"))
    with torch.no_grad():
        right.eval()
        seen = [
            int(right(data_transform(data_config(right))(picture)[None]).argmax()) == label
            for picture, label in ImageFolder(str(tmp_path / "images"))
        ]
    assert json.loads(evaluated.stdout)["top1"] == sum(seen) / len(seen)
    wrong = CliRunner().invoke(app, [*args[:-2], "--mode", "teach"])
    assert wrong.exit_code == 2 and "mode is 'teach'" in wrong.output
