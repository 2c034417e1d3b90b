#!/usr/bin/env python
"""Every operator of an iteration by itself, against what else computes it and against this machine's ceilings.

    python -m benchmarks.operations
    python -m benchmarks.operations --model deit_base_patch16_224 --batch-size 128 --precision bf16 --budget 120

Operands are random, recorded from a running iteration. A result stands only where the operator is as near to float64 as
plain PyTorch is: the errors of both are in the record, and no ratio is printed where that fails. Warm times repeat the
same call; cold ones find nothing of it in the cache. Ratios are times of the others over ours, so above 1 ours is
faster. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import smi
import smi_kernels
from benchmarks.timing import RESULTS, environment, quantiles, write_result
from smi.devices import resolve_device
from smi.profile import DTYPES, in_phase
from smi_kernels import Operation

Body = Callable[[], object]
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
VENDOR = "vendor's product alone"  # cuBLAS or MKL, without what the operator does around it


def rivals(operation: Operation) -> Iterator[tuple[str, Body]]:
    """What else computes the operator, or the part of it that a library has."""
    given = operation.arguments

    def plain() -> None:
        with smi_kernels.use_backend("reference"):
            operation.body()

    yield "plain PyTorch", plain
    if operation.name in ("norm_linear", "norm_linear_gelu", "linear_residual"):
        rows, weight = given["x" if "norm" in operation.name else "a"], given["weight"]
        yield VENDOR, lambda: F.linear(rows, weight)
    elif operation.name in ("linear_dx", "linear_gelu_dx", "norm_linear_dx"):
        rows, weight = given["du" if operation.name == "norm_linear_dx" else "dy"], given["weight"]
        yield VENDOR, lambda: torch.mm(rows, weight)
    elif operation.name == "attention" and given["qk_norm"] is None:
        q, k, v = (part.transpose(1, 2) for part in given["qkv"].unbind(2))
        yield from _attention(q, k, v, None)
    elif operation.name == "attention_dx" and given["qk_norm"] is None:
        q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in given["qkv"].unbind(2))
        B, N, _, H, d = given["qkv"].shape
        yield from _attention(q, k, v, given["d_out"].view(B, N, H, d).transpose(1, 2))


def _attention(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor | None) -> Iterator[tuple[str, Body]]:
    """With `d_out` the backward alone: of a graph that is kept, so that SDPA has its saved log-sum-exp."""
    for name, backend in BACKENDS.items():

        def forward(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=1.0)

        try:
            out = forward()
        except RuntimeError:
            continue  # not for this device, dtype or shape
        if d_out is None:
            yield name, forward
        else:
            yield name, lambda out=out: _backward(out, (q, k, v), d_out)


def _backward(out: Tensor, inputs: tuple[Tensor, ...], d_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `inputs`; the graph is kept.

    Autograd's engine runs a backward on the stream of its forward, which no CUDA graph of another stream can hold. What
    is one node of autograd's is therefore called as such: that runs here, on the stream of the caller.
    """
    node = out.grad_fn
    assert node is not None
    if not node.name().startswith("ScaledDotProduct"):
        return torch.autograd.grad(out, inputs, d_out, retain_graph=True)
    with torch.no_grad():
        return tuple(node(d_out)[: len(inputs)])


def errors(operation: Operation) -> tuple[float, float]:
    """Relative error against float64 of the operator and of its plain PyTorch reference; the worst of the results."""
    with smi_kernels.use_backend("reference"):
        exact, plain = _floats(operation.again(torch.float64)), _floats(operation.again())
    found = _floats(operation.again())
    worst = [
        max(
            ((part.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
            for part, truth in zip(side, exact, strict=True)
        )
        for side in (found, plain)
    ]
    return worst[0], worst[1]


def _floats(made: list[Tensor]) -> list[Tensor]:
    return [t for t in made if t.is_floating_point() and t.numel()]


def measure(operation: Operation, device: torch.device, ceilings: tuple[float, float], rounds: int) -> dict[str, Any]:
    ours, plain = errors(operation)
    warm = quantiles(operation.body, device, rounds)
    cold = quantiles(operation.body, device, rounds, cold=True)
    row: dict[str, Any] = {
        "operator": operation.name,
        "shape": list(operation.shape),
        "calls": operation.calls,
        "bytes": operation.bytes,
        "flops": operation.flops,
        "error": ours,
        "error_of_plain": plain,
        # Another order of sums, and in 16 bits another place where they are rounded.
        "passes": ours <= 4 * plain + 1e-6,
        "warm": warm,
        "cold": cold,
        "roofline_warm": max(operation.bytes / ceilings[0], operation.flops / ceilings[1]) / warm["median"],
        "roofline_cold": max(operation.bytes / ceilings[0], operation.flops / ceilings[1]) / cold["median"],
        "rivals": {},
        "failed": {},
    }
    for name, body in rivals(operation):
        try:
            row["rivals"][name] = quantiles(body, device, rounds)
        except Exception as error:  # of a library that has a forward for this shape, say, and no backward
            row["failed"][name] = _said(error)
    return row


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table(record: dict[str, Any]) -> str:
    lines = [f"{'operator':20s}{'largest operand':24s}{'warm us':>10s}{'cold us':>10s}{'roofline':>10s}  against"]
    for row in record["rows"]:
        against = [
            f"{name} {entry['median'] / row['warm']['median']:.2f}x{'' if clear(row['warm'], entry) else '?'}"
            f"{' with launches' if 'launches' in entry else ''}"
            for name, entry in row["rivals"].items()
        ]
        said = (
            ", ".join(against)
            if row["passes"]
            else f"FAILS: error {row['error']:.1e}, plain {row['error_of_plain']:.1e}"
        )
        lines.append(
            f"{row['operator']:20s}{' x '.join(map(str, row['shape'])):24s}{1e6 * row['warm']['median']:10.1f}"
            f"{1e6 * row['cold']['median']:10.1f}{row['roofline_warm']:10.0%}  {said}"
        )
    return "\n".join([*lines, "? is a difference within the spread of the rounds"])


def clear(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """Whether the 20 % and 80 % quantiles of the two do not overlap."""
    return ours["high"] < theirs["low"] or theirs["high"] < ours["low"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="random weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--kept", type=int, default=46)
    parser.add_argument("--precision", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no operator is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    began, device = time.monotonic(), resolve_device(args.device)
    torch.manual_seed(0)
    network = timm.create_model(args.model).eval()
    model = smi.SparseModel(network, name=args.model, device=device, precision=args.precision)
    if model.vit is None:
        raise SystemExit(f"{args.model} runs on timm's modules here: {'; '.join(model.against_kernels)}.")
    where = environment(device)
    ceilings = smi_kernels.ceilings(device, DTYPES[args.precision])
    inversion = in_phase(model, args.batch_size, args.kept)
    with smi_kernels.record_operations() as operations:
        inversion.step()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    failed: dict[str, str] = {}
    record = {
        "benchmark": "operations",
        "model": args.model,
        "batch_size": args.batch_size,
        "kept": args.kept,
        "precision": args.precision,
        "backend": model.backend,
        "rounds": args.rounds,
        "environment": where,
        "ceilings": {"copy": ceilings[0], "matmul": ceilings[1]},
        "rows": rows,
        "left_out": left_out,
        "failed": failed,
    }
    name = f"operations-{args.model}-{args.precision}"
    with smi_kernels.use_backend(model.backend):
        for operation in sorted(operations, key=lambda o: -o.calls * max(o.flops / ceilings[1], o.bytes / ceilings[0])):
            if time.monotonic() - began > args.budget:
                left_out.append(operation.name)
                continue
            try:
                rows.append(measure(operation, device, ceilings, args.rounds))
            except Exception as error:  # Triton's own are no RuntimeErrors; the other operators can still be timed
                failed[operation.name] = _said(error)
            write_result(args.out, name, record)  # now, for whatever ends the run
    print(table(record))
    if left_out:
        print(f"left out, for want of time: {', '.join(left_out)}")
    for operator, reason in failed.items():
        print(f"{operator} FAILS: {reason}")
    print(f"written to {write_result(args.out, name, record)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
