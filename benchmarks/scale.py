#!/usr/bin/env python
"""docs/scale.md: what a large synthetic data set takes, from counted operations, measured bytes and the simulation.

    python -m benchmarks.scale --count    # count operations and bytes anew, then write the page
    python -m benchmarks.scale            # write the page from benchmarks/results/

Counting runs each model once for each number of patches, and makes a small pool to weigh; it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

import smi
from benchmarks.page import _table
from benchmarks.timing import RESULTS, environment, write_result
from smi.comparison_plan import flops_per_image
from smi.files import atomic_write
from smi.packed import pack
from smi.run import run

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
STRATEGIES = ("dense", "sparse", "rebirth", "fusion")
PRESET = "paper-quant"
PEAK = 989e12  # bf16 without sparsity, NVIDIA's data sheet of the H100 SXM
ASSUMED = 0.3  # share of PEAK
MILLION = 1_000_000


def count() -> dict[str, Any]:
    """Operations of an image by model and strategy, and bytes of an image by format."""
    found: dict[str, Any] = {"preset": PRESET, "flops_per_image": {}}
    for name in MODELS:
        torch.manual_seed(0)
        model = smi.SparseModel(timm.create_model(name).eval(), name=name, backend="reference")
        for strategy in STRATEGIES:
            config = smi.preset(PRESET).replace(strategy=strategy).resolved()
            spent = float(flops_per_image(model.merging(config.model_merge_to), config))
            found["flops_per_image"].setdefault(name, {})[strategy] = spent
            print(f"{name}, {strategy}: {spent / 1e12:.1f} TFLOP an image", flush=True)
    return found | {"bytes_per_image": weigh(), "environment": environment(torch.device("cpu"))}


def weigh(images: int = 32) -> dict[str, float]:
    """Bytes of an image of 224 x 224 pixels on disk, in a small pool of a network with random weights."""
    torch.manual_seed(0)
    model = smi.SparseModel(timm.create_model(MODELS[0]).eval(), name=MODELS[0])
    config = smi.preset(PRESET).replace(iterations=20, prune_at=(4, 8, 12, 16), batch_size=images, snapshots=0)
    with tempfile.TemporaryDirectory() as folder:
        pool, packed = Path(folder) / "pool", Path(folder) / "packed"
        run(model, smi.WorkPlan.balanced(range(10), images, images, 1000), config, pool)
        pack(pool, packed)

        def size(place: Path, pattern: str) -> float:
            return sum(file.stat().st_size for file in place.glob(pattern)) / images

        return {
            "pool, shards": size(pool, "shards/*"),
            "pool, pictures": size(pool, "png/*"),
            "packed, tar files": size(packed, "**/*.tar"),
            "packed, index": size(packed, "**/*.parquet"),
        }


def page(counted: dict[str, Any], simulated: dict[str, Any] | None, truth: dict[str, Any] | None) -> str:
    """The page, of what was counted, simulated and measured."""
    parts = [_HEAD, _costs(counted), _check(truth), _storage(counted), _simulation(simulated)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _costs(counted: dict[str, Any]) -> str:
    rows = []
    for name, of in counted["flops_per_image"].items():
        for strategy, flops in of.items():
            seconds = flops / (ASSUMED * PEAK)
            rows.append(
                [
                    f"`{name}`",
                    strategy,
                    f"{flops / 1e12:.1f}",
                    f"{of['dense'] / flops:.2f}x",
                    f"{seconds * MILLION / 3600:,.0f}",
                    f"{1 / seconds:.2f}",
                ]
            )
    head = [
        "model",
        "strategy",
        "TFLOP an image",
        "fewer than dense",
        "GPU-hours a million, assumed",
        "images/s, assumed",
    ]
    return f"""
## What a million images cost

    GPU-hours = images x operations of an image / (utilisation x peak x 3600)
    price     = GPU-hours x price of a GPU-hour

Operations are counted (`smi.flops`: forward, and gradient of the pixels), for the preset `{counted["preset"]}` at
224 x 224; `smi plan MODEL --num-images N --price PER_HOUR` counts them for a model, config and number of yours, times
the device at hand and tells what a million images cost on it. Rates on GPUs are **not measured**:
the last two columns ASSUME {ASSUMED:.0%} of {PEAK / 1e12:.0f} TFLOP/s (bf16
without sparsity, data sheet of the H100 SXM); of half the utilisation hours are twice as many. Four of rebirth's
images come of one trajectory.

{_table(head, rows)}
"""


def _check(truth: dict[str, Any] | None) -> str:
    head = "## Do operations predict time?\n\n"
    if truth is None:
        return head + "Not measured: `python -m benchmarks.table_of_truth`."
    dense = truth["cost"]["dense"]["seconds_per_image"] / truth["rows"]["dense"]["gflop_per_image"]
    rows = []
    for name, cost in truth["cost"].items():
        told = dense * truth["rows"][name]["gflop_per_image"]
        found = cost["seconds_per_image"]
        rows.append([name, f"{told:.2f}", f"{found:.2f}", f"{100 * (told / found - 1):+.0f} %"])
    return f"""{head}On a CPU, `{truth["model"]}`, seconds an image: told from the operations, at the rate of the dense
row, and measured ([what was measured](benchmarks.md#what-images-are-worth)).

{_table(["images", "told", "measured", "off by"], rows)}
"""


def _storage(counted: dict[str, Any]) -> str:
    of = counted["bytes_per_image"]
    fastest = min(counted["flops_per_image"][MODELS[0]].values())
    written = (of["pool, shards"] + of["pool, pictures"]) * ASSUMED * PEAK / fastest
    rows = [[name, f"{size / 1e3:.1f}", f"{size * MILLION / 1e9:,.0f}"] for name, size in of.items()]
    return f"""
## What they weigh

Weighed in a pool of 32 images of 224 x 224 of a network with random weights, whose pictures are near noise and compress
least.

{_table(["format", "kB an image", "GB a million"], rows)}

The smallest model with the cheapest strategy writes most: {written / 1e6:.1f} MB/s a GPU at the assumed rate, so a
file system that takes 1 GB/s keeps up with {1e9 / written:,.0f} such GPUs; of larger models with more, in proportion to
their operations. Nothing is sent between GPUs, so no network is a limit but the one to the file system.
"""


def _simulation(simulated: dict[str, Any] | None) -> str:
    head = "## A thousand runs, simulated\n\n"
    if simulated is None:
        return head + "Not run: `python -m benchmarks.simulate`."
    rows = [
        [
            f"{row['runs']:,}",
            f"{row['batches']:,}",
            f"{row['counts'].get('killed', 0):,}",
            f"{row['counts'].get('asleep', 0):,}",
            f"{row['counts'].get('left', 0):,}",
            f"{row['lost']}",
            f"{row['counts'].get('made twice', 0)}",
            f"{100 * row['wasted_share']:.1f} %",
            f"{row['calls_a_second']['while beginning']:,.0f}",
            f"{row['calls_a_second']['at work']:,.0f}",
            f"{row['calls_a_second']['most']:,.0f}",
        ]
        for row in simulated["rows"]
    ]
    titles = ["runs", "batches", "killed", "asleep", "left", "lost", "made twice", "work taken back"]
    titles += ["calls/s, first 10 min", "at work", "worst minute"]
    each = simulated["rows"][0]["seconds_a_batch"]
    t = simulated["trouble"]
    rates = f"""each run is killed {t["killed"]:g} times an hour and replaced after {t["back_after"]:.0f} s,
falls asleep {t["asleep"]:g} times an hour for {t["sleep"]:.0f} s, leaves {t["leaves"]:g} times an hour;
{t["slow"]:.0%} of the runs are {t["slowness"]:.0f} times slower"""
    return f"""{head}`python -m benchmarks.simulate` drives the real claims, signs of life and take-overs
(`smi.workers`) of so many runs on one folder, with clocks and trouble simulated: batches of {each:.0f} s;
{rates}. Calls are those to the file system for claims
and signs of life, images come on top. Taken back is what the killed and the leaving had in hand, and what sleepers
finished too late; of real runs less, for what was put aside or saved of a batch is gone on with.

{_table(titles, rows)}

Each run looks through the others when it begins, so a thousand that begin at once ask most of the file system then;
spread their start, or give `--shard I/N` parts to groups that join. Batches should take a minute or more.
"""


_HEAD = """
# Many GPUs

Made by `python -m benchmarks.scale`.

The work plan fixes every image by its number: any number of workers, that come and go, makes the same data set, image
for image (to the bit on like processors).

## Start them

On one machine, a process for each GPU; they share the pool unasked, and a killed one is replaced:

```bash
torchrun --nproc-per-node 8 --max-restarts 100 -m smi invert MODEL --num-images 1000000 --out pools/big
```

On several machines that see one file system, elastic, from two to sixteen:

```bash
torchrun --nnodes 2:16 --nproc-per-node 8 --max-restarts 100 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
    -m smi invert MODEL --num-images 1000000 --out pools/big
```

torchrun restarts all its processes when one dies or machines join, and the batches that they had in hand go on
where they were put aside or last saved.
Tried were two processes on one machine, one of them killed. Runs need not know of each other, so a Slurm array of
single ones loses less (not tried on a cluster):

```bash
#!/bin/bash
#SBATCH --array=0-255 --gpus=1 --signal=TERM@60 --requeue
smi invert MODEL --num-images 1000000 --out pools/big --join
```

SIGTERM ends a run in good order, and a requeued task goes on. Where machines share no file system, each makes a fixed
part with `--shard I/N` (`--shard $SLURM_ARRAY_TASK_ID/256`) in a pool of its own; `smi pool merge` puts them together.
A part whose machine is lost is made again with the same command.

## When something goes wrong

| what | what becomes of it |
| --- | --- |
| a process is killed | another makes its batch when no free one is left; on other hosts a minute of silence is death |
| a machine sleeps and wakes | if its batch was taken over meanwhile it gives its own up; nothing is written twice |
| the disk is full | an error that says so; the pool stays whole, and the same command goes on |
| values that are not finite | that batch is made from another seed, and its record says so |
| a GPU has too little memory | the batch is made in halves where that changes nothing |
| a clock is wrong | ages are differences of the file system's own times, and of each run's own count of seconds |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count operations and bytes anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.count:
        write_result(args.results, "scale", {"benchmark": "scale", **count()})
    atomic_write(PAGE, written(args.results).encode())
    print(f"written to {PAGE}")


def written(results: Path = RESULTS) -> str:
    """The page of the files in `results`."""
    found: dict[str, list[dict[str, Any]]] = {"simulation": [], "table_of_truth": []}
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text())
        found.setdefault(record["benchmark"], []).append(record)
    timed = [record for record in found["table_of_truth"] if record["cost"]]
    return page(found["scale"][-1], *(records[-1] if records else None for records in (found["simulation"], timed)))


if __name__ == "__main__":
    main()
