"""The ``smi pool`` commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from smi.cli_progress import duration, size

pool_app = typer.Typer(help="Verify, merge, pack and count pools.", no_args_is_help=True)

_Pool = Annotated[
    Path, typer.Argument(metavar="POOL", help="Folder that smi invert or smi pool pack has filled.", show_default=False)
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)]


@pool_app.command()
def verify(pool: _Pool, as_json: _Json = False) -> None:
    """Read every batch and compare it with the hash stored when it was made. Exit code 1 if anything is wrong."""
    from smi.pool_tools import verify as check

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")
        found = check(pool, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        for problem in found.problems:
            print(problem)
        print(f"{found.batches} batches with {found.images} images are whole, {found.missing} are not made yet")
        if found.unhashed:
            print(f"{found.unhashed} of them are of a version that stored no hash: their form is right")
    if found.problems:
        raise typer.Exit(1)


@pool_app.command()
def merge(
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART...", help="Pools of one plan, in any form.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The pool to fill.", show_default=False)],
) -> None:
    """Put parts of one plan, made with --shard in folders of their own, into one pool; the parts stay as they are.

    One packed pool as the only part is unpacked.
    """
    from smi.pool_tools import merge as put_together

    pool = put_together(parts, out)
    print(
        f"{out}: {len(pool)} of {len(pool.plan.targets)} images, {len(pool.batches)} of {pool.plan.num_batches} batches"
    )


@pool_app.command()
def pack(
    pool: _Pool,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed pool.", show_default=False)],
    shard_images: Annotated[int, typer.Option("--shard-images", help="Images in each tar file.")] = 1000,
    pixels: Annotated[
        str, typer.Option("--pixels", help="float32 loses nothing; kept: of kept patches; png: pictures.")
    ] = "float32",
) -> None:
    """Write a pool as tar files that WebDataset reads and a Parquet index; interrupted, the same command goes on.

    Examples:

      smi pool pack pools/deit-b --out packed/deit-b

      smi pool pack pools/deit-b --out packed/kept --pixels kept

      smi pool pack pools/deit-b --out packed/pictures --pixels png --shard-images 10000
    """
    from smi.packed import pack as write

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing")
        packed = write(
            pool,
            out,
            shard_images=shard_images,
            pixels=pixels,  # type: ignore[arg-type]
            on_images=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{out}: {len(packed)} of {len(packed.plan.targets)} images in {packed.index.shards[-1] + 1} tar files")


@pool_app.command()
def stats(pool: _Pool, as_json: _Json = False) -> None:
    """Count what is in a pool: images of each class, agreement, time, bytes."""
    from smi.pool_tools import stats as count

    found = count(pool)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{pool}: {found['images']} of {found['planned']} images of {found['model']}")
    if found["images"]:
        print(f"  time      {duration(found['seconds'])}, {found['images_per_second']:.3f} images/s of one worker")
        print(f"  work      {found['flops'] / 1e12:.2f} TFLOP")
        print(f"  agreement {found['teacher_agreement']:.1%} with the teacher")
    if found["retried"]:
        print(f"  retried   batches {', '.join(map(str, found['retried']))}: not finite from the seed of the pool")
    names = {"png": "pictures"}
    disk = [f"{size(count)} of {names.get(kind, kind)}" for kind, count in found["bytes"].items()]
    print(f"  disk      {', '.join(disk)}")
    for label, images in found["classes"].items():
        print(f"  {images:>8} {label}")
