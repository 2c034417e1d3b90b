#!/usr/bin/env python
"""Inversion end to end against every baseline: the steady phase, and the whole paper schedule.

    python -m benchmarks.end_to_end --quick
    python -m benchmarks.end_to_end --models Ti S --batch-sizes 32 --minutes 9
    python -m benchmarks.end_to_end --models Ti --batch-sizes 32 --whole SMI C16

Each implementation first passes a gate (`benchmarks/gate.py`); no ratio is printed for one that does not. All of a
model and batch size then take turns. The file of results is written again after every row, so that a run that is
killed leaves what it found. Weights are random unless --pretrained: timing is the same, images are not.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

import smi
import smi_kernels
from benchmarks import end_to_end_rows as rows
from benchmarks.baselines import BASELINES
from benchmarks.baselines_timm import PEERS
from benchmarks.gate import OURS, Reference
from benchmarks.implementations import Implementation, begin, random_weights
from benchmarks.timing import RESULTS, environment, write_result
from smi.devices import resolve_device
from smi.errors import SmiError

MODELS = {
    "Ti": "deit_tiny_patch16_224",
    "S": "deit_small_patch16_224",
    "B": "deit_base_patch16_224",
    "L": "vit_large_patch16_224",
}
NAME = "end_to_end"  # of the benchmark, and of its file of results unless told otherwise
# Compilers last: they may take longer than all else together.
ALL = (OURS, *sorted(BASELINES, key=lambda name: BASELINES[name].compiled), *PEERS)


class Clock:
    """A budget of wall-clock time."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end


def measure(
    name: str,
    network: Any,
    config: smi.Config,
    record: dict[str, Any],
    folder: Path,
    *,
    implementations: tuple[str, ...],
    whole: tuple[str, ...],
    device: torch.device,
    clock: Clock,
    steps: int,
    rounds: int,
) -> None:
    """All rows of one model and batch size, into `record`, which is written to `folder` after each.

    Args:
        name: of the model, for the rows.
        network: on the CPU.
        config: batch size, schedule and objective; the semantics are the published code's.
        implementations: of `ALL`, ours first.
        whole: those of them whose whole schedule is run and timed, where time is left.
        steps: iterations of a round. rounds: of the steady phase, and all implementations take turns in each.
    """
    precision = "bf16" if device.type == "cuda" else "fp32"
    model = smi.SparseModel(network, name=name, device=device, precision=precision)
    start = begin(network, model.info, config, device)
    kept = min(start["config"].schedule(model.info.num_patches).values(), default=model.info.num_patches)
    reference = Reference(network, start, kept)
    about = {"model": name, "batch_size": config.batch_size, "kept": kept}
    pixels = rows.STATE * start["images"].numel()
    running: dict[str, Implementation] = {}
    found: dict[str, dict[str, Any]] = {}

    def skip(which: str, reason: str) -> None:
        record["skipped"].append({**about, "implementation": which, "reason": reason})
        write_result(folder, record["name"], record)

    for which in implementations:
        if clock.over:
            skip(which, "no time left")
            continue
        try:
            verdict = reference.gate(which, model)
            with rows.Memory(device) as memory:
                made = Implementation(which, network, model, start, steps, rounds)
                found[which] = {**about, **rows.phases(made, verdict, steps)}
        except torch.cuda.OutOfMemoryError:
            skip(which, "out of memory")
            continue
        except Exception as error:  # a compiler's, say, which need not be a RuntimeError; others can still be measured
            skip(which, _said(error))
            continue
        # Ours brought its weights along with `model`, before.
        fixed = pixels + (0 if which == OURS else made.weight_bytes)
        found[which]["memory"] = None if memory.peak is None else memory.peak - fixed
        running[which] = made
    work = rows.work_of(model, network, config.batch_size, *_ceilings(record, device, precision))
    timed = rows.steady(running, steps, rounds, device, clock)
    for which in running:
        if which not in timed:
            skip(which, "out of memory beside the others")
            continue
        try:
            row = rows.complete(found[which], timed[which], running[which], model.info, work)
        except Exception as error:  # of a profiler, say; the others have their times
            skip(which, _said(error))
            continue
        record["rows"].append(row)
        write_result(folder, record["name"], record)
        print(rows.line(row), flush=True)
    running.clear()
    torch._dynamo.reset()  # which holds on to all that was compiled, and its tensors
    gc.collect()
    for which in whole:
        if which not in found:
            continue
        row = rows.whole(Implementation(which, network, model, start, 0), device, clock)
        if "reason" in row:
            skip(which, f"whole schedule: {row['reason']}")
            continue
        row = {**about, **row, "gate": found[which]["gate"]}
        record["rows"].append(row)
        write_result(folder, record["name"], record)
        print(rows.line(row), flush=True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _ceilings(record: dict[str, Any], device: torch.device, precision: str) -> tuple[float, float]:
    """Bytes and operations a second that this machine reaches, measured once in a run."""
    if precision not in record["ceilings"]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        copied, multiplied = smi_kernels.ceilings(device, dtype)
        record["ceilings"][precision] = {"bytes_per_second": copied, "flops_per_second": multiplied}
    measured = record["ceilings"][precision]
    return measured["bytes_per_second"], measured["flops_per_second"]


def new_record(device: torch.device, name: str = NAME, **about: Any) -> dict[str, Any]:
    """One without rows; `name` is that of its file."""
    return {
        "benchmark": NAME,
        "name": name,
        **about,
        "environment": environment(device),
        "ceilings": {},
        "rows": [],
        "skipped": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"{', '.join(MODELS)}, or names of timm")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--implementations", nargs="+", default=list(ALL), choices=ALL)
    parser.add_argument("--whole", nargs="*", default=[OURS], choices=ALL, help="run their whole schedule, too")
    parser.add_argument("--pretrained", action="store_true", help="published weights in place of random ones")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after so many")
    parser.add_argument("--steps", type=int, default=24, help="iterations of a round; on a GPU 8 are one graph of ours")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the steady phase")
    parser.add_argument("--quick", action="store_true", help="Ti, 2 images on a CPU and 32 on a GPU, few rounds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default=NAME, help="of the file of results")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1:
        raise SmiError(f"--steps is {args.steps} and --rounds {args.rounds}; expected at least 1 of each.")
    device = resolve_device(args.device)
    if args.quick:
        on_gpu = device.type == "cuda"
        args.models, args.batch_sizes, args.rounds = ["Ti"], [32 if on_gpu else 2], 3
        args.steps = 24 if on_gpu else 1
        args.implementations = [OURS, "E32d", "E32s", "E32f", "A16"]
        args.whole = []
    clock = Clock(args.minutes)
    record = new_record(device, args.name, random_weights=not args.pretrained, steps=args.steps, rounds=args.rounds)
    for short in args.models:
        name = MODELS.get(short, short)
        network = None
        for batch in args.batch_sizes:
            if clock.over:  # to load and gate a large model takes longer than is left
                about = {"model": name, "batch_size": batch, "reason": "no time left"}
                record["skipped"] += [{**about, "implementation": which} for which in args.implementations]
                continue
            if network is None:
                network = smi.load_model(name, pretrained=args.pretrained)
                if not args.pretrained:
                    random_weights(network)
            config = smi.preset("paper-quant").replace(batch_size=batch)
            measure(
                name,
                network,
                config,
                record,
                args.out,
                implementations=tuple(args.implementations),
                whole=tuple(args.whole),
                device=device,
                clock=clock,
                steps=args.steps,
                rounds=args.rounds,
            )
    print("\n".join(rows.speed_ups(record)))
    path = write_result(args.out, args.name, record)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
