"""`smi plan`: what an inversion will take, before it is begun."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi.cli_options import InvertOptions
from smi.cli_progress import duration, emit, size
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.predict import Prediction
    from smi.state import ModelInfo


@dataclass(frozen=True, kw_only=True)
class PlanOptions(InvertOptions):
    """What `smi plan` takes: the options of `smi invert`, and a price."""

    price: Annotated[
        float | None,
        typer.Option(
            "--price", metavar="PER_HOUR", help="Of this device an hour: what it costs, too.", show_default=False
        ),
    ] = None


def plan(options: PlanOptions) -> None:
    """Predict time, memory and disk of an inversion; takes the options of [bold]smi invert[/bold].

    Arithmetic is counted, time is measured on a few real iterations of each phase.

    [bold]Examples[/bold]

      smi plan deit_base_patch16_224.fb_in1k -n 128 --preset paper-quant

      smi plan deit_base_patch16_224.fb_in1k -n 1000000 --price 2.50
    """
    if options.price is not None and not (0 <= options.price < math.inf):
        raise SmiError(f"--price is {options.price:g}; expected what the device costs an hour, 0 or more.")
    show_plan(options, options.price)


def show_plan(options: InvertOptions, price: float | None = None) -> None:
    """Predict and print, as `smi plan` and `smi invert --dry-run` do."""
    config = options.make_config()
    model = options.load(config)
    config = options.fit_schedule(config, model)
    plan = options.make_plan(model.info, config)

    from smi.predict import predict

    prediction = predict(model, plan, config, objectives=options.make_objectives(model))
    costs = None if price is None else prediction.seconds / 3600 * price
    if options.json:
        emit(
            "plan",
            model=asdict(model.info),
            config=config.to_dict(),
            out=str(options.pool(config)),
            **asdict(prediction),
            price=costs,
        )
    else:
        _print_prediction(prediction, model.info, model.where, costs)


def _print_prediction(prediction: Prediction, info: ModelInfo, device: str, costs: float | None) -> None:
    table = Table(title=f"{info.name} on {device}, one batch", title_justify="left")
    for name in ("iterations", "patches", "GFLOP each", "s each", "time"):
        table.add_column(name, justify="right")
    for phase in prediction.phases:
        table.add_row(
            f"{phase.start}-{phase.stop - 1}",
            f"{phase.kept}",
            f"{phase.flops / 1e9:.2f}",
            f"{phase.seconds:.3f}",
            duration(phase.seconds * phase.iterations),
        )
    Console().print(table)
    how = "measured" if prediction.memory_measured else "estimated"
    print(f"images  {prediction.images} in {prediction.batches} batches")
    print(f"time    {duration(prediction.seconds)} (extrapolated from a few iterations)")
    print(f"work    {prediction.flops / 1e12:.2f} TFLOP (counted)")
    print(f"memory  {size(prediction.memory_bytes)} at the peak ({how})")
    print(f"disk    {size(prediction.disk_bytes)}")
    if costs is not None:
        print(f"price   {costs:,.2f} on one such device, {1e6 * costs / prediction.images:,.2f} for a million images")
