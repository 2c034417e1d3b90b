#!/usr/bin/env python
"""Compiles what the other benchmarks will launch, one process a core, into Triton's cache.

    python -m benchmarks.ahead

Triton compiles a kernel when it is first launched: one at a time, while somebody waits, and for half a minute before an
inversion of one network is under way, of which a benchmark then times a few seconds. Launches are recorded on tensors
without memory, in the order of their worth, and each takes the way of an ordinary launch up to the GPU, so that the
cache has all that it will ask for. What is not foreseen here is compiled then, as ever.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import smi
from benchmarks.end_to_end import MODELS
from benchmarks.gate import GATED, STEPS
from benchmarks.scaling import AXES, points
from smi.embedded import build_teacher
from smi_kernels import PixelDescent, SparseViT, aot, tuning
from smi_kernels.launch import DEPENDENT_LAUNCH, Launch, record_launches

PAPER = smi.preset("paper-quant")


@dataclass(frozen=True)
class Target:
    """Stands in for Triton's driver, so that a GPU which is there is left alone."""

    capability: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def folded(model: Callable[[], Any], precision: Any) -> SparseViT:
    with torch.device("meta"):
        return SparseViT.from_timm(model(), precision)


def inversion(vit: SparseViT, config: smi.Config, batch: int) -> None:
    """One iteration and one pruning of each phase of an inversion."""
    config = config.resolved()
    w = vit.weights
    size = (w.channels, w.grid[0] * w.patch_size[0], w.grid[1] * w.patch_size[1])
    draws = 1 if config.augment_per == "batch" else batch
    bound = empty(w.channels)
    descent = PixelDescent(
        vit,
        empty(batch, *size),
        empty(batch, dtype=torch.int64),
        empty(config.iterations, draws, 3, dtype=torch.int64),
        low=bound,
        high=bound,
        group=1 if config.norm == "image" else batch,
        frozen=config.stopped == "frozen",
    )
    fed = w.grid[0] * w.grid[1]
    descent.advance(1)
    for count in config.schedule(fed).values():
        descent.rank(fed)
        torch.ops.smi.select_tokens(empty(batch, fed), empty(batch, fed, dtype=torch.int64), count)
        fed = count
        descent.prune(empty(batch, fed, dtype=torch.int64))
        descent.advance(1)


def call(vit: SparseViT, batch: int, kept: int | None) -> None:
    """Logits, and the gradient that autograd hands back to the pixels."""
    w = vit.weights
    height, width = (cells * patch for cells, patch in zip(w.grid, w.patch_size, strict=True))
    keep = None if kept is None else empty(batch, kept, dtype=torch.int64)
    trace = vit.run(empty(batch, w.channels, height, width), keep, None)
    d_patches = vit.backward_of(trace, trace.parts.sum(0))
    torch.ops.smi.patches_to_pixels(d_patches, keep, None, height, width, *w.patch_size)


WHAT = ("teacher", "short", "all")


def launches(what: str, capability: int) -> list[Launch]:
    """One of each kind, of all benchmarks and tests at real sizes, of the short form of them, or of the teacher's.

    Args:
        capability: compute capability times 10, by which tiles are chosen.
    """
    steady = smi.Config(iterations=10_000, prune_at=(1,), prune_ratio=(1 - 46.5 / 196,))
    with record_launches() as seen, tuning.assuming(capability):
        for short, name in MODELS.items():
            if what == "teacher" or (what == "short" and short != "Ti"):
                break
            vit = folded(lambda name=name: timm.create_model(name, depth=2), "bf16")
            # Of moved prunings, and of the whole schedule; lengths are divisible by 16, or not.
            for batch, iterations in ((32, 390), (128, 390), (32, PAPER.iterations)):
                inversion(vit, PAPER.replace(semantics="official", iterations=iterations), batch)
            inversion(
                vit,
                PAPER.replace(semantics="official", iterations=STEPS, prune_at=(1,), prune_ratio=steady.prune_ratio),
                GATED,
            )
            for kept in (None, 46):
                call(vit, GATED, kept)
            if short == "Ti":
                for batch in (32, 128):
                    inversion(vit, steady, batch)
        teacher = folded(build_teacher, "fp32")
        inversion(teacher, smi.Config(iterations=7, prune_at=(2, 4), prune_ratio=(0.3, 0.3)), 4)
        for batch, iterations in ((10, 24), (10, 60), (smi.preset("demo").batch_size, smi.preset("demo").iterations)):
            inversion(teacher, smi.preset("demo").replace(iterations=iterations, prune_at=(4, 8, 12, 16)), batch)
        if what == "all":
            for name in (MODELS["Ti"], MODELS["S"], MODELS["L"]):
                for precision in ("bf16", "fp16", "tf32", "fp32"):
                    vit = folded(lambda name=name: timm.create_model(name, depth=2), precision)
                    for kept in (46, 95, None):
                        call(vit, 4, kept)
            for point in dict.fromkeys(point for axis in AXES if axis != "depth" for point in points(axis, few=False)):
                network = {"img_size": point.size, "embed_dim": 192, "num_heads": 3, "depth": 2}
                cells = (point.size // 16) ** 2
                shorter = {"prune_ratio": (1 - (point.kept + 0.5) / cells,)}
                config = steady.replace(**(shorter if point.kept < cells else {"strategy": "dense"}))
                inversion(folded(lambda network=network: VisionTransformer(**network), "bf16"), config, point.images)
    found: dict[aot.Specialization, Launch] = {}
    for launch in seen:
        found.setdefault(aot.specialize(launch), launch)
    return list(found.values())


_tasks: list[Launch] = []


def compile_all(wanted: Sequence[Launch], capability: int, jobs: int, launchers: bool) -> list[str]:
    """Each of them; what failed, in words.

    Args:
        capability: compute capability times 10.
        launchers: whether to compile what hands arguments over to the GPU's driver too, which has to be there.
    """
    _tasks[:] = wanted
    with multiprocessing.get_context("fork").Pool(jobs, _begin, (capability, launchers)) as pool:
        return [failed for failed in pool.imap_unordered(_compile, range(len(wanted)), chunksize=1) if failed]


def _begin(capability: int, launchers: bool) -> None:
    from triton.runtime import driver

    driver.set_active(Target(capability))
    globals()["_launchers"] = launchers


def _compile(number: int) -> str:
    launch = _tasks[number]
    try:
        compiled = launch.kernel.run(grid=launch.grid, warmup=True, **launch.args, **launch.options)
    except Exception as error:  # of whatever kind, it is the kernel's tests that have to fail
        return f"{launch.name} {aot.specialize(launch)}: {type(error).__name__}: {error}"
    if _launchers:
        with contextlib.suppress(Exception):  # it is made at the first launch, then
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
    return ""


_launchers = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=WHAT, default="all", help="of the small teacher, of the short form, or all")
    jobs = min(32, len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=jobs, help="processes; default: one a core, 32 at most")
    args = parser.parse_args()
    if torch.cuda.device_count() == 0:
        raise SystemExit("no CUDA GPU is visible, for which something could be compiled.")
    began = time.monotonic()
    # Asked elsewhere, for a process that has used CUDA should not fork.
    ask = [sys.executable, "-c", "import torch; print(*torch.cuda.get_device_capability())"]
    major, minor = map(int, subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split())
    wanted = launches(args.what, 10 * major + minor)
    print(f"{len(wanted)} kernels recorded in {time.monotonic() - began:.1f} s", flush=True)
    dependent = None
    if args.what == "all" and not DEPENDENT_LAUNCH and major >= 9:  # other kernels, which a test holds against these
        command = [sys.executable, "-m", "benchmarks.ahead", "--what", "teacher", "--jobs", str(args.jobs)]
        dependent = subprocess.Popen(command, env={**os.environ, "SMI_PDL": "1"})
    failed = compile_all(wanted, 10 * major + minor, args.jobs, launchers=True)
    print(*failed, f"compiled in {time.monotonic() - began:.1f} s, {len(failed)} failed", sep="\n", flush=True)
    sys.exit(bool(failed) or (dependent is not None and dependent.wait() != 0))


if __name__ == "__main__":
    main()
