"""The ``smi transfer`` command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smi.cli_options import EMBEDDED_TEACHER, ModelOptions
from smi.cli_progress import progress
from smi.cli_words import command_line
from smi.config import PRESETS, preset_or_file
from smi.errors import SmiError
from smi.named_losses import NAMED, make_losses, parse_loss

if TYPE_CHECKING:
    from smi.inversion import Inversion
    from smi.lessons import Synthesis
    from smi.transfer import Epoch


@dataclass(frozen=True, kw_only=True)
class TransferOptions(ModelOptions):
    """What `smi transfer` takes; the model is the student."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student.", show_default=False)]
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Folder that smi invert has filled.", show_default=False)
    ] = None
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="In place of --pool: invert this model meanwhile.", show_default=False),
    ] = None
    teacher_checkpoint: Annotated[
        Path | None, typer.Option("--teacher-checkpoint", help="Weights to load into it.", show_default=False)
    ] = None
    teacher_classes: Annotated[
        int | None, typer.Option("--teacher-classes", help="Classes of the checkpoint's head.", show_default=False)
    ] = None
    inversion: Annotated[
        str | None,
        typer.Option(
            "--inversion",
            metavar="PRESET|FILE",
            help=f"How: {', '.join(PRESETS)}, or options from YAML. Default: demo for the embedded teacher, else "
            "paper-transfer.",
            show_default=False,
        ),
    ] = None
    loss: Annotated[
        list[str] | None,
        typer.Option(
            "--loss",
            metavar="NAME[:KEY=VALUE,...]",
            help="With --teacher: another loss of the inversion; smi losses lists them. Repeatable.",
            autocompletion=lambda: list(NAMED),
            show_default=False,
        ),
    ] = None
    mode: Annotated[str, typer.Option("--mode", help="probe (the classifier alone) or finetune.")] = "probe"
    tokens: Annotated[str, typer.Option("--tokens", help="kept, all or auto: what a ViT student is fed.")] = "auto"
    fill: Annotated[str, typer.Option("--fill", help="What dropped patches show: as-is, black, mean, noise.")] = "mean"
    epochs: Annotated[
        int, typer.Option("--epochs", help="Looks at the images held out; with --teacher, batches to make.")
    ] = 50
    passes: Annotated[int, typer.Option("--passes", help="Over the images of an epoch.")] = 1
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a step.")] = 64
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, or sgd with momentum (the paper's).")] = "adamw"
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="At the start. Default: the mode's own; sgd 0.1.", show_default=False)
    ] = None
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of the optimizer.")] = 0.0
    temperature: Annotated[float, typer.Option("--temperature", help="Of the softened distributions.")] = 20.0
    holdout: Annotated[
        float | None,
        typer.Option("--holdout", help="Share of a pool that chooses the student. Default: 0.1.", show_default=False),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Of split, order, dropout and random weights.")] = 0
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False

    def __post_init__(self) -> None:
        if (self.pool is None) == (self.teacher is None):
            raise SmiError("give either --pool, with images that are there, or --teacher, to make them meanwhile.")
        names = ("teacher_checkpoint", "teacher_classes", "inversion", "loss")
        given = [name for name in names if getattr(self, name) not in (None, [])]
        if given and self.teacher is None:
            raise SmiError(f"--{given[0].replace('_', '-')} goes with --teacher; a pool has been made already.")
        if self.backend != "auto" and self.teacher is None:
            raise SmiError(f"--backend {self.backend} goes with --teacher, which it inverts; leave it out.")
        for text in self.loss or ():
            parse_loss(text)
        if self.holdout is not None and self.teacher is not None:
            raise SmiError(
                f"--holdout {self.holdout:g} goes with --pool; of images made meanwhile the first batch is held out."
            )

    def make_synthesis(self, on_iteration: Any) -> Synthesis:
        """The teacher, ready to be inverted, and how. Raises `SmiError` as `smi invert` does."""
        from smi.adapters.timm import SparseModel
        from smi.devices import resolve_device
        from smi.lessons import Synthesis
        from smi.models import load_model

        assert self.teacher is not None
        name = self.inversion or ("demo" if self.teacher == EMBEDDED_TEACHER else "paper-transfer")
        config = preset_or_file(name).replace(snapshots=0).resolved()
        network = load_model(self.teacher, checkpoint=self.teacher_checkpoint, num_classes=self.teacher_classes)
        teacher = SparseModel(
            network,
            name=self.teacher,
            device=resolve_device(self.device),
            precision=config.precision,
            ranking=config.model_ranking,
            merge_to=config.model_merge_to,
            backend=self.backend,
        )
        objectives = make_losses([parse_loss(text) for text in self.loss or ()], teacher)
        return Synthesis(teacher, config, on_iteration, objectives)


def transfer(options: TransferOptions) -> None:
    """Teach a student what the teacher says of synthetic images; the same command goes on after an interruption.

    The images are a pool's, or made meanwhile, a fresh batch for every epoch, as in the paper.

    [bold]Examples[/bold]

      smi transfer vit_tiny_patch16_224 --pool pools/deit-b --out students/tiny --mode finetune

      smi transfer resnet18 --num-classes 10 --no-pretrained --pool demo-pool --out students/r18 --mode finetune

      smi transfer deit_tiny_patch16_224 --teacher deit_base_patch16_224 --out students/live --optimizer sgd
    """
    from smi.models import EMBEDDED
    from smi.transfer import TransferConfig, teach

    config = TransferConfig(
        mode=options.mode,  # type: ignore[arg-type]  # checked there
        tokens=options.tokens,  # type: ignore[arg-type]
        fill=options.fill,  # type: ignore[arg-type]
        epochs=options.epochs,
        passes=options.passes,
        batch_size=options.batch_size,
        optimizer=options.optimizer,  # type: ignore[arg-type]
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        temperature=options.temperature,
        holdout=TransferConfig.holdout if options.holdout is None else options.holdout,
        seed=options.seed,
    )
    student = options.build(options.seed)
    with progress("epochs", silent=options.json) as tell:
        finished = 0

        def told(number: int, epoch: Epoch) -> None:
            nonlocal finished
            finished = number + 1
            tell(finished, config.epochs, f"epochs: loss {epoch.loss:.4f}, agreement {epoch.agreement:.1%}")

        def inverting(batch: int, loop: Inversion) -> None:
            said = f"epochs, batch {batch}: iteration {loop.iteration}/{loop.config.iterations}"
            tell(finished, config.epochs, said)

        images = options.make_synthesis(inverting) if options.pool is None else options.pool
        found = teach(student, images, options.out, config, name=options.model, device=options.device, progress=told)
    best = found.curve[found.best]
    if options.json:
        curve = [asdict(epoch) for epoch in found.curve]
        print(json.dumps({"path": str(found.path), "best": found.best, "fed": found.fed, "curve": curve}))
        return
    print(f"{options.model}, fed {found.fed} patches: epoch {found.best + 1} of {len(found.curve)} is the best")
    print(f"  agrees with the teacher on {best.agreement:.1%} of the images held out, loss {best.holdout_loss:.4f}")
    student_file = found.path / "student.safetensors"
    print(f"  {student_file}")
    if options.model not in EMBEDDED:  # which take no checkpoint
        again = {"--checkpoint": student_file, "--num-classes": options.num_classes, "--img-size": options.img_size}
        words = [word for pair in again.items() if pair[1] is not None for word in pair]
        print(f"next: {command_line('smi', 'evaluate', options.model, *words, '--data', 'IMAGES')}")
