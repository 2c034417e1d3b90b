#!/usr/bin/env python
"""Does waiting help rankings? Sparse inversion whose pruning begins later, with ranked patches and with random ones.

    python -m benchmarks.when_to_prune --work when-to-prune

Early images tell their class nowhere in particular, so a ranking then chooses little better than chance; to wait costs
operations. The preset's steps are all moved by the same number of iterations. The judge, a network that took no part in
the inversion, says how often the class can be seen in the kept patches alone, the dropped ones filled with the mean.
Every cell is kept under --work as it is done. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import smi
from benchmarks.timing import RESULTS, environment, write_result
from smi.devices import resolve_device
from smi.embedded import load_judge
from smi.files import atomic_write
from smi.report_data import Tally

STRATEGIES = ("sparse", "random")


def moved(base: smi.Config, start: int) -> smi.Config:
    """`base` whose first pruning is at `start`, and the others as far behind it as they were.

    Raises:
        SystemExit: the last one would be behind the last iteration.
    """
    steps = tuple(step - base.prune_at[0] + start for step in base.prune_at)
    if start < 1 or steps[-1] >= base.iterations:
        raise SystemExit(
            f"a start at {start} prunes at {steps} of {base.iterations} iterations; use 1 to "
            f"{base.iterations - 1 - base.prune_at[-1] + base.prune_at[0]}."
        )
    return base.replace(prune_at=steps)


def measure(model: smi.SparseModel, config: smi.Config, images: int) -> dict[str, Any]:
    """What teacher and judge say of so many images, and what they cost."""
    classes = model.info.num_classes
    plan = smi.WorkPlan.balanced(range(classes), images, config.batch_size, classes)
    tally = Tally(model.info, config, judge=load_judge())
    for batch in range(plan.num_batches):
        numbers = plan.batch(batch)
        tally.add(smi.invert(model, [plan.targets[i] for i in numbers], config, indices=numbers))
    found = tally.summary()
    return {
        "judge": found["judge_agreement"]["mean"],
        "teacher": found["teacher_agreement"],
        "gflop_per_image": found["flops"] / images / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:teacher", help="of the judge's classes: CIFAR-10's")
    parser.add_argument("--work", type=Path, required=True, help="folder for the cells that are done")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--starts", type=int, nargs="+", default=[40, 120, 200, 270], help="iteration of first pruning")
    parser.add_argument("--images", type=int, default=80, help="a cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    device = resolve_device(args.device)
    model = smi.SparseModel(smi.load_model(args.model), name=args.model, device=device)
    base = smi.preset(args.preset)
    configs = {start: moved(base, start) for start in args.starts}
    args.work.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in args.seeds:
        for start, strategy in ((start, strategy) for start in args.starts for strategy in STRATEGIES):
            config = configs[start].replace(strategy=strategy, seed=seed).resolved()
            file = args.work / f"{strategy}-{start}-{seed}.json"
            asked = {"model": model.info.weights_sha256, "config": config.to_dict(), "images": args.images}
            wanted = json.loads(json.dumps(asked))
            known = json.loads(file.read_text()) if file.is_file() else {}
            if {key: known.get(key) for key in wanted} != wanted:
                known = {**wanted, "found": measure(model, config, args.images)}
                atomic_write(file, json.dumps(known).encode())
            cells.setdefault(strategy, {}).setdefault(str(start), []).append(known["found"])
            print(f"seed {seed}: {strategy} from {start}: judge {known['found']['judge']:.1%}", flush=True)
    record = {
        "benchmark": "when_to_prune",
        "model": model.info.name,
        "preset": args.preset,
        "config": base.to_dict(),
        "images": args.images,
        "seeds": args.seeds,
        "environment": environment(device),
        "cells": cells,
    }
    print(f"written to {write_result(args.out, f'when_to_prune-{args.model}', record)}")


if __name__ == "__main__":
    main()
