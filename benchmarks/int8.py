#!/usr/bin/env python
"""Eight bits against float32, both through inductor, on this CPU: time in one interleaved run, agreement, size on disk.

    python -m benchmarks.int8
    python -m benchmarks.int8 --model deit_small_patch16_224 --no-pretrained --batch-size 32

Ranges come from noise: they decide nothing about the time. Compiled integers may round elsewhere than interpreted ones;
if their logits differ by more than quantization itself changed them, no ratio is printed. Writes one JSON file under
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import smi
from benchmarks.timing import RESULTS, environment, interleaved, write_result
from smi.calibration import from_noise
from smi.evaluation import compiled

CPU = torch.device("cpu")


def measure(network: Any, name: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of a batch on either side, and relative errors of the logits: of integers, and of compiling them."""
    info = smi.SparseModel(network, name=name, backend="reference").info
    quantized = smi.quantize(network, from_noise(info), name=name)
    images = torch.randn(batch_size, *info.input_size, generator=torch.Generator().manual_seed(1))
    float32 = compiled(network, batch_size, info.input_size)
    int8 = compiled(quantized.model, batch_size, info.input_size)
    with torch.no_grad():
        exact, interpreted, found = network(images), quantized.model(images), int8(images)
        errors = {"compiled": _error(found, interpreted), "quantized": _error(interpreted, exact)}
        times = interleaved(
            {"float32": lambda: float32(images), "int8": lambda: int8(images)}, rounds=rounds, device=CPU
        )
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(Path(folder) / "made")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.pt2"))
    passed = errors["compiled"] <= errors["quantized"]
    return {
        "seconds": {side: {key: entry[key] for key in ("median", "spread")} for side, entry in times.items()},
        "errors": errors,
        "passed": passed,
        "speed_up": times["float32"]["median"] / times["int8"]["median"] if passed else None,
        "bytes": {"float32": quantized.float_bytes, "int8": size},
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: timing is the same")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    where = environment(CPU)
    network = smi.load_model(args.model, pretrained=not args.no_pretrained)
    record = {
        "benchmark": "int8",
        "model": args.model,
        "random_weights": args.no_pretrained,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "environment": where,
        **measure(network, args.model, args.batch_size, args.rounds),
    }
    sides = record["seconds"]
    print(f"float32 {1e3 * sides['float32']['median']:.1f} ms, int8 {1e3 * sides['int8']['median']:.1f} ms a batch")
    print(f"{record['speed_up']:.2f}x" if record["passed"] else f"no ratio: errors are {record['errors']}")
    print(f"written to {write_result(args.out, f'int8-{args.model}', record)}")


if __name__ == "__main__":
    main()
