"""What options mean, and how progress is told."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from smi.cli_options import InvertOptions
from smi.cli_progress import BarReporter, LineReporter, duration, size
from smi.cli_words import parse_classes, parse_duration, parse_numbers, parse_setting
from smi.config import PRESETS, Config
from smi.errors import SmiError
from smi.state import ModelInfo, WorkPlan
from smi.weights import weights_hash

INFO = ModelInfo(
    name="m",
    weights_sha256="0",
    input_size=(3, 32, 32),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    patch_size=(4, 4),
    grid=(8, 8),
    num_prefix_tokens=1,
    num_classes=4,
    ranking="class_attention",
    class_names=("cat", "Dog", "great white shark", "7"),
)


# --- options ---


def test_demo_is_the_default_of_embedded_models_only() -> None:
    assert InvertOptions().make_config() == PRESETS["demo"].resolved()
    assert InvertOptions(model="vit_x").make_config() == PRESETS["paper-quant"].resolved()
    assert InvertOptions(preset="fast").make_config() == PRESETS["fast"].resolved()


def test_a_fresh_head_on_published_weights_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an interrupted transfer could not go on: its student would be another one each time."""
    create, published = timm.create_model, timm.create_model("resnet10t").state_dict()

    def fetched(name: str, pretrained: bool, **options: Any) -> Any:
        model = create(name, **options)
        assert pretrained
        rest = {key: value for key, value in published.items() if not key.startswith("fc.")}
        model.load_state_dict(rest, strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", fetched)
    hashes = [weights_hash(InvertOptions(model="resnet10t", num_classes=5).build(seed)) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_later_option_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: fast\ntv1: 1\ntv2: 2\nl2: 3\n")
    made = InvertOptions(
        config=file, settings=["tv2=20", "l2=30", "prune-at=5,9,20,30"], l2=300.0, best=True
    ).make_config()
    expected = PRESETS["fast"].replace(tv1=1, tv2=20, l2=300, best=True, prune_at=(5, 9, 20, 30)).resolved()
    assert made == expected


def test_every_option_of_the_config_can_be_set() -> None:
    for name, value in Config().resolved().to_dict().items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        assert InvertOptions(preset="paper-quant", settings=[f"{name}={text}"]).make_config() == Config().resolved(), (
            name
        )


def test_no_pruning_and_lists_in_brackets() -> None:
    made = InvertOptions(preset="fast", prune_at="", prune_ratio="").make_config()
    assert (made.prune_at, made.prune_ratio) == ((), ())
    assert parse_numbers("--x", "[1, .5,3]") == [1, 0.5, 3]
    assert parse_setting("jitter=null") == ("jitter", None)
    assert parse_setting("jitter=none") == ("jitter", "none")


def test_plan_of_work() -> None:
    def targets(**options: Any) -> tuple[int, ...]:
        made = InvertOptions(**options)
        return made.make_plan(INFO, made.make_config()).targets

    assert targets() == (0, 1, 2, 3) * 10
    assert targets(model="vit_x") == (0, 1, 2, 3) * 8
    assert targets(preset="fast", batch_size=3) == (0, 1, 2)
    assert targets(num_images=5) == (0, 1, 2, 3, 0)
    assert targets(classes="1,3", per_class=2) == (1, 3, 1, 3)


def test_classes_by_number_range_and_name() -> None:
    assert parse_classes("2, 0-1,2", INFO) == [2, 0, 1]
    assert parse_classes("dog,Great White Shark,0", INFO) == [1, 2, 0]
    assert parse_classes("7", INFO) == [3]  # a name before a number
    for text, message in [("3-1", "write 1-3"), ("4", "classes 0 to 3"), ("dgo", "'dog'"), ("", "expected numbers")]:
        with pytest.raises(SmiError, match=message):
            parse_classes(text, INFO)
    cranes = dataclasses.replace(INFO, class_names=("crane", "dog", "Crane", "cat"))
    assert parse_classes("dog,2,cat", cranes) == [1, 2, 3]
    with pytest.raises(SmiError, match="classes 0, 2 are all named 'crane'; give their numbers"):
        parse_classes("cat,crane", cranes)
    with pytest.raises(SmiError, match=r"unknown class 'shark'\. Choose one of: great white shark\.$"):
        parse_classes("shark", INFO)


def test_names_of_classes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    options = InvertOptions(model="test_vit", no_pretrained=True, num_classes=3, class_names=file, classes="zebra,Ant")
    with pytest.raises(SmiError, match=r"cannot read '.*names.txt': No such file"):
        options.build(0)
    file.write_bytes(b"\xff")
    with pytest.raises(SmiError, match="expected a text file in UTF-8"):
        options.build(0)
    file.write_text("ant\nbee\n")
    with pytest.raises(SmiError, match="has 2 lines, the model 3 classes"):
        options.build(0)
    file.write_text("ant\n bee eater \nzebra")
    info = options.load(options.make_config()).info
    assert info.class_names == ("ant", "bee eater", "zebra")
    assert options.make_plan(info, options.make_config()).targets[:2] == (2, 0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("45", 45), ("0.5h", 1800)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "5 parsecs", "m", "1h30", "10d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SmiError, match="expected a time such as"):
        parse_duration(text)


def test_default_folder_is_named_after_model_and_strategy() -> None:
    options = InvertOptions(model="hf-hub:org/Name v1.x", strategy="random")
    assert options.pool(options.make_config()) == Path("pools/hf-hub-org-Name-v1.x-random")


# --- progress ---


class Loop:
    """Stands for an `Inversion`, and counts how often it is asked for losses."""

    def __init__(self) -> None:
        self.iteration = self.resumed_at = 0
        self.asked = 0
        self.keep = torch.zeros(40, 64)
        self.indices = range(40)

    @property
    def done(self) -> bool:
        return self.iteration == 400

    def latest(self) -> dict[str, float]:
        self.asked += 1
        return {"total": 1.25}


def test_losses_are_read_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("smi.cli_progress.time", SimpleNamespace(monotonic=lambda: now))
    reporter: Any = BarReporter(Console(file=io.StringIO()), INFO, WorkPlan((0,) * 40, 40), PRESETS["demo"])
    reporter.open([0])
    loop = Loop()
    for loop.iteration in range(1, 401):
        now += 0.01
        reporter.iteration(0, loop)
    assert 1 <= loop.asked <= 16 + 2, "and as the batch begins and ends"


def test_a_bar_in_a_terminal_and_lines_in_a_log() -> None:
    plan = WorkPlan((0,) * 50, 40)
    for kind, console in (
        (BarReporter, Console(file=io.StringIO(), force_terminal=True, width=80)),
        (LineReporter, Console(file=io.StringIO(), width=80)),
    ):
        reporter: Any = kind(console, INFO, plan, PRESETS["demo"])
        reporter.every = 0
        loop = Loop()
        with reporter:
            reporter.open([0, 1])
            loop.iteration = 200
            reporter.iteration(0, loop)
            reporter.tell_batch(0, None, 63.0)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "batch 1/2" in text
        assert "200/400" in text
        assert "1.250" in text
        assert "64 patches" in text
        assert ("\x1b" in text) == (kind is BarReporter)
        assert ("1 min 03 s" in text) == (kind is LineReporter)


def test_progress_is_counted_in_patches_fed() -> None:
    config = Config(iterations=4, prune_at=(2,), prune_ratio=(0.5,), batch_size=2)
    reporter = LineReporter(Console(file=io.StringIO()), INFO, WorkPlan((0, 1, 2), 2), config)
    reporter.open([0, 1])
    assert reporter.total == 3 * (64 + 64 + 32 + 32)
    told: list[int] = []
    reporter.every = 0
    reporter.tell = lambda batch, loop, losses, done, elapsed: told.append(done)  # type: ignore[method-assign]
    loop: Any = Loop()
    loop.iteration = 3
    reporter.iteration(0, loop)
    reporter.batch(0, None, 1.0)  # type: ignore[arg-type]
    reporter.iteration(1, loop)
    assert told == [2 * 160, 2 * 192 + 160]


def test_what_an_earlier_run_has_done_of_a_batch_is_not_counted() -> None:
    config = Config(iterations=4, prune_at=(2,), prune_ratio=(0.5,), batch_size=2)
    reporter = LineReporter(Console(file=io.StringIO()), INFO, WorkPlan((0, 1, 2), 2), config)
    reporter.open([0, 1])
    told: list[tuple[int, int, float]] = []
    reporter.every = 0
    reporter.tell = lambda batch, loop, losses, done, _: told.append(  # type: ignore[method-assign]
        (done, reporter.total, reporter.rate(done, 2.0))
    )
    loop: Any = Loop()
    loop.resumed_at, loop.iteration = 2, 3
    reporter.iteration(0, loop)
    loop.resumed_at, loop.iteration = 0, 1  # it was not finite in the end, and is tried from another seed
    reporter.iteration(0, loop)
    assert told.pop() == (2 * 64, 3 * 192, 2 * 64 / 192 / 2)
    loop.resumed_at, loop.iteration = 2, 3
    reporter.iteration(0, loop)
    assert told.pop() == told[0]
    reporter.batch(0, None, 1.0)  # type: ignore[arg-type]
    loop.resumed_at, loop.iteration = 0, 1
    reporter.iteration(1, loop)
    total = 3 * 192 - 2 * 128
    assert told == [(2 * 32, total, 2 * 32 / 192 / 2), (2 * 64 + 64, total, (2 * 64 + 64) / 192 / 2)]


def test_quantities_for_people() -> None:
    assert [duration(s) for s in (3.21, 245, 7800)] == ["3.2 s", "4 min 05 s", "2 h 10 min"]
    assert [size(b) for b in (5, 2048, 3 * 2**30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
