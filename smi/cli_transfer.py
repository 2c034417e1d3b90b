"""The ``smi transfer`` command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smi.cli_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class TransferOptions(ModelOptions):
    """What `smi transfer` takes; the model is the student."""

    pool: Annotated[Path, typer.Option("--pool", help="Folder that smi invert has filled.", show_default=False)]
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the student.", show_default=False)]
    mode: Annotated[str, typer.Option("--mode", help="probe (the classifier alone) or finetune.")] = "probe"
    tokens: Annotated[str, typer.Option("--tokens", help="kept, all or auto: what a ViT student is fed.")] = "auto"
    fill: Annotated[str, typer.Option("--fill", help="What dropped patches show: as-is, black, mean, noise.")] = "mean"
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the images.")] = 50
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a step.")] = 64
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Of AdamW. Default: the mode's own.", show_default=False)
    ] = None
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0
    temperature: Annotated[float, typer.Option("--temperature", help="Of the softened distributions.")] = 20.0
    holdout: Annotated[float, typer.Option("--holdout", help="Share of the images that chooses the student.")] = 0.1
    seed: Annotated[int, typer.Option("--seed", help="Of split, order, dropout and random weights.")] = 0
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False


def transfer(options: TransferOptions) -> None:
    """Teach a student what the teacher says of a pool's images; the same command goes on after an interruption.

    [bold]Examples[/bold]

      smi transfer vit_tiny_patch16_224 --pool pools/deit-b --out students/tiny --mode finetune

      smi transfer resnet18 --num-classes 10 --no-pretrained --pool demo-pool --out students/r18 --mode finetune
    """
    from smi.transfer import Epoch, TransferConfig, teach

    config = TransferConfig(
        mode=options.mode,  # type: ignore[arg-type]  # checked there
        tokens=options.tokens,  # type: ignore[arg-type]
        fill=options.fill,  # type: ignore[arg-type]
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        temperature=options.temperature,
        holdout=options.holdout,
        seed=options.seed,
    )
    student = options.build(options.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=options.json) as bar:
        task = bar.add_task("epochs", total=config.epochs)

        def told(number: int, epoch: Epoch) -> None:
            said = f"loss {epoch.loss:.4f}, agreement {epoch.agreement:.1%}"
            bar.update(task, completed=number + 1, description=said)

        found = teach(
            student, options.pool, options.out, config, name=options.model, device=options.device, progress=told
        )
    best = found.curve[found.best]
    if options.json:
        curve = [asdict(epoch) for epoch in found.curve]
        print(json.dumps({"path": str(found.path), "best": found.best, "fed": found.fed, "curve": curve}))
        return
    print(f"{options.model}, fed {found.fed} patches: epoch {found.best} of {len(found.curve)} is the best")
    print(f"  agrees with the teacher on {best.agreement:.1%} of the images held out, loss {best.holdout_loss:.4f}")
    print(f"  {found.path / 'student.safetensors'}")
