"""The command line: what it prints, what it leaves on disk, and one line for everything a user can mend."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import one_thread  # noqa: F401

import smi.run
from smi.cli import app
from smi.errors import SmiError
from smi.pool import Pool
from smi.state import WorkPlan

ROOT = Path(__file__).parent.parent
TINY = ["test_vit", "--no-pretrained", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]  # 16 patches
SHORT = ["--iterations", "12", "--prune-at", "4,8", "--prune-ratio", ".3,.3", "--batch-size", "2"]


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``smi ARGUMENTS`` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments], prog_name="smi")
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pool of 6 images in 3 batches."""
    path = tmp_path_factory.mktemp("cli") / "pool"
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as stop:
        app(["invert", *TINY, *SHORT, "--num-images", "6", "--out", str(path)])
    assert stop.value.code == 0
    return path


def shell(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "smi.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def tensors(shard: Path) -> dict[str, torch.Tensor]:
    return load_file(shard)


def assert_same_pool(left: Path, right: Path) -> None:
    """All tensors and all pictures, bit for bit."""
    shards = [sorted(p.name for p in (pool / "shards").iterdir()) for pool in (left, right)]
    assert shards[0] == shards[1]
    for name in shards[0]:
        a, b = (tensors(pool / "shards" / name) for pool in (left, right))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    pictures = [{p.name: p.read_bytes() for p in (pool / "png").iterdir()} for pool in (left, right)]
    assert pictures[0] == pictures[1]


# --- invert ---


def test_invert_fills_a_pool_and_says_what_to_do_next(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "my pool"
    code, printed, log = call("invert", *TINY, *SHORT, "-n", 4, "--out", out)
    assert code == 0
    pool = Pool(out)
    assert pool.complete
    assert pool.plan == WorkPlan((0, 1, 2, 3), 2)
    assert [pool.load(0).keep.shape[1], pool.config.iterations, pool.config.jitter] == [7, 12, "patch"]
    assert f"pictures in {out / 'png'}" in printed
    assert "teacher agrees on" in printed
    assert printed.endswith(f"next: smi report '{out}'\n")
    assert "independent network" not in printed
    assert [line[:9] for line in log.splitlines() if "done in" in line] == ["batch 1/2", "batch 2/2"]


def test_invert_again_has_nothing_to_do(call: Call, pool: Path) -> None:
    code, printed, _ = call("invert", *TINY, *SHORT, "-n", 6, "-o", pool)
    assert code == 0
    assert printed.startswith(f"nothing to do: the pool {pool} is complete (6 images)")


def test_a_time_budget_leaves_the_rest_for_the_next_call(call: Call, pool: Path, tmp_path: Path) -> None:
    command = ["invert", *TINY, *SHORT, "-n", 6, "-o", tmp_path / "p"]
    code, printed, _ = call(*command, "--time-budget", "0.001s")
    assert code == 0
    assert printed.startswith("no batch was finished in ")
    assert "6 images in 3 batches are left, 1 of them begun; run the same command again to go on" in printed
    assert "0 of 6 images, 0 of 3 batches, 1 begun" in call("info", tmp_path / "p")[1]
    assert json.loads(call("info", tmp_path / "p", "--json")[1])["batches_begun"] == [0]
    assert call(*command)[0] == 0
    assert_same_pool(tmp_path / "p", pool)
    assert "6 of 6 images, 3 of 3 batches\n" in call("info", tmp_path / "p")[1]


def test_json_is_one_object_a_line_and_nothing_else(call: Call, pool: Path, tmp_path: Path) -> None:
    code, printed, log = call("invert", *TINY, *SHORT, "-n", 4, "-o", tmp_path / "p", "--json")
    events = [json.loads(line) for line in printed.splitlines()]
    assert (code, log) == (0, "")
    assert [event["event"] for event in events] == ["start", "batch", "batch", "done"]
    assert events[0]["missing"] == [0, 1]
    assert events[0]["config"]["prune_at"] == [4, 8]
    assert [event["indices"] for event in events[1:3]] == [[0, 1], [2, 3]]
    assert events[1]["kept"] == 7
    assert events[1]["losses"]["cross_entropy"] > 0
    assert events[3]["run"]["images_done"] == 4
    assert events[3]["pool"]["complete"] is True


def test_overwrite_starts_over(call: Call, tmp_path: Path) -> None:
    command = ["invert", *TINY, *SHORT, "-n", 2, "-o", tmp_path / "p"]
    assert call(*command)[0] == 0
    assert_one_line(call(*command, "--l2", 1), "made with l2 0.0, this run has 1.0")
    assert call(*command, "--l2", 1, "--overwrite")[0] == 0
    assert Pool(tmp_path / "p").config.l2 == 1


def test_the_embedded_teacher_needs_no_options_to_be_judged(call: Call, tmp_path: Path) -> None:
    command = ["invert", *SHORT, "--device", "cpu", "-o", tmp_path / "p"]
    code, printed, _ = call(*command, "--classes", "cat,ship", "--per-class", 1)
    assert code == 0
    assert "an independent network agrees on" in printed
    assert sorted(p.name for p in (tmp_path / "p" / "png").iterdir()) == ["000000_cat.png", "000001_ship.png"]


# --- interruptions ---


def test_kill_9_and_the_same_command_again_give_the_same_pool(call: Call, tmp_path: Path) -> None:
    command = ["invert", *TINY, *SHORT, "--num-images", 16, "--out"]
    shards = tmp_path / "killed" / "shards"
    process = shell(*command, tmp_path / "killed")
    wait_for(lambda: shards.is_dir() and any(shards.glob("[0-9]*.safetensors")), process)
    process.kill()
    process.communicate()
    assert 1 <= len(Pool(tmp_path / "killed").batches) < 8

    assert call(*command, tmp_path / "killed")[0] == 0
    assert call(*command, tmp_path / "whole")[0] == 0
    assert_same_pool(tmp_path / "killed", tmp_path / "whole")


def test_sigterm_ends_a_run_in_one_line(tmp_path: Path) -> None:
    process = shell("invert", *TINY, *SHORT, "-t", 100000, "--out", tmp_path / "p", "--num-images", 2)
    wait_for((tmp_path / "p" / "png").is_dir, process)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert out == ""
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"
    assert "Traceback" not in err
    assert Pool(tmp_path / "p").batches == []


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted; run the same command again to go on\n"),
        (signal.SIGTERM, 143, "stopped; run the same command again to go on\n"),
    ],
)
def test_signals_have_their_exit_codes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, line: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(smi.run, "run", stopped)
    # A shell's background jobs inherit Ctrl-C ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call("invert", *TINY, *SHORT, "-o", tmp_path / "p") == (code, "", line)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert signal.getsignal(signal.SIGTERM) is before


# --- errors ---


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2, (out, err)
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deit_tny_patch16_224"], "unknown model 'deit_tny_patch16_224'. Did you mean 'deit_tiny_patch16_224'?"),
        (["resnet18", "--no-pretrained"], "ResNet is not supported"),
        ([*TINY, "--classes", "99"], "class 99 does not exist; the model has classes 0 to 9"),
        ([*TINY, "--classes", "cat"], "'cat'; expected numbers or ranges"),
        ([*TINY, "--img-size", "65"], "65"),
        ([*TINY, "--num-images", "0"], "0 images were asked for"),
        ([*TINY, "--num-images", str(10**20)], "expected at most 100,000,000 in one pool"),
        ([*TINY, "--per-class", str(10**20)], "expected at most 100,000,000 in one pool"),
        ([*TINY, "--prune-at", "2,4", "--prune-ratio", ".9,.9"], "leaves none"),
        ([*TINY, "--ce", "0", "--tv2", "0"], "every objective has weight 0"),
        ([*TINY, "--checkpoint", "no-such.pth"], "no checkpoint 'no-such.pth'"),
        ([*TINY, "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
        (["--prune-at", "4,8", "--prune-ratio", ".3,1.3"], "prune_ratio contains 1.3"),
        (["--prune-ratio", "a,b"], "--prune-ratio is 'a,b'; expected numbers"),
        (["--prune-at", "8,4", "--prune-ratio", ".3,.3"], "4 follows 8"),
        (["--prune-at", "4,5", "--prune-ratio", ".3,.3"], "adjacent iterations 4 and 5"),
        (["--prune-at", "4"], "prune_at has 1 entries"),
        (["--iterations", "10"], "Raise iterations above"),
        (["--tv2", "nan"], "tv2 is nan"),
        (["--strategy", "sparce"], "Did you mean 'sparse'?"),
        (["--division", "3"], "--division goes with the strategy rebirth, and this is sparse"),
        (["--merge-to", "0.5"], "--merge-to goes with the strategy fusion, and this is sparse"),
        (
            ["--strategy", "random", "--ranking", "received_attention"],
            "--ranking goes with the strategy sparse or rebirth, and this is random",
        ),
        (["--log-every", "5"], "--log-every 5 goes with --log or --tensorboard"),
        (["--strategy", "dense", "--prune-at", "4"], "prune_at has 1 entries"),
        (
            ["--strategy", "rebirth", "--prune-at", "4", "--prune-ratio", ".5"],
            "--prune-at goes with the strategy sparse or random, and this is rebirth",
        ),
        (["--preset", "demoo"], "Did you mean 'demo'?"),
        (["--preset", "demo", "--config", "x.yaml"], "exclude each other"),
        (["--config", "no-such.yaml"], "cannot read the config"),
        (["--set", "beta3=1"], "unknown config option 'beta3'. Did you mean"),
        (["--set", "tv2"], "is not KEY=VALUE"),
        (["--set", "best=maybe"], "best is 'maybe'"),
        (["--set", "tv2=[1"], "cannot be read"),
        (["--num-images", "3", "--per-class", "2"], "exclude each other"),
        (["--per-class", "0"], "--per-class is 0"),
        (["--time-budget", "soon"], "--time-budget is 'soon'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(call("invert", *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_what_invert_refuses(call: Call) -> None:
    assert_one_line(call("plan", *TINY, "--ce", "0", "--tv2", "0"), "every objective has weight 0")
    assert_one_line(call("plan", "--time-budget", "soon"), "--time-budget is 'soon'")


def test_cuda_where_there_is_none(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(call("invert", "--device", "cuda"), "no CUDA GPU is visible; use cpu")


def test_weights_that_are_not_finite(call: Call, tmp_path: Path) -> None:
    state = timm.create_model("test_vit", img_size=64, num_classes=10).state_dict()
    state["head.bias"][3] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    result = call("invert", *TINY, "--checkpoint", tmp_path / "bad.safetensors", "-o", tmp_path / "p")
    assert_one_line(result, "not finite: 1 of 10 values of 'head.bias'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "3"], "weights_sha256"),  # which draws other random weights
        (["--num-images", "8"], "this run has"),
        (["--lr", "0.1"], "learning_rate 0.25, this run has 0.1"),
    ],
)
def test_another_pool_is_not_touched(call: Call, pool: Path, change: list[str], message: str) -> None:
    result = call("invert", *TINY, *SHORT, "-n", 6, "-o", pool, *change)
    assert_one_line(result, message)
    assert "was made with" in result[2]
    assert "--overwrite" in result[2]
    assert Pool(pool).complete


def test_out_must_be_a_folder_that_can_be_made(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert_one_line(call("invert", *TINY, *SHORT, "-o", tmp_path / "file" / "pool"), "cannot write to")
    assert_one_line(call("invert", *TINY, *SHORT, "-o", tmp_path, "--overwrite"), "is not a pool and not empty")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_will_not_take_it(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(smi.run, "run", refuse)
    assert_one_line(call("invert", *TINY, *SHORT, "-o", tmp_path / "p"), f"/some/file: {os.strerror(number)}.")


def test_a_gpu_that_is_too_small(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation.")

    monkeypatch.setattr(smi.run, "run", refuse)
    assert_one_line(call("invert", *TINY, *SHORT, "-o", tmp_path / "p"), "smaller --batch-size")


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmiError):
        app(["--debug", "info", "no-such-pool"])
    monkeypatch.setenv("SMI_DEBUG", "1")
    with pytest.raises(SmiError):
        app(["info", "no-such-pool"])


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(smi.run, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        app(["invert", *TINY, *SHORT, "-o", str(tmp_path / "p")])


# --- the other commands ---


def test_plan_prints_phases_and_totals(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, _ = call("plan", *TINY, *SHORT, "-n", 6)
    assert code == 0
    for text in ("0-3", "4-7", "8-11", "6 in 3 batches", "(counted)", "(estimated)", "disk"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


def test_plan_tells_the_price(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, printed, _ = call("plan", *TINY, *SHORT, "-n", 6, "--price", 3600, "--json")
    told = json.loads(printed)
    assert told["price"] == pytest.approx(told["seconds"])
    _, printed, _ = call("plan", *TINY, *SHORT, "-n", 6, "--price", 3600)
    one, million = (float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.\d\d", printed.splitlines()[-1]))
    assert million == pytest.approx(1e6 * one / 6, rel=0.05 / one)
    assert_one_line(call("plan", *TINY, "--price", -1), "--price is -1; expected what the device costs an hour")


def test_dry_run_is_plan(call: Call, tmp_path: Path) -> None:
    command = [*TINY, *SHORT, "-n", 6, "-o", tmp_path / "p", "--json"]
    planned, dry = (json.loads(call(*start, *command)[1]) for start in (["plan"], ["invert", "--dry-run"]))
    assert planned["event"] == dry["event"] == "plan"
    assert planned["flops"] == dry["flops"] > 0
    assert planned["config"] == dry["config"]
    assert [phase["kept"] for phase in planned["phases"]] == [16, 11, 7]
    assert not (tmp_path / "p").exists()


def test_doctor(call: Call) -> None:
    code, printed, _ = call("doctor", *TINY)
    assert code == 0
    assert printed.startswith("test_vit: supported")
    assert "class_attention" in printed
    assert re.search(r"^  against kernels +\S", printed, re.MULTILINE), "a list of nothing says so"
    assert "reference live" in printed
    code, printed, err = call("doctor", "resnet18", "--no-pretrained", "--json")
    assert (code, err) == (1, "")
    found = json.loads(printed)
    assert (found["supported"], found["facts"]) == (False, {})
    assert "ResNet is not supported" in found["reason"]
    assert_one_line(call("doctor", "no_such_model"), "unknown model")


def test_models(call: Call) -> None:
    code, printed, _ = call("models")
    names = [line.split()[0] for line in printed.splitlines()]
    assert code == 0
    assert names[0] == "embedded:teacher"
    assert {"deit3_small_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_224"} <= set(names)
    assert not {"resnet18", "swin_tiny_patch4_window7_224", "vit_so400m_patch14_siglip_384"} & set(names)
    found = json.loads(call("models", "deit3_small*224", "--json")[1])
    assert found == [{"name": "deit3_small_patch16_224", "weights": ["fb_in1k", "fb_in22k_ft_in1k"]}]
    assert_one_line(call("models", "swin"), "no supported model matches")


def test_info(call: Call, pool: Path) -> None:
    code, printed, _ = call("info", pool)
    assert code == 0
    assert re.search(r"  memory    [\d.]+ [MG]iB at the peak\n", printed)
    for text in ("6 of 6 images, 3 of 3 batches", "test_vit", "11 from 4, 7 from 8", "6 of 10", "teacher agrees on"):
        assert text in printed
    facts = json.loads(call("info", pool, "--json")[1])
    assert facts["batches_done"] == [0, 1, 2]
    assert facts["summary"]["images"] == 6
    assert_one_line(call("info", pool / "png"), "is not a pool")


def test_info_of_a_pool_that_is_still_empty(call: Call, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((pool / "manifest.json").read_bytes())
    code, printed, _ = call("info", tmp_path)
    assert code == 0
    assert "0 of 6 images" in printed
    assert "agrees" not in printed


def test_report(call: Call, pool: Path, tmp_path: Path) -> None:
    code, printed, _ = call("report", pool, "--out", tmp_path / "page.html", "--images", 2)
    assert (code, printed) == (0, f"{tmp_path / 'page.html'}\n")
    assert "test_vit" in (tmp_path / "page.html").read_text()


def test_report_names_a_judge(call: Call, pool: Path, tmp_path: Path) -> None:
    judge: Any = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        judge.fc.weight.zero_()
        judge.fc.bias.copy_(torch.eye(10)[3])  # it sees class 3 in everything, and one image of six is of that
    save_file(judge.state_dict(), tmp_path / "judge.safetensors")
    page = tmp_path / "page.html"
    assert call("report", pool, "--out", page)[0] == 0
    assert "No second network judged these images" in page.read_text()
    named = ["--judge", "test_resnet", "--judge-checkpoint", tmp_path / "judge.safetensors"]
    assert call("report", pool, "--out", page, *named)[0] == 0
    assert '<div class="name">judge agreement</div><div class="value">16.7' in page.read_text()
    assert_one_line(call("report", pool, "--judge-checkpoint", "x.pth"), "--judge-checkpoint goes with --judge")
    assert_one_line(call("report", pool, "--judge", "resnet5"), "unknown model 'resnet5'")
    assert_one_line(call("report", tmp_path / "none", "--judge", "test_resnet"), "there is no pool")


def test_export(call: Call, pool: Path, tmp_path: Path) -> None:
    code, printed, _ = call("export", pool, tmp_path / "x", "--format", "npy", "--fill", "mean")
    assert (code, printed) == (0, f"{tmp_path / 'x'}\n")
    assert np.load(tmp_path / "x" / "images.npy").shape == (6, 3, 64, 64)
    assert_one_line(call("export", pool, tmp_path / "x"), "already exists")
    assert call("export", pool, tmp_path / "x", "--overwrite")[0] == 0
    assert len(list((tmp_path / "x").rglob("*.png"))) == 6
    assert_one_line(call("export", pool, tmp_path / "y", "--format", "nyp"), "Did you mean 'npy'?")
    assert_one_line(call("export", pool, tmp_path / "y", "--fill", "blck"), "black")


@pytest.mark.parametrize("arguments", [["--help"], ["invert", "--help"], ["--version"], []])
def test_help_does_not_load_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from smi.cli import app
try: app({arguments!r})
except SystemExit as stop: print("torch" in sys.modules, "timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_help_groups_options_and_gives_examples(call: Call) -> None:
    code, printed, _ = call("invert", "--help")
    assert code == 0
    for text in ("Examples", "What to invert", "How much", "Schedule and method", "Objectives", "Run", "--prune-at"):
        assert text in printed
