#!/usr/bin/env python
"""Does a long inversion stay flat in memory? One process at work for an hour, looked at every ten seconds.

    python -m benchmarks.long_run
    python -m benchmarks.long_run --minutes 5 --batch-size 40

Batch after batch of the built-in network goes into a pool in a temporary folder, as `smi invert` makes them, on one
thread. Growth is the slope of the least-squares line through the resident memory after the first tenth, the warm-up;
tensors that live and files that are open are counted besides, since each can grow where memory hides it. Needs /proc,
as Linux has it. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import smi
from benchmarks.timing import RESULTS, environment, write_result
from smi.run import run

WARM_UP = 0.1  # share of the time, in which allocators and caches find their size
FLAT = 0.01  # growth in an hour that counts as none, as a share of what is resident
IMAGES_AN_HOUR = 100_000  # more than any machine makes, so that time ends the run


@dataclass(frozen=True)
class Sample:
    """One look at this process: seconds since the start, resident MB, living tensors, open files."""

    seconds: float
    resident: float
    tensors: int
    files: int


def resident(field: str = "VmRSS") -> float:
    """MB (10^6 bytes) resident now, or at the most so far (``VmHWM``)."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise SystemExit(f"/proc/self/status does not tell {field}; run this on Linux.")
    return int(found[1]) * 1024 / 1e6


def look(began: float) -> Sample:
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return Sample(time.monotonic() - began, resident(), tensors, len(os.listdir("/proc/self/fd")))


def an_hour(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Growth of `values` in an hour, by least squares."""
    return 3600 * statistics.linear_regression(seconds, values).slope


def measure(model: smi.SparseModel, config: smi.Config, minutes: float, every: float, **options: Any) -> dict[str, Any]:
    """What the run made and how the process grew meanwhile; `options` are those of `smi.run.run`."""
    classes = model.info.num_classes
    count = max(2, round(IMAGES_AN_HOUR * minutes / 60))
    plan = smi.WorkPlan.balanced(range(classes), count, config.batch_size, classes)
    samples: list[Sample] = []
    began = time.monotonic()

    def watch(_: int, __: smi.Inversion) -> None:
        if time.monotonic() - began >= len(samples) * every:
            samples.append(look(began))

    with tempfile.TemporaryDirectory(prefix="smi-long-run-") as folder:
        pool = Path(folder) / "pool"
        done = run(model, plan, config, pool, time_budget=60 * minutes, on_iteration=watch, **options)
    return {"images": done.images_done, "batches": done.batches_done, "seconds": done.seconds, **growth(samples)}


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Slopes after the warm-up, and the medians of about sixty stretches of equal length, to draw or look at."""
    settled = [one for one in samples if one.seconds >= WARM_UP * samples[-1].seconds]
    seconds = [one.seconds for one in settled]
    slope = an_hour(seconds, [one.resident for one in settled])
    middle = statistics.median(one.resident for one in settled)
    stretch = -(-len(samples) // 60)
    stretches = [samples[at : at + stretch] for at in range(0, len(samples), stretch)]
    return {
        "samples": len(samples),
        "resident_mb": middle,
        "peak_mb": resident("VmHWM"),
        "mb_an_hour": slope,
        "tensors_an_hour": an_hour(seconds, [one.tensors for one in settled]),
        "files_an_hour": an_hour(seconds, [one.files for one in settled]),
        "flat": abs(slope) <= FLAT * middle,
        "curve": {
            field.name: [round(statistics.median(getattr(one, field.name) for one in part), 2) for part in stretches]
            for field in dataclasses.fields(Sample)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch-size", type=int, default=4, help="small, so that there are many batches")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device("cpu")
    where = environment(device)
    model = smi.SparseModel(smi.load_model("embedded:teacher"), name="embedded:teacher", device=device)
    config = smi.preset(args.preset).replace(batch_size=args.batch_size)
    record = {
        "benchmark": "long_run",
        "model": "embedded:teacher",
        "preset": args.preset,
        "batch_size": args.batch_size,
        "minutes": args.minutes,
        "every": args.every,
        "warm_up": WARM_UP,
        "backend": model.backend,
        "environment": where,
        **measure(model, config, args.minutes, args.every),
    }
    print(
        f"{record['images']} images in {record['batches']} batches; {record['resident_mb']:.0f} MB resident, "
        f"{record['peak_mb']:.0f} MB at the peak, {record['mb_an_hour']:+.2f} MB an hour, "
        f"{record['tensors_an_hour']:+.1f} tensors, {record['files_an_hour']:+.1f} open files"
    )
    print(f"written to {write_result(args.out, 'long_run-embedded-teacher', record)}")


if __name__ == "__main__":
    main()
