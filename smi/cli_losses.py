"""The ``smi losses`` command."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from smi.named_losses import IN_PYTHON, NAMED, usage


def losses(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False,
) -> None:
    """List the losses that [bold]smi invert --loss[/bold] takes, each with an example.

    Those of the config (--ce, --tv1, --tv2, --l2) have options of their own.
    """
    if as_json:
        print(json.dumps({name: {"about": loss.about, "usage": usage(name)} for name, loss in NAMED.items()}))
        return
    for name, loss in NAMED.items():
        print(f"{name:<26}{loss.about}")
        print(f"{'':<26}--loss {usage(name)}")
    print("in Python alone, as smi.losses.NAME:")
    for name, about in IN_PYTHON.items():
        print(f"{name:<26}{about}")
