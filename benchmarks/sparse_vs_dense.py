#!/usr/bin/env python
"""Sparse against dense inversion of one model: the final phase per iteration, and the whole schedule.

    python -m benchmarks.sparse_vs_dense
    python -m benchmarks.sparse_vs_dense --model deit_tiny_patch16_224 --no-pretrained --preset fast --batch-size 8

Both run in this process and take turns; medians of the rounds are reported, with the floating-point operations counted
while they ran. Beside the time stand the teacher's agreement with the targets, so that no speed is shown without what
it bought. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import smi
from benchmarks.implementations import advance
from benchmarks.timing import RESULTS, environment, interleaved, write_result
from smi.devices import resolve_device
from smi.flops import count_flops

STRATEGIES = ("dense", "sparse")


def final_phase(model: smi.SparseModel, targets: list[int], config: smi.Config, steps: int, rounds: int) -> dict:
    """Seconds per iteration once all prunings are past; the prunings themselves are moved to the very start."""
    early = tuple(range(1, 2 * len(config.prune_at), 2))
    config = config.replace(prune_at=early, iterations=early[-1] + steps * (rounds + 1) + 1)
    runs = {name: smi.Inversion(model, targets, config.replace(strategy=name)) for name in STRATEGIES}

    for run in runs.values():
        advance(run, early[-1] + 1 + steps)  # on a GPU the first iteration of a phase compiles, and graphs come after
    times = interleaved(
        {k: lambda run=v: advance(run, steps) for k, v in runs.items()}, rounds=rounds, device=model.device
    )
    result: dict[str, Any] = {}
    for name, run in runs.items():
        kept = run.keep.shape[1]
        result[name] = {
            "kept": kept,
            "seconds_per_iteration": times[name]["median"] / steps,
            "spread": times[name]["spread"],
            "gflop_per_image": count_flops(model, kept) / 1e9,
        }
    return result


def whole_schedule(model: smi.SparseModel, targets: list[int], config: smi.Config, rounds: int) -> dict:
    """Seconds for all iterations, first to last, and what came out."""
    results: dict[str, smi.Result] = {}

    def invert(name: str) -> None:
        results[name] = smi.invert(model, targets, config.replace(strategy=name))

    times = interleaved(
        {name: lambda name=name: invert(name) for name in STRATEGIES}, rounds=rounds, device=model.device
    )
    return {
        name: {
            "seconds": times[name]["median"],
            "spread": times[name]["spread"],
            "gflop_per_image": sum(phase.flops for phase in result.phases) / len(targets) / 1e9,
            "teacher_agreement": (result.logits.argmax(1) == result.targets).float().mean().item(),
            "cross_entropy": result.losses["cross_entropy"].mean().item(),
        }
        for name, result in results.items()
    }


def ratios(rows: dict, seconds: str) -> dict[str, float]:
    return {
        "speed_up": rows["dense"][seconds] / rows["sparse"][seconds],
        "flop_ratio": rows["dense"]["gflop_per_image"] / rows["sparse"]["gflop_per_image"],
    }


def table(record: dict) -> str:
    lines = []
    for title, key, seconds in (
        ("final phase, per iteration", "final_phase", "seconds_per_iteration"),
        ("whole schedule", "whole_schedule", "seconds"),
    ):
        lines.append(title)
        for name in STRATEGIES:
            row = record[key][name]
            extra = (
                f"  {row['kept']} patches" if "kept" in row else f"  teacher agreement {row['teacher_agreement']:.1%}"
            )
            lines.append(
                f"  {name:7s}{row[seconds]:10.4f} s  +-{row['spread'] / 2:.0%}"
                f"{row['gflop_per_image']:12.3f} GFLOP/image{extra}"
            )
        both = record[key]["ratios"]
        lines.append(f"  sparse is {both['speed_up']:.2f}x faster, with {both['flop_ratio']:.2f}x fewer operations")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:teacher")
    parser.add_argument(
        "--no-pretrained", action="store_true", help="random weights: timing is the same, images are not"
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--steps", type=int, default=8, help="iterations of the final phase in a round; on a GPU 8 are a graph"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the final phase")
    parser.add_argument("--schedule-rounds", type=int, default=3, help="rounds of the whole schedule")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    device = resolve_device(args.device)
    where = environment(device)
    network = smi.load_model(args.model, pretrained=not args.no_pretrained)
    model = smi.SparseModel(network, name=args.model, device=device)
    config = smi.preset(args.preset)
    config = config.replace(batch_size=args.batch_size or config.batch_size)
    targets = [i % model.info.num_classes for i in range(config.batch_size)]
    record: dict[str, Any] = {
        "benchmark": "sparse_vs_dense",
        "model": args.model,
        "random_weights": args.no_pretrained,
        "preset": args.preset,
        "batch_size": config.batch_size,
        "iterations": config.iterations,
        "rounds": {"final_phase": args.rounds, "whole_schedule": args.schedule_rounds},
        "environment": where,
        "final_phase": final_phase(model, targets, config, args.steps, args.rounds),
        "whole_schedule": whole_schedule(model, targets, config, args.schedule_rounds),
    }
    record["final_phase"]["ratios"] = ratios(record["final_phase"], "seconds_per_iteration")
    record["whole_schedule"]["ratios"] = ratios(record["whole_schedule"], "seconds")
    print(table(record))
    print(f"written to {write_result(args.out, f'sparse_vs_dense-{args.model}', record)}")


if __name__ == "__main__":
    main()
