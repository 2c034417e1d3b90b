#!/usr/bin/env python
"""Do the images carry the class, or only fool the teacher? Two networks asked about the images of every strategy.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --images 200 --seeds 3

The teacher is the network that was inverted and sees the kept patches. The judge is of another architecture, trained
apart and never used in inversion; it sees whole images, with stopped patches as they are, and filled with the mean.
Gaussian noise is what every inversion starts from. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import smi
from benchmarks.timing import RESULTS, environment, write_result
from smi.augment import NOISE, normal_images
from smi.devices import resolve_device
from smi.embedded import load_judge
from smi.given import as_inverted
from smi.report_data import Tally

ROWS: dict[str, dict[str, Any]] = {
    "dense": {"strategy": "dense"},
    "sparse strict": {"strategy": "sparse", "semantics": "strict"},
    "sparse official": {"strategy": "sparse", "semantics": "official"},
    "random strict": {"strategy": "random", "semantics": "strict"},
}


def measure(model: smi.SparseModel, base: smi.Config, images: int, seeds: range) -> dict[str, Any]:
    """row name -> shares of images, one for each seed, with seconds and operations."""
    judge = load_judge()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*ROWS, "gaussian noise"]}
    plan = smi.WorkPlan.balanced(range(model.info.num_classes), images, base.batch_size, model.info.num_classes)
    for seed in seeds:
        for name, changes in ROWS.items():
            config = base.replace(seed=seed, **changes).resolved()
            tally, noise = Tally(model.info, config, judge=judge), Tally(model.info, config, judge=judge)
            for batch in range(plan.num_batches):
                numbers = plan.batch(batch)
                result = smi.invert(model, [plan.targets[i] for i in numbers], config, indices=numbers)
                tally.add(result)
                if name == "dense":
                    images = normal_images(config.seed, NOISE, numbers, model.info.input_size)
                    noise.add(as_inverted(images, result.targets, numbers, model, config.iterations))
            found[name].append(tally.summary())
            print(f"seed {seed}: {name} done", flush=True)
            if name == "dense":
                found["gaussian noise"].append(noise.summary())
    return {name: _digest(summaries) for name, summaries in found.items()}


def _digest(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "teacher_agreement": [s["teacher_agreement"] for s in summaries],
        "judge_agreement": {
            fill: [s["judge_agreement"][fill] for s in summaries] for fill in summaries[0]["judge_agreement"]
        },
        "seconds": [s["seconds"] for s in summaries],
        "flops": summaries[0]["flops"],
    }


def table(rows: dict[str, Any]) -> str:
    lines = [f"{'':16s}{'teacher':>14s}{'judge, as is':>16s}{'judge, mean fill':>18s}{'TFLOP':>9s}{'seconds':>9s}"]
    for name, row in rows.items():
        cells = [row["teacher_agreement"], row["judge_agreement"]["as-is"], row["judge_agreement"]["mean"]]
        shown = "".join(f"{_share(c):>{w}s}" for c, w in zip(cells, (14, 16, 18), strict=True))
        lines.append(f"{name:16s}{shown}{row['flops'] / 1e12:9.2f}{statistics.mean(row['seconds']):9.1f}")
    return "\n".join(lines)


def _share(values: list[float]) -> str:
    spread = f" +-{statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=100, help="apart from 0, with which the presets were chosen")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    device = resolve_device(args.device)
    where = environment(device)
    model = smi.SparseModel(smi.load_model("embedded:teacher"), name="embedded:teacher", device=device)
    config = smi.preset(args.preset)
    rows = measure(model, config, args.images, range(args.first_seed, args.first_seed + args.seeds))
    record = {
        "benchmark": "agreement",
        "model": "embedded:teacher",
        "preset": args.preset,
        "config": config.to_dict(),
        "images": args.images,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "environment": where,
        "rows": rows,
    }
    print(table(rows))
    print(f"written to {write_result(args.out, f'agreement-{args.preset}', record)}")


if __name__ == "__main__":
    main()
