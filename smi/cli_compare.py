"""The ``smi compare`` command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smi.cli_options import EMBEDDED_TEACHER, Judge, JudgeCheckpoint, ModelOptions, check_judge, load_judge
from smi.cli_progress import progress
from smi.cli_words import parse_classes, parse_numbers, parse_setting
from smi.config import PRESETS, Config, preset_or_file
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.comparison_plan import CompareConfig
    from smi.state import ModelInfo
    from smi.transfer import TransferConfig

_SHORTER = 10  # by how much --quick cuts iterations


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ModelOptions):
    """What `smi compare` takes; the model is the teacher."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything.", show_default=False)]
    strategies: Annotated[
        str | None, typer.Option("--strategies", metavar="LIST", help="Default: all there are.", show_default=False)
    ] = None
    equal: Annotated[str, typer.Option("--equal", help="What methods get the same of: flops, seconds or images.")] = (
        "flops"
    )
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", "-n", help="Of the most expensive method. Default: 80, quick 40.", show_default=False
        ),
    ] = None
    points: Annotated[
        str | None,
        typer.Option(
            "--points", help="Shares of the cost to look at. Default: .25,.5,1, quick .5,1.", show_default=False
        ),
    ] = None
    seeds: Annotated[str, typer.Option("--seeds", help="A curve each; more can be added later.")] = "1"
    classes: Annotated[
        str | None, typer.Option("--classes", help="As for smi invert. Default: all.", show_default=False)
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="PRESET|FILE",
            help=f"{', '.join(PRESETS)}, or options from YAML. Default: demo for embedded models, else fast.",
            show_default=False,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option of the config. Repeatable.", show_default=False),
    ] = None
    judge: Judge = None
    judge_checkpoint: JudgeCheckpoint = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Test images with labels, as for smi evaluate, for accuracies.", show_default=False
        ),
    ] = None
    real: Annotated[
        str | None,
        typer.Option(
            "--real",
            metavar="FOLDER",
            help="Real pictures by class, no test images, to stand beside the others.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[int | None, typer.Option("--limit", help="Test images at most.", show_default=False)] = None
    bits: Annotated[str, typer.Option("--bits", help="Of the quantized teacher: W4A4, W8A8, ... or none.")] = "W4A4"
    observer: Annotated[str, typer.Option("--observer", help="mse, minmax or percentile.")] = "mse"
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="Taught from random weights; none teaches none. Default: the embedded teacher's twin, else none.",
            show_default=False,
        ),
    ] = None
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Of a student. Default: 120, quick 5.", show_default=False)
    ] = None
    fill: Annotated[str, typer.Option("--fill", help="What dropped patches show: as-is, black, mean, noise.")] = "mean"
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A tenth of the iterations: does it run? Conclude nothing.", show_default=False),
    ] = False
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False

    def __post_init__(self) -> None:
        check_judge(self.judge, self.judge_checkpoint)
        given = [name for name in ("limit", "student", "epochs") if getattr(self, name) not in (None, "none")]
        if given and self.data is None:
            raise SmiError(f"--{given[0]} goes with --data, of which accuracies are taken; name test images, too.")

    def load_judge(self, model: SparseModel) -> Any:
        """The network that --judge names, where `model` is; None without one."""
        judge = load_judge(self.judge, self.judge_checkpoint, model.info)
        return None if judge is None else judge.to(model.device)

    def make_config(self) -> Config:
        """Not resolved: what follows the semantics differs between strategies."""
        name = self.preset or ("demo" if self.model.startswith("embedded:") else "fast")
        changes = dict(parse_setting(text) for text in self.settings or ())
        for setting, option in (("strategy", "--strategies"), ("seed", "--seeds")):
            if setting in changes:
                raise SmiError(f"--set {setting}={changes[setting]} is of no use to a comparison; give {option}.")
        config = preset_or_file(name).replace(**changes)
        return shortened(config, _SHORTER) if self.quick else config

    def make_comparison(self, info: ModelInfo) -> CompareConfig:
        """What is compared and how."""
        from smi.comparison_plan import CompareConfig
        from smi.strategies import STRATEGIES

        weights, activations = parse_bits(self.bits)
        names = tuple(STRATEGIES) if self.strategies is None else tuple(s.strip() for s in self.strategies.split(","))
        points = (".5,1" if self.quick else ".25,.5,1") if self.points is None else self.points
        return CompareConfig(
            strategies=names,
            equal=self.equal,  # type: ignore[arg-type]  # checked there
            images=(40 if self.quick else 80) if self.num_images is None else self.num_images,
            points=tuple(map(float, parse_numbers("--points", points))),
            seeds=parse_seeds(self.seeds),
            classes=None if self.classes is None else tuple(parse_classes(self.classes, info)),
            fill=self.fill,  # type: ignore[arg-type]
            weights=weights,
            activations=activations,
            observer=self.observer,  # type: ignore[arg-type]
            limit=self.limit,
            quick=self.quick,
        )

    def make_student(self, info: ModelInfo) -> Callable[[], Any] | None:
        """Makes a network with random weights; None if nobody is taught."""
        if self.student == "none" or (self.student is None and self.model != EMBEDDED_TEACHER):
            return None
        if self.student is None:
            return _twin
        name = self.student

        def make() -> Any:
            from smi.models import load_model

            return load_model(name, pretrained=False, num_classes=info.num_classes)

        return make

    def make_lesson(self) -> TransferConfig:
        """From random weights, so everything is trained."""
        from smi.transfer import TransferConfig

        epochs = (5 if self.quick else 120) if self.epochs is None else self.epochs
        return TransferConfig(mode="finetune", epochs=epochs, batch_size=32, learning_rate=1e-3, weight_decay=0.05)


def compare(options: CompareOptions) -> None:
    """Compare strategies on one teacher: quality against cost, in one picture and a page.

    All methods run in turns on the same classes and seeds. At equal cost a cheaper one makes more images; an equal
    number of images is shown beside it, with Gaussian noise and real images (--real) as controls. The same command goes
    on after an interruption.

    [bold]Examples[/bold]

      smi compare --out comparison --quick

      smi compare embedded:teacher --data cifar10:DATA --seeds 1,2,3 --out comparison

      smi compare deit_base_patch16_224 --judge resnet50 --equal seconds -n 64 --classes 0-15 --out deit-compared
    """
    from smi.comparison import compare as run

    config = options.make_config()
    model = options.load(config)
    with progress("starting", silent=options.json, every=0.0) as told:
        record = run(
            model,
            options.out,
            config,
            options.make_comparison(model.info),
            judge=options.load_judge(model),
            data=options.data,
            real=options.real,
            student=options.make_student(model.info),
            lesson=options.make_lesson(),
            progress=told,
        )
    if options.json:
        print(json.dumps(record))
        return
    print((options.out / "compare.md").read_text(encoding="utf-8"))
    print(options.out / "compare.png")


def _twin() -> Any:
    """The embedded teacher's architecture with random weights, of the same pixels."""
    from smi.embedded import build_teacher, load_teacher

    student: Any = build_teacher()
    student.pretrained_cfg = load_teacher().pretrained_cfg
    return student


def shortened(config: Config, factor: int) -> Config:
    """With 1/`factor` of the iterations, and prunings at the same shares of them."""
    return config.replace(
        iterations=max(1, config.iterations // factor), prune_at=[max(1, t // factor) for t in config.prune_at]
    )


def parse_seeds(text: str) -> tuple[int, ...]:
    """``1,2,3`` -> (1, 2, 3)."""
    seeds = parse_numbers("--seeds", text)
    if not all(isinstance(seed, int) for seed in seeds):
        raise SmiError(f"--seeds is {text!r}; expected whole numbers separated by commas, e.g. 1,2,3.")
    return tuple(map(int, seeds))


def parse_bits(text: str) -> tuple[int, int]:
    """``W4A8`` -> (4, 8); ``none`` -> (0, 0)."""
    match = re.fullmatch(r"[Ww](\d)[Aa](\d)", text.strip())
    if match is None and text.strip().lower() != "none":
        raise SmiError(f"--bits is {text!r}; expected bits of weights and activations such as W4A4, or none.")
    return (int(match[1]), int(match[2])) if match else (0, 0)
