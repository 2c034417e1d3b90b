#!/usr/bin/env python
"""The compiled operators on a CPU against plain PyTorch doing the same sparse work.

    python -m benchmarks.cpu_operators

Two measurements, each behind a check that both sides compute the same. The image side alone: patches read under roll
and flip, image priors, Adam, clamp. The whole iteration: the same with forward and backward over the kept patches; the
plain side is timm's own modules with frozen weights, fused attention, and no patch embedded that is not kept. Both
take turns in one process; medians of the rounds. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import smi
import smi_kernels
import smi_kernels.patch_embed.cpu
from benchmarks.timing import RESULTS, environment, interleaved, write_result
from smi_kernels import backends, native

CPU = torch.device("cpu")
PATCH = (16, 16)
ADAM = {"lr": 0.25, "beta1": 0.5, "beta2": 0.99, "eps": 1e-8}
TV2 = 1e-2


class ImageSide:
    """What an iteration does to a batch of pixels, with a given gradient in place of the network's."""

    def __init__(self, images: int, size: int, kept: int) -> None:
        generator = torch.Generator().manual_seed(0)
        side = size // PATCH[0]
        self.images = torch.randn(images, 3, size, size, generator=generator)
        self.moments = [torch.zeros_like(self.images), torch.zeros_like(self.images)]
        order = torch.rand(images, side * side, generator=generator).argsort(1)
        self.keep = order[:, :kept].sort(1).values
        self.d_patches = 1e-3 * torch.randn(images, kept, 3 * PATCH[0] * PATCH[1], generator=generator)
        whole = torch.randint(-1, 2, (images, 3), generator=generator) * PATCH[0]
        self.offsets = torch.where(torch.tensor([True, True, False]), whole, (whole > 0).long())
        self.bounds = {"low": torch.full((3,), -2.0), "high": torch.full((3,), 2.0)}
        self.slots = smi_kernels.patch_embed.reference.slot_table(self.keep, side * side)
        self.grid = (side, side)

    def plain(self) -> None:
        """As a loop in plain PyTorch does it: autograd through the read and the priors, then Adam."""
        self.images.requires_grad_(True)
        cells = smi_kernels.map_cells(self.keep, self.offsets, self.grid, PATCH)
        patches = smi_kernels.gather_patches(self.images, cells, self.offsets, PATCH)
        loss = (patches * self.d_patches).sum() + TV2 * smi_kernels.tv_l2(self.images, per_image=True).sum()
        (grad,) = torch.autograd.grad(loss, self.images)
        self.images.requires_grad_(False)
        smi_kernels.adam_clamp_(self.images, grad, *self.moments, step=1, **ADAM, **self.bounds)

    def compiled(self) -> None:
        """As a fused iteration does it; reading the patches has its cost here too."""
        ops, (H, W) = torch.ops.smi, self.images.shape[2:]
        step, table = torch.zeros(1, dtype=torch.int64), self.offsets[None]
        if not hasattr(self, "sums"):
            self.sums = ops.prior_sums(self.images)
        offsets, correction, coefficients = ops.begin_step(
            step, table, self.sums, 0.0, TV2, 0.0, 1, H, W, ADAM["beta1"], ADAM["beta2"], None
        )
        smi_kernels.patch_embed.cpu.read_patches(self.images, self.keep, offsets, *PATCH)
        self.images, rows = ops.pixel_step(
            self.images, *self.moments, self.d_patches, None, self.slots, offsets, coefficients, 1, correction,
            *ADAM.values(), *self.bounds.values(), False, *PATCH,
        )  # fmt: skip
        self.sums = ops.finish_prior_sums(self.images, rows, step)


def on(backend: str, body: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with smi_kernels.use_backend(backend):
            body()

    return run


def agree(name: str, plain: Tensor, compiled: Tensor, at_most: float) -> float:
    """The relative difference of the two. Raises SystemExit if they do not compute the same: no speed is shown then."""
    difference = ((plain - compiled).norm() / plain.norm()).item()
    if not difference <= at_most:
        raise SystemExit(f"{name}: plain and compiled differ by {difference:.1e}, at most {at_most:g} is expected.")
    return difference


def image_side(images: int, size: int, kept: int, rounds: int) -> dict[str, Any]:
    sides = {"plain": ImageSide(images, size, kept), "compiled": ImageSide(images, size, kept)}
    bodies = {
        "plain": on("reference", sides["plain"].plain),
        "compiled": on("cpu", sides["compiled"].compiled),
    }
    for body in bodies.values():
        body()
    difference = agree("image side", sides["plain"].images, sides["compiled"].images, 1e-5)
    return row(interleaved(bodies, rounds=rounds, device=CPU), difference)


def whole_iteration(name: str, images: int, kept: int, rounds: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    targets = [i % network.num_classes for i in range(images)]
    cells = network.patch_embed.num_patches
    config = smi.Config(iterations=steps * (rounds + 1) + 6, prune_at=(1,), prune_ratio=(1 - (kept + 0.5) / cells,))
    plain_model = smi.SparseModel(network, backend="reference")
    runs = {
        "plain": smi.Inversion(plain_model, targets, config),
        "compiled": smi.Inversion(smi.SparseModel(network, backend="cpu"), targets, config),
    }
    for run in runs.values():
        for _ in range(2):
            run.step()
        assert run.keep.shape[1] == kept, run.keep.shape
    if not torch.equal(runs["plain"].keep, runs["compiled"].keep):
        raise SystemExit("whole iteration: plain and compiled keep different patches.")
    # Later, Adam at this step size makes two correct loops differ; what is timed is the same work.
    difference = agree("whole iteration", runs["plain"].images, runs["compiled"].images, 1e-2)

    def advance(run: smi.Inversion) -> None:
        for _ in range(steps):
            run.step()

    for run in runs.values():
        advance(run)
    times = interleaved({k: lambda run=v: advance(run) for k, v in runs.items()}, rounds=rounds, device=CPU)
    return row(times, difference, steps)


def row(times: dict[str, dict[str, Any]], difference: float, steps: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"seconds": entry["median"] / steps, "spread": entry["spread"]} for name, entry in times.items()
    }
    found["speed_up"] = found["plain"]["seconds"] / found["compiled"]["seconds"]
    found["difference"] = difference
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8, help="of the whole iteration")
    parser.add_argument("--kept", type=int, default=46, help="patches of an image that are fed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    reasons = backends.reasons_against("cpu")
    if reasons:
        raise SystemExit(f"the compiled operators cannot run here: {'; '.join(reasons)}.")
    record = {
        "benchmark": "cpu_operators",
        "model": args.model,
        "batch_size": args.batch_size,
        "kept": args.kept,
        "rounds": args.rounds,
        "operators": native.about(),
        "environment": environment(CPU),
        "image_side": image_side(32, 224, args.kept, args.rounds),
        "whole_iteration": whole_iteration(args.model, args.batch_size, args.kept, args.rounds, steps=5),
    }
    for name in ("image_side", "whole_iteration"):
        entry = record[name]
        print(
            f"{name.replace('_', ' '):16s} plain {1e3 * entry['plain']['seconds']:8.1f} ms   "
            f"compiled {1e3 * entry['compiled']['seconds']:7.1f} ms   {entry['speed_up']:5.2f}x"
        )
    print(f"written to {write_result(args.out, 'cpu_operators', record)}")


if __name__ == "__main__":
    main()
