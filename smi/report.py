"""`smi report`: a pool as one HTML page for people, and its headline numbers as plain data.

The page needs nothing but itself: styles and pictures are inlined, there is no script, and it follows the reader's
light or dark setting. The pictures also lie beside it as PNG files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smi.errors import SmiError
from smi.files import atomic_write, remove_temps, writing
from smi.packed import open_pool
from smi.pool import Pool
from smi.report_data import Tally, collect

if TYPE_CHECKING:
    from torch import nn

    from smi.state import ModelInfo


_ABANDONED = 3600.0  # seconds after which no other report is still being written


def summary(pool_path: str | Path, *, judge: nn.Module | None = None) -> dict[str, Any]:
    """The headline numbers of a pool, JSON-serialisable; shares lie in 0..1, ``None`` is "not known".

    Args:
        pool_path: folder of a pool with at least one finished batch.
        judge: see `write_report`.

    Raises:
        SmiError: not a pool, no finished batch, a damaged shard, a judge over other classes.
    """
    pool, tally = _open(pool_path, judge, max_images=0)
    return {**tally.summary(), "planned_images": len(pool.plan.targets), "complete": pool.complete}


def write_report(
    pool_path: str | Path, out: str | Path | None = None, *, judge: nn.Module | None = None, max_images: int = 16
) -> Path:
    """Write the page and return its path.

    Args:
        pool_path: folder of a pool with at least one finished batch.
        out: the HTML file, by default ``report/report.html`` in the pool; PNG files named after it are put beside it.
        judge: a second classifier over the same classes, in the same order, that looks at the whole images. It is fed
            what its ``pretrained_cfg`` (as timm sets it) says of mean and std, without one the pool's own
            normalisation. By default the embedded judge for pools of an embedded model, otherwise none.
        max_images: of how many images pictures are shown, >= 0.

    Raises:
        SmiError: not a pool, no finished batch, a damaged shard, a judge over other classes, an unwritable `out`,
            matplotlib is missing.
    """
    try:
        from smi.report_page import render
    except ModuleNotFoundError as error:
        raise SmiError(f"a report needs {error.name}; install it with: pip install {error.name}.") from None
    target = Path(pool_path) / "report" / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise SmiError(f"{str(target)!r} is a folder; give the name of the HTML file to write.")
    pool, tally = _open(pool_path, judge, max_images)
    page, pictures = render(tally, pool.manifest, planned=len(pool.plan.targets))
    with writing(target, len(page) + sum(map(len, pictures.values()))):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_temps(target.parent, older=_ABANDONED)
        for name, png in pictures.items():
            atomic_write(target.with_name(f"{target.stem}-{name}.png"), png)
        atomic_write(target, page.encode())
    return target


def _open(pool_path: str | Path, judge: nn.Module | None, max_images: int) -> tuple[Pool, Tally]:
    pool = open_pool(pool_path)
    if not len(pool):
        raise SmiError(f"the pool {str(pool_path)!r} has no finished batch yet; go on with `smi invert` first.")
    judge = own_judge(pool.info) if judge is None else judge
    return pool, collect(pool, pool.info, pool.config, judge=judge, max_images=max_images)


def own_judge(info: ModelInfo) -> nn.Module | None:
    if not info.name.startswith("embedded:"):
        return None
    from smi.embedded import load_judge

    try:
        return load_judge()
    except FileNotFoundError:  # installed without the weights: the report says that nobody judged
        return None
