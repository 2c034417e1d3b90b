"""What the user may say to `smi invert` and `smi plan`, and what it means: a model, a work plan and a config."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from smi.cli_words import parse_classes, parse_duration, parse_numbers, parse_setting, parse_shard, read_lines, slug
from smi.config import PRESETS, Config, preset
from smi.errors import SmiError
from smi.named_losses import NAMED, make_losses, parse_loss
from smi.state import ModelInfo, WorkPlan

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.logs import Log
    from smi.objectives import Objective
    from smi.time_left import TimeLeft

EMBEDDED_TEACHER = "embedded:teacher"
# With the demo preset and no number asked for: a sheet of four images for each of the ten classes.
DEMO_IMAGES = 40

_WHAT, _HOW_MUCH = "What to invert, and where", "How much"
_SCHEDULE, _OBJECTIVES, _RUN = "Schedule and method", "Objectives (weights)", "Run"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False, **more)


def _choices(name: str) -> Callable[[], list[str]]:
    """Completions for a config option: the words its annotation allows."""

    def words() -> list[str]:
        kind = get_type_hints(Config)[name]
        nested = [get_args(part) or (part,) for part in get_args(kind)]
        return [word for part in nested for word in part if isinstance(word, str)]

    return words


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="embedded:teacher, a timm name such as deit_base_patch16_224.fb_in1k, hf-hub:OWNER/NAME or "
        "local-dir:FOLDER; smi models lists names.",
    ),
]


Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", help="A second model of the same classes. Default: the embedded one's own.", show_default=False
    ),
]
JudgeCheckpoint = Annotated[
    Path | None, typer.Option("--judge-checkpoint", help="Weights to load into it.", show_default=False)
]


def check_judge(judge: str | None, checkpoint: Path | None) -> None:
    if checkpoint is not None and judge is None:
        raise SmiError("--judge-checkpoint goes with --judge; name its architecture.")


def load_judge(judge: str | None, checkpoint: Path | None, info: ModelInfo) -> Any:
    """The network that --judge names; None without one."""
    if judge is None:
        return None
    from smi.models import load_model

    return load_model(judge, checkpoint=checkpoint, num_classes=None if checkpoint is None else info.num_classes)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: ModelName = EMBEDDED_TEACHER
    checkpoint: Annotated[
        Path | None, _option("--checkpoint", panel=_WHAT, help="Weights to load into MODEL (.safetensors, .pth).")
    ] = None
    num_classes: Annotated[
        int | None, _option("--num-classes", panel=_WHAT, help="Classes of the checkpoint's head.")
    ] = None
    img_size: Annotated[
        int | None, _option("--img-size", panel=_WHAT, help="Image side in pixels, where it is not the model's own.")
    ] = None
    no_pretrained: Annotated[
        bool,
        _option("--no-pretrained", panel=_WHAT, help="Random weights, the same for the same seed; downloads nothing."),
    ] = False
    device: Annotated[
        str, _option("--device", panel=_WHAT, help="auto (cuda where there is one), cpu, cuda or cuda:N.")
    ] = "auto"
    backend: Annotated[
        str,
        _option(
            "--backend", panel=_WHAT, help="auto (fused, where that can run the model), triton, cuda, cpu, reference."
        ),
    ] = "auto"

    def load(self, config: Config) -> SparseModel:
        """The model, ready to be inverted.

        Raises:
            SmiError: unknown or unsupported model, unusable weights, no such device.
        """
        from smi.adapters.timm import SparseModel
        from smi.devices import resolve_device

        device = resolve_device(self.device)  # before the model, which may take long to come
        return SparseModel(
            self.build(config.seed),
            name=self.model,
            device=device,
            precision=config.precision,
            ranking=config.model_ranking,
            merge_to=config.model_merge_to,
            backend=self.backend,
        )

    def build(self, seed: int) -> Any:
        """The bare module; random weights depend on `seed` alone, so that the same command finds its pool again."""
        import torch

        from smi.models import load_model

        torch.manual_seed(seed)  # in any case: of other classes than published, a head is random
        return load_model(
            self.model,
            checkpoint=self.checkpoint,
            num_classes=self.num_classes,
            img_size=self.img_size,
            pretrained=not self.no_pretrained,
        )


@dataclass(frozen=True, kw_only=True)
class InvertOptions(ModelOptions):
    """Everything `smi invert` and `smi plan` take."""

    classes: Annotated[
        str | None,
        _option(
            "--classes", panel=_WHAT, metavar="LIST", help="Numbers, ranges or names: 0,3,7-9 or cat,dog. Default: all."
        ),
    ] = None
    class_names: Annotated[
        Path | None,
        _option("--class-names", panel=_WHAT, metavar="FILE", help="Names, one a line, where the model brings none."),
    ] = None

    num_images: Annotated[
        int | None,
        _option("--num-images", "-n", panel=_HOW_MUCH, help="Images in all, spread evenly over the classes."),
    ] = None
    per_class: Annotated[
        int | None, _option("--per-class", panel=_HOW_MUCH, help="Images of each class, in place of --num-images.")
    ] = None
    batch_size: Annotated[
        int | None, _option("--batch-size", "-b", panel=_HOW_MUCH, help="Images inverted together.")
    ] = None
    time_budget: Annotated[
        str | None,
        _option(
            "--time-budget",
            panel=_HOW_MUCH,
            metavar="TIME",
            help="Stop after so long, halfway through a batch: 90s, 10m, 1h30m. The same command goes on.",
        ),
    ] = None

    preset: Annotated[
        str | None,
        _option(
            "--preset",
            panel=_SCHEDULE,
            help=f"Starting point: {', '.join(PRESETS)}. Default: demo for embedded models, else paper-quant.",
            autocompletion=lambda: list(PRESETS),
        ),
    ] = None
    config: Annotated[
        Path | None,
        _option("--config", "-c", panel=_SCHEDULE, metavar="FILE", help="Options from YAML, in place of --preset."),
    ] = None
    settings: Annotated[
        list[str] | None,
        _option(
            "--set", panel=_SCHEDULE, metavar="KEY=VALUE", help="Any option of the config, e.g. beta1=0.9. Repeatable."
        ),
    ] = None
    strategy: Annotated[
        str | None,
        _option(
            "--strategy",
            panel=_SCHEDULE,
            help="sparse, dense, random, rebirth or fusion.",
            autocompletion=_choices("strategy"),
        ),
    ] = None
    semantics: Annotated[
        str | None,
        _option(
            "--semantics",
            panel=_SCHEDULE,
            help="strict (the paper) or official (its published code).",
            autocompletion=_choices("semantics"),
        ),
    ] = None
    iterations: Annotated[
        int | None, _option("--iterations", "-t", panel=_SCHEDULE, help="Update steps for each batch.")
    ] = None
    prune_at: Annotated[
        str | None,
        _option("--prune-at", panel=_SCHEDULE, metavar="LIST", help="Iterations at which patches stop: 50,100."),
    ] = None
    prune_ratio: Annotated[
        str | None,
        _option("--prune-ratio", panel=_SCHEDULE, metavar="LIST", help="Share of the patches stopped at each: .3,.3."),
    ] = None
    schedule: Annotated[
        str | None,
        _option(
            "--schedule",
            panel=_SCHEDULE,
            help="paper, uniform or cosine, in place of --prune-at and --prune-ratio.",
            autocompletion=lambda: ["paper", "uniform", "cosine"],
        ),
    ] = None
    sparsity: Annotated[
        float | None,
        _option("--sparsity", panel=_SCHEDULE, help="Share of the patches that --schedule stops in all: 0.77."),
    ] = None
    budget: Annotated[
        float | None,
        _option("--budget", panel=_SCHEDULE, help="Operations at most, as a share of dense inversion's: 0.25."),
    ] = None
    ranking: Annotated[
        str | None,
        _option("--ranking", panel=_SCHEDULE, help="What patches are ranked by.", autocompletion=_choices("ranking")),
    ] = None
    division: Annotated[
        int | None, _option("--division", panel=_SCHEDULE, help="Images of each trajectory under rebirth.")
    ] = None
    merge_to: Annotated[
        float | None,
        _option("--merge-to", panel=_SCHEDULE, help="Share of the patches left as tokens under fusion: 0.25."),
    ] = None
    jitter: Annotated[
        str | None,
        _option("--jitter", panel=_SCHEDULE, help="patch, pixel or none.", autocompletion=_choices("jitter")),
    ] = None
    best: Annotated[
        bool | None, _option("--best/--last", panel=_SCHEDULE, help="Return each image's best iterate or its last.")
    ] = None

    cross_entropy: Annotated[float | None, _option("--ce", panel=_OBJECTIVES, help="Cross-entropy to the class.")] = (
        None
    )
    tv1: Annotated[float | None, _option("--tv1", panel=_OBJECTIVES, help="Total variation, absolute.")] = None
    tv2: Annotated[float | None, _option("--tv2", panel=_OBJECTIVES, help="Total variation, squared.")] = None
    l2: Annotated[float | None, _option("--l2", panel=_OBJECTIVES, help="Norm of the image.")] = None
    loss: Annotated[
        list[str] | None,
        _option(
            "--loss",
            panel=_OBJECTIVES,
            metavar="NAME[:KEY=VALUE,...]",
            help="Another loss, e.g. margin:weight=0.1; smi losses lists them. Repeatable.",
            autocompletion=lambda: list(NAMED),
        ),
    ] = None
    learning_rate: Annotated[
        float | None, _option("--lr", panel=_OBJECTIVES, help="Adam's step on the normalised pixels.")
    ] = None
    lr_schedule: Annotated[
        str | None,
        _option("--lr-schedule", panel=_OBJECTIVES, help="constant or cosine.", autocompletion=_choices("lr_schedule")),
    ] = None
    warmup: Annotated[
        int | None, _option("--warmup", panel=_OBJECTIVES, help="Iterations in which the step rises to --lr.")
    ] = None

    out: Annotated[
        Path | None,
        _option("--out", "-o", panel=_RUN, metavar="DIR", help="The pool. Default: pools/MODEL-STRATEGY."),
    ] = None
    overwrite: Annotated[bool, _option("--overwrite", panel=_RUN, help="Start over when the pool exists.")] = False
    join: Annotated[
        bool | None,
        _option(
            "--join/--no-join",
            panel=_RUN,
            help="Share the work with other runs on the pool that join too. Default: where torchrun started several.",
        ),
    ] = None
    shard: Annotated[
        str | None, _option("--shard", panel=_RUN, metavar="I/N", help="Only the batches I, I + N, I + 2 N, ...")
    ] = None
    log: Annotated[
        Path | None,
        _option("--log", panel=_RUN, metavar="FILE", help="Append losses, speed and time left to it as JSON lines."),
    ] = None
    tensorboard: Annotated[
        Path | None, _option("--tensorboard", panel=_RUN, metavar="DIR", help="The same for TensorBoard.")
    ] = None
    log_every: Annotated[
        int | None, _option("--log-every", panel=_RUN, help="Iterations between two entries of both, 20 unless given.")
    ] = None
    seed: Annotated[int | None, _option("--seed", panel=_RUN, help="The one source of randomness.")] = None
    precision: Annotated[
        str | None,
        _option(
            "--precision",
            panel=_RUN,
            help="For the network only: fp32 or bf16; on fused kernels tf32 or fp16 too.",
            autocompletion=_choices("precision"),
        ),
    ] = None
    dry_run: Annotated[
        bool, _option("--dry-run", panel=_RUN, help="Only predict time, memory and disk, as smi plan does.")
    ] = False
    json: Annotated[bool, _option("--json", panel=_RUN, help="One JSON object for each event in place of bars.")] = (
        False
    )

    # Flags that are options of the config under the same name.
    _CONFIG_FLAGS: ClassVar[tuple[str, ...]] = (
        *(
            "strategy",
            "semantics",
            "iterations",
            "ranking",
            "division",
            "merge_to",
            "jitter",
            "best",
            "batch_size",
            "seed",
            "precision",
        ),
        *("cross_entropy", "tv1", "tv2", "l2", "learning_rate", "lr_schedule", "warmup"),
    )

    def __post_init__(self) -> None:
        """Refuse at once what no model could mend."""
        if self.preset and self.config:
            raise SmiError("--preset and --config exclude each other; write `preset: NAME` into the file.")
        if self.num_images is not None and self.per_class is not None:
            raise SmiError("--num-images and --per-class exclude each other; give one of them.")
        if self.per_class is not None and self.per_class < 1:
            raise SmiError(f"--per-class is {self.per_class}; expected at least 1.")
        if self.makes_schedule and (self.prune_at is not None or self.prune_ratio is not None):
            raise SmiError("--schedule, --sparsity and --budget choose --prune-at and --prune-ratio; give either.")
        if self.time_budget is not None:
            parse_duration(self.time_budget)
        if self.shard is not None:
            parse_shard(self.shard)
        if self.log_every is not None and self.log_every < 1:
            raise SmiError(f"--log-every is {self.log_every}; expected at least 1.")
        if self.log_every is not None and self.log is None and self.tensorboard is None:
            raise SmiError(f"--log-every {self.log_every} goes with --log or --tensorboard; name one of them.")
        if self.tensorboard is not None:
            from smi.logs import check_tensorboard

            check_tensorboard()
        for text in self.loss or ():
            parse_loss(text)

    @property
    def demo(self) -> bool:
        return self.preset == "demo" or (not (self.preset or self.config) and self.model.startswith("embedded:"))

    @property
    def makes_schedule(self) -> bool:
        return any(value is not None for value in (self.schedule, self.sparsity, self.budget))

    def build(self, seed: int) -> Any:
        model = super().build(seed)
        if self.class_names is not None:
            names = read_lines(self.class_names)
            if len(names) != model.num_classes:
                raise SmiError(
                    f"--class-names {str(self.class_names)!r} has {len(names)} lines, the model {model.num_classes} "
                    f"classes; write a name for each, one a line."
                )
            model.pretrained_cfg = {**(model.pretrained_cfg or {}), "label_names": names}
        return model

    def make_config(self) -> Config:
        """Preset or file, then --set, then the named flags; the later wins. Resolved.

        With --schedule, --sparsity or --budget nothing is pruned until `fit_schedule` knows the model.
        """
        if self.config:
            base = Config.load(self.config)
        else:
            base = preset(self.preset or ("demo" if self.demo else "paper-quant"))
        changes = dict(parse_setting(text) for text in self.settings or ())
        changes |= {n: v for n in self._CONFIG_FLAGS if (v := getattr(self, n)) is not None}
        for name in ("prune_at", "prune_ratio"):
            if self.makes_schedule:
                changes[name] = []
            elif getattr(self, name) is not None:
                changes[name] = parse_numbers(f"--{name.replace('_', '-')}", getattr(self, name))
        config = base.replace(**changes).resolved()
        self._check_used(config)
        return config

    def _check_used(self, config: Config) -> None:
        """Refuse flags that the strategy passes over. A file or --set may hold them, for several strategies."""
        pruned, reborn, fused = config.scheduled, config.strategy == "rebirth", config.strategy == "fusion"
        ranked = config.strategy in ("sparse", "rebirth") or (pruned and config.result_mask == "reranked")
        for name, used, whose in (
            ("prune_at", pruned, "sparse or random"),
            ("prune_ratio", pruned, "sparse or random"),
            ("division", reborn, "rebirth"),
            ("merge_to", fused, "fusion"),
            ("ranking", ranked, "sparse or rebirth"),
        ):
            if getattr(self, name) and not used:
                raise SmiError(
                    f"--{name.replace('_', '-')} goes with the strategy {whose}, and this is {config.strategy}; "
                    "leave it out, or name the other with --strategy."
                )

    def fit_schedule(self, config: Config, model: SparseModel) -> Config:
        """`config` with the prunings that --schedule, --sparsity or --budget mean for `model`."""
        if not self.makes_schedule:
            return config
        from smi.flops import count_flops
        from smi.schedules import scheduled

        return scheduled(
            config,
            self.schedule or "paper",
            model.info.num_patches,
            sparsity=self.sparsity,
            budget=self.budget,
            flops=lambda kept: count_flops(model, kept),
        )

    def make_objectives(self, model: SparseModel) -> list[Objective]:
        """What every --loss names, for inverting `model`. Raises `SmiError` as `smi.named_losses.make_losses`."""
        return make_losses([parse_loss(text) for text in self.loss or ()], model)

    def make_plan(self, info: ModelInfo, config: Config) -> WorkPlan:
        """The targets: every class unless --classes, one batch (demo: 40 images) unless a number was given."""
        classes = list(range(info.num_classes)) if self.classes is None else parse_classes(self.classes, info)
        repeat = config.images_per_trajectory
        if self.per_class is not None:
            count = self.per_class * len(classes)
        elif self.num_images is not None:
            count = self.num_images
        else:
            count = -(-DEMO_IMAGES // repeat) * repeat if self.demo else config.batch_size * repeat
        return WorkPlan.balanced(classes, count, config.batch_size, info.num_classes, repeat=repeat)

    @property
    def joins(self) -> bool:
        """Several processes of one torchrun have no other way to be useful."""
        if self.join is not None:
            return self.join
        return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1

    def make_log(self, left: TimeLeft) -> Log:
        """What --log and --tensorboard ask for. TensorBoard wants a folder for each of several runs at a time."""
        from smi.logs import Log, worker_name

        folder = self.tensorboard / worker_name() if self.tensorboard and self.join else self.tensorboard
        return Log(self.log, folder, every=self.log_every or 20, left=left)

    def pool(self, config: Config) -> Path:
        return self.out or Path("pools") / f"{slug(self.model)}-{config.strategy}"


def command_options(kind: type[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Turn ``command(options: kind)`` into a function with one keyword for each field, which is what typer reads."""

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            command(kind(**values))

        hints = get_type_hints(kind, include_extras=True)
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {field.name: hints[field.name] for field in fields(kind)}
        parameters = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is MISSING else f.default,
                annotation=hints[f.name],
            )
            for f in fields(kind)
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate
