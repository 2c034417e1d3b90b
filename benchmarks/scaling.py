#!/usr/bin/env python
"""How the cost of an iteration grows with tokens, images, depth and image size, with fitted exponents and a plot.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --precision bf16 --budget 60

Along each axis everything else stays as it is; the exponent is the slope of log seconds over log size by least squares,
over the upper half of the sizes, three at least, where fixed costs matter least. Writes a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import smi
from benchmarks.timing import RESULTS, environment, quantiles, write_result
from smi.devices import resolve_device
from smi.flops import count_flops
from smi.profile import DTYPES, in_phase


@dataclass(frozen=True)
class Point:
    """One network and batch: width and heads of DeiT-Tiny, patches of 16 x 16 pixels."""

    kept: int = 46
    images: int = 8
    depth: int = 12
    size: int = 224


AXES: dict[str, list[int]] = {
    "kept": [46, 95, 196, 400, 576, 1024],
    "images": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "depth": [2, 4, 8, 12, 24],
    "size": [128, 224, 384, 512],
}
NEEDED_SIZE = {kept: 16 * side for kept in AXES["kept"] for side in [max(14, int(np.ceil(np.sqrt(kept))))]}


def points(axis: str, few: bool) -> list[Point]:
    base = Point(images=2, depth=2) if few else Point()
    sizes = AXES[axis][:3] if few else AXES[axis]
    made = [replace(base, **{axis: value}) for value in sizes]
    if axis == "kept":
        made = [replace(point, size=NEEDED_SIZE[point.kept]) for point in made]
    return made


def measure(point: Point, device: torch.device, precision: Any, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=point.size, embed_dim=192, depth=point.depth, num_heads=3, num_classes=1000
    ).eval()
    model = smi.SparseModel(network, name="ViT", device=device, precision=precision)
    inversion = in_phase(model, point.images, point.kept)
    stride = 8 if device.type == "cuda" else 1
    seconds = quantiles(lambda: inversion._advance(stride), device, rounds, repeats=1, captured=False)
    return {
        "kept": point.kept,
        "images": point.images,
        "depth": point.depth,
        "size": point.size,
        "seconds": {name: value / stride for name, value in seconds.items()},
        "gflop": count_flops(model, point.kept) * point.images / 1e9,
    }


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Slope of log seconds over log size, of the upper half, three points at least; None of fewer than two."""
    half = max(0, min(len(sizes) // 2, len(sizes) - 3))
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)[0])


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(record["axes"]), figsize=(4 * len(record["axes"]), 3.2))
    for place, (axis, entry) in zip(np.atleast_1d(places), record["axes"].items(), strict=True):
        sizes = [row[axis] for row in entry["rows"]]
        place.loglog(sizes, [1e3 * row["seconds"]["median"] for row in entry["rows"]], "o-", base=2)
        slope = "" if entry["exponent"] is None else f", exponent {entry['exponent']:.2f}"
        place.set_title(f"{axis}{slope}", fontsize=10)
        place.set_xlabel(axis)
        place.set_ylabel("ms an iteration")
        place.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        place.minorticks_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--few", action="store_true", help="a few small points, to see that it runs")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no point is begun")
    parser.add_argument("--slowest", type=float, default=20.0, help="leave an axis once an iteration takes so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    began, device = time.monotonic(), resolve_device(args.device)
    record: dict[str, Any] = {
        "benchmark": "scaling",
        "precision": args.precision,
        "rounds": args.rounds,
        "environment": environment(device),
        "axes": {},
    }
    name = f"scaling-{args.precision}"
    for axis in AXES:
        rows: list[dict[str, Any]] = []
        record["axes"][axis] = {"rows": rows, "exponent": None}
        for point in points(axis, args.few):
            if time.monotonic() - began > args.budget or (rows and rows[-1]["seconds"]["median"] > args.slowest):
                break
            try:
                rows.append(measure(point, device, args.precision, args.rounds))
            except torch.OutOfMemoryError:
                break
            row = rows[-1]
            print(f"{axis} {row[axis]:5d}  {1e3 * row['seconds']['median']:10.2f} ms  {row['gflop']:10.1f} GFLOP")
            write_result(args.out, name, record)  # now, for whatever ends the run
        slope = exponent([row[axis] for row in rows], [row["seconds"]["median"] for row in rows])
        record["axes"][axis]["exponent"] = slope
        print(f"{axis}: exponent {'-' if slope is None else f'{slope:.2f}'}")
    path = write_result(args.out, name, record)
    plot(record, path.with_suffix(".png"))
    print(f"written to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
