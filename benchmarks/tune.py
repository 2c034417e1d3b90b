#!/usr/bin/env python
"""Times every tile of the matrix kernels, and the vendor's product with the rest of the kernel, on a model's shapes.

    python -m benchmarks.tune --table smi_kernels/tuning/sm_90.json
    python -m benchmarks.tune --models deit_small_patch16_224 --batch-sizes 32 --table mine.json
    SMI_TUNING=mine.json smi invert deit_small_patch16_224

The shapes are those of whole iterations: dense, and with the kept patches of each phase. A choice stands only where its
result is as near to float64 as plain PyTorch's. The table keeps what earlier calls found and grows with every shape, so
that an interrupted call loses nothing; all times go to one JSON file under benchmarks/results/. `SMI_TUNING` names the
table to whatever runs the kernels; a shipped ``sm_XX.json`` is found by itself on GPUs of that compute capability.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import smi
import smi_kernels
from benchmarks.operations import errors
from benchmarks.timing import RESULTS, environment, quantiles, write_result
from smi.devices import resolve_device
from smi.files import atomic_write
from smi.profile import DTYPES, in_phase
from smi_kernels import Operation, tuning

# Of the 228 KB of shared memory that a multiprocessor has at most, what one program may have for its operands.
_OPERANDS = 160 * 1024
MATRIX = {"norm_linear", "norm_linear_gelu", "linear_residual", "linear_dx", "linear_gelu_dx", "norm_linear_dx"}


def tiles(shipped: Sequence[tuning.Tile], itemsize: int, few: bool, fetch: bool) -> list[tuning.Tile]:
    """What is tried: the shipped tiles, the vendor's product, and unless `few` all others that are worth a try.

    With `fetch`, 16-bit operands are fetched in whole tiles too (``tma``).
    """
    found = [*shipped, *(tuning.VENDOR._replace(n=n) for n in (64, 128))]
    fetch = fetch and itemsize == 2
    if fetch:
        found += [tile._replace(by="tma") for tile in shipped]
    if not few:
        depth = 128 // itemsize
        for m, n, k, stages in itertools.product((64, 128), (64, 128, 256), (depth // 2, depth), (2, 3, 4, 5)):
            if stages * (m + n) * k * itemsize > _OPERANDS:
                continue
            warps, large = {4, 8 if m * n >= 128 * 128 else 4}, m * n == 128 * 128
            for w, by in itertools.product(
                sorted(warps), ("pointers", "tma") if fetch and k == depth else ("pointers",)
            ):
                found += [tuning.Tile(m, n, k, w, stages, by, p) for p in ((1, 2) if w == 8 and large else (1,))]
    return list(dict.fromkeys(found))


def timed_choices(
    operation: Operation, choices: Sequence[tuning.Tile], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """For every choice its seconds, or why it is none."""
    rows = []
    for choice in choices:
        with tuning.forcing(choice):
            row: dict[str, Any] = {"tile": list(choice)}
            try:
                ours, plain = errors(operation)
                if ours <= 4 * plain + 1e-6:
                    row |= quantiles(operation.body, device, rounds)
                else:
                    row["failed"] = f"error {ours:.1e}, plain PyTorch {plain:.1e}"
            except Exception as error:  # too many registers or too much shared memory for this GPU, in many words
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            rows.append(row)
    return rows


def best(rows: Sequence[dict[str, Any]]) -> list[Any] | None:
    """The fastest tile; the earlier one where quantiles overlap, so that a shipped one is left for a reason only."""
    found: dict[str, Any] | None = None
    for row in rows:
        if "median" in row and (found is None or row["high"] < found["low"]):
            found = row
    return None if found is None else list(found["tile"])


def operations(args: argparse.Namespace, device: torch.device) -> Iterator[Operation]:
    """The matrix products of the chosen models, batches and numbers of patches; each shape may come several times."""
    for name, batch, kept in itertools.product(args.models, args.batch_sizes, args.kept):
        torch.manual_seed(0)
        model = smi.SparseModel(
            timm.create_model(name).eval(), name=name, device=device, precision=args.precision, backend="triton"
        )
        inversion = in_phase(model, batch, min(kept, model.info.num_patches))
        with smi_kernels.record_operations() as found:
            inversion.step()
        yield from (operation for operation in found if operation.name in MATRIX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="file of tiles; grows")
    models = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    parser.add_argument("--models", nargs="+", default=[*models, "vit_large_patch16_224"], help="random weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--kept", type=int, nargs="+", default=[196, 137, 95, 66, 46])
    parser.add_argument("--precision", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--few", action="store_true", help="shipped tiles and the vendor's product alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no shape is begun")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    began, device = time.monotonic(), resolve_device(args.device)
    where = environment(device)
    known: dict[str, Any] = json.loads(args.table.read_text()) if args.table.is_file() else {"shapes": {}}
    record: dict[str, Any] = {"benchmark": "tuning", "precision": args.precision, "environment": where, "shapes": {}}
    capability = tuning.capability(device)
    shipped = tuning.candidates(capability)
    path = None
    with smi_kernels.use_backend("triton"):
        for operation in operations(args, device):
            if time.monotonic() - began > args.budget:
                break
            with tuning.forcing(tuning.VENDOR) as asked:
                operation.body()
            (shape,) = asked
            if shape in record["shapes"]:
                continue
            family, arithmetic, _ = shape.split()
            itemsize = 2 if arithmetic == "16-bit" else 4
            choices = tiles(shipped[arithmetic, family], itemsize, args.few, fetch=(capability or 0) >= 90)
            rows = timed_choices(operation, choices, device, args.rounds)
            record["shapes"][shape] = rows
            if (chosen := best(rows)) is not None:
                known["shapes"][shape] = chosen
            gpu = "a CPU, interpreted" if where["gpu"] is None else where["gpu"]["name"]
            known["measured"] = f"{gpu}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
            atomic_write(args.table, (json.dumps(known, indent=1) + "\n").encode())
            path = write_result(args.out, f"tuning-{args.precision}", record)
            print(f"{shape}: {chosen}", flush=True)
    print(f"{len(record['shapes'])} shapes; table {args.table}, times {path}")


if __name__ == "__main__":
    main()
