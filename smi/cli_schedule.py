"""`smi schedule`: how many patches go on when, and what that costs, as a table and a drawing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from smi.cli_options import InvertOptions
from smi.cli_progress import emit
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.config import Config

_WIDTH, _HEIGHT = 60, 8  # of the drawing, in characters
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def schedule(options: InvertOptions) -> None:
    """Show a schedule: patches in every phase, and its share of the operations; takes the options of smi invert.

    Operations are counted, as in [bold]smi plan[/bold]; nothing is inverted.

    [bold]Examples[/bold]

      smi schedule deit_base_patch16_224.fb_in1k

      smi schedule vit_small_patch16_224 --budget 0.25

      smi schedule embedded:teacher --schedule cosine --sparsity 0.8 --iterations 1000
    """
    config = options.make_config()
    if config.strategy == "fusion":
        raise SmiError("strategy 'fusion' prunes nothing, so there is no schedule; `smi plan` tells what it costs.")
    model = options.load(config)
    config = options.fit_schedule(config, model)

    from smi.flops import count_flops
    from smi.schedules import phases, share_of_flops

    num_patches = model.info.num_patches
    flops = functools.cache(lambda kept: count_flops(model, kept))
    found = phases(config, num_patches)
    total = share_of_flops(config, num_patches, flops)
    if options.json:
        emit(
            "schedule",
            model=model.info.name,
            prune_at=list(config.prune_at),
            prune_ratio=list(config.prune_ratio),
            phases=[{"start": start, "stop": stop, "kept": kept, "flops": flops(kept)} for start, stop, kept in found],
            share_of_flops=total,
        )
        return
    table = Table(title=f"{model.info.name}, {config.strategy}, {config.iterations} iterations", title_justify="left")
    for name in ("iterations", "patches", "of all", "FLOPs each", "FLOPs so far"):
        table.add_column(name, justify="right")
    dense, spent = flops(num_patches), 0.0
    for start, stop, kept in found:
        spent += (stop - start) * flops(kept) / (config.iterations * dense)
        each = flops(kept) / dense
        table.add_row(f"{start}-{stop - 1}", f"{kept}", f"{kept / num_patches:.1%}", f"{each:.1%}", f"{spent:.1%}")
    console = Console()
    console.print(table)
    console.print("\n".join(drawing(config, num_patches)), highlight=False)
    print(f"operations  {total:.1%} of dense inversion's, forward and backward (counted)")
    if config.prune_at and config.scheduled:
        at, ratio = (",".join(f"{value:g}" for value in values) for values in (config.prune_at, config.prune_ratio))
        print(f"the same    --iterations {config.iterations} --prune-at {at} --prune-ratio {ratio}")


def drawing(config: Config, num_patches: int) -> list[str]:
    """Lines of a bar chart of the patches kept (upwards) at every iteration (to the right)."""
    from smi.schedules import phases

    found = phases(config, num_patches)
    width = min(_WIDTH, config.iterations)
    kept = [
        next(k for start, stop, k in found if start <= column * config.iterations // width < stop)
        for column in range(width)
    ]
    eighths = [max(1, round(8 * _HEIGHT * count / num_patches)) for count in kept]
    label = len(str(num_patches))
    lines = []
    for row in reversed(range(_HEIGHT)):
        bars = "".join(_EIGHTHS[min(8, max(0, height - 8 * row))] for height in eighths)
        edge = {_HEIGHT - 1: f"{num_patches}", 0: "0"}.get(row, "")
        lines.append(f"{edge:>{label}} ┤{bars}")
    lines.append(f"{'':>{label}} └{'─' * width}")
    lines.append(f"{'':>{label}}  0{config.iterations:>{width - 1}}")
    return lines
