"""The ``smi profile`` command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from smi.cli_options import ModelOptions
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.profile import Profile


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(ModelOptions):
    """What `smi profile` takes."""

    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images.", min=1)] = 8
    kept: Annotated[
        int | None, typer.Option("--kept", help="Patches that are fed. Default: a quarter of them.", show_default=False)
    ] = None
    precision: Annotated[str, typer.Option("--precision", help="fp32, tf32, bf16 or fp16.")] = "fp32"
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a trace for ui.perfetto.dev.", show_default=False)
    ] = None
    tool: Annotated[
        str, typer.Option("--tool", help="Also run under proton or ncu, on a GPU; their file lands here.")
    ] = ""
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False


def profile(options: ProfileOptions) -> None:
    """Time every operator of one iteration, against what this machine could do.

    Each is timed by itself, so that operands may come from a cache: above 100 % of its roofline it does.

    [bold]Examples[/bold]

      smi profile

      smi profile deit_tiny_patch16_224 --no-pretrained --kept 46 --trace trace.json

      smi profile deit_base_patch16_224 --no-pretrained --precision bf16 -b 128 --tool ncu
    """
    from smi.config import Config
    from smi.profile import profile as measure

    if options.tool not in ("", "proton", "ncu"):
        raise SmiError(f"--tool is {options.tool!r}; expected proton or ncu.")
    if options.tool == "ncu":
        _under_ncu()
        return
    model = options.load(Config(precision=options.precision))  # type: ignore[arg-type]
    found = measure(
        model, batch_size=options.batch_size, kept=options.kept, trace=options.trace, proton=options.tool == "proton"
    )
    if options.json:
        print(json.dumps({**asdict(found), "seconds": found.seconds}))
    else:
        _print(found)


def _under_ncu() -> None:
    """This very command again, inside NVIDIA Nsight Compute."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SmiError("ncu is not on PATH; it is part of NVIDIA Nsight Compute.")
    words = sys.argv[1:]
    words = [w for i, w in enumerate(words) if w not in ("--tool", "--tool=ncu") and words[i - 1] != "--tool"]
    command = [ncu, "--set", "full", "--nvtx", "--target-processes", "all", "--kernel-name-base", "function"]
    subprocess.run([*command, "--export", "smi-profile", "-f", sys.executable, "-m", "smi.cli", *words], check=True)


def _print(found: Profile) -> None:
    """No rules between columns: on a CPU all of them fit into 80 characters."""
    compiled = any(row.registers or row.shared for row in found.rows)
    title = f"{found.model} on {found.where}: {found.batch_size} images, {found.kept} patches"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("operator", no_wrap=True)
    table.add_column("largest\noperand", justify="right")
    for name in ("calls", "ms", "share", "GB/s", "TFLOP/s", "of its\nroofline"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("registers", "shared") if compiled else ():
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            str(row.calls),
            f"{1e3 * row.seconds:.3f}",
            f"{row.share:.1%}",
            f"{row.bytes_per_second / 1e9:.1f}",
            f"{row.flops_per_second / 1e12:.3f}" if row.flops_per_second else "-",
            f"{row.roofline:.0%}",
            *((str(row.registers or "-"), str(row.shared or "-")) if compiled else ()),
        )
    Console().print(table)
    print(f"operators  {1e3 * found.seconds:.3f} ms, each timed by itself")
    print(f"iteration  {1e3 * found.iteration:.3f} ms, as an inversion runs it")
    print(f"ceilings   {found.copy / 1e9:.1f} GB/s of a copy, {found.matmul / 1e12:.3f} TFLOP/s of a matrix product")
    if found.trace:
        print(f"trace      {found.trace}")
