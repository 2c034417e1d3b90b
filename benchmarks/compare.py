#!/usr/bin/env python
"""This tree against another revision of it, in one interleaved run, so that a slowdown is seen before it lands.

    python -m benchmarks.compare HEAD~3
    python -m benchmarks.compare v0.2 --what teacher deit --rounds 15 --fail-above 1.05

The other revision is checked out beside, with its own compiled operators, and each side runs in a process of its own;
rounds go A B A B. Both first compute the same iterations: where kept patches or pixels differ by more than rounding, no
ratio is printed. A ratio whose difference is within the spread of the rounds is marked with ~.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smi.errors import SmiError

ROOT = Path(__file__).parent.parent
WORKLOADS = ("teacher", "deit")
TOLERANCE = 1e-2  # of normalised pixels after a few iterations; another order of sums grows to 1e-4

# Runs in either tree, so it may only use what old revisions have: smi.Inversion and smi.Config.
WORKER = """
import json, sys, time
import torch, timm, smi

def made(what, images):
    torch.manual_seed(0)
    if what == "teacher":
        model, ratio = smi.load_model("embedded:teacher"), (0.3, 0.3, 0.3, 0.22)
    else:
        model, ratio = timm.create_model("deit_tiny_patch16_224").eval(), (0.3, 0.3, 0.3, 0.3)
    config = smi.Config(
        iterations=100_000, prune_at=(1, 3, 5, 7), prune_ratio=ratio, jitter="patch", snapshots=0,
        learning_rate=0.02, eps=1e-3,
    )
    classes = 10 if what == "teacher" else 1000
    return smi.Inversion(model, [i % classes for i in range(images)], config)

def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

runs = {}
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "make":
        run = runs[order["what"]] = made(order["what"], order["images"])
        for _ in range(10):
            run.step()
        torch.save({"images": run.images.detach().cpu(), "keep": run.keep.cpu()}, order["file"])
        answer = {}
    else:
        run = runs[order["what"]]
        wait()
        began = time.perf_counter()
        for _ in range(order["steps"]):
            run.step()
        wait()
        answer = {"seconds": (time.perf_counter() - began) / order["steps"]}
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Side:
    """One tree at work in its own process."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._tree = tree

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise SmiError(f"{str(self._tree)!r} cannot run {order.get('what')!r}; what it says is above.")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with that revision and its compiled operators, which goes when the context ends, however it ends.

    Raises:
        SmiError: no such revision, or operators that do not compile.
    """
    name = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if name is None:
        raise SmiError(f"{revision!r} is no revision here; name a commit, a tag or a branch (git log shows them).")
    with tempfile.TemporaryDirectory(prefix="smi-compare-") as folder:
        tree = Path(folder) / "tree"
        try:
            if _git("worktree", "add", "--detach", "--force", str(tree), name) is None:
                raise SmiError(f"{revision!r} cannot be checked out beside this tree; git says why above.")
            if (tree / "csrc" / "build.py").is_file():
                _build(tree)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _build(tree: Path) -> None:
    command = [sys.executable, "csrc/build.py", "--out", "smi_kernels/_native"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise SmiError(f"the operators of {str(tree)!r} do not compile: {' '.join(last)}")


def compared(sides: dict[str, Side], what: str, images: int, steps: int, rounds: int) -> dict[str, Any]:
    """One workload on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name, side in sides.items():
            file = Path(folder) / name
            side.ask(do="make", what=what, images=images, file=str(file))
            results.append(torch.load(file, weights_only=True))
    here, there = results
    same = torch.equal(here["keep"], there["keep"])
    difference = (here["images"] - there["images"]).abs().max().item()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.ask(do="time", what=what, steps=steps)  # warm
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.ask(do="time", what=what, steps=steps)["seconds"])
    return {"what": what, "same_patches": same, "difference": difference, **verdict(seconds, same, difference)}


def verdict(seconds: dict[str, list[float]], same: bool, difference: float) -> dict[str, Any]:
    """Medians, 20 and 80 % quantiles, and the ratio of this tree's time to the other's where both compute the same."""
    table = {}
    for name, values in seconds.items():
        ordered = sorted(values)
        cut = len(ordered) // 5
        table[name] = {"median": statistics.median(ordered), "low": ordered[cut], "high": ordered[-1 - cut]}
    mine, theirs = table.values()
    passed = same and difference <= TOLERANCE
    return {
        "seconds": table,
        "passed": passed,
        "ratio": mine["median"] / theirs["median"] if passed else None,
        "clear": mine["low"] > theirs["high"] or mine["high"] < theirs["low"],
    }


def fails(row: dict[str, Any], above: float) -> bool:
    """Whether this tree clearly takes more than `above` times as long, or computes something else."""
    return not row["passed"] or (row["clear"] and row["ratio"] > above)


def line(row: dict[str, Any]) -> str:
    mine, theirs = row["seconds"].values()
    times = "   ".join(
        f"{1e3 * t['median']:9.2f} ms ({1e3 * t['low']:.2f}-{1e3 * t['high']:.2f})" for t in (mine, theirs)
    )
    if not row["passed"]:
        why = f"pixels differ by {row['difference']:.1e}" if row["same_patches"] else "other patches are kept"
        return f"{row['what']:10s} {times}   no ratio: {why}"
    mark = "" if row["clear"] else "~"
    return f"{row['what']:10s} {times}   {mark}{row['ratio']:.3f} of the other's time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="commit, tag or branch to compare this tree with")
    parser.add_argument("--what", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="iterations of a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--fail-above",
        type=float,
        help="exit with 1 if this tree clearly takes so many times as long, or cannot be compared",
    )
    args = parser.parse_args()
    slow = False
    with checked_out(args.revision) as other:
        sides: dict[str, Side] = {}
        try:
            sides |= {"here": Side(ROOT), "there": Side(other)}
            print(f"{'':10s} {'this tree':>34s}   {args.revision:>34s}")
            for what in args.what:
                row = compared(sides, what, args.images, args.steps, args.rounds)
                print(line(row), flush=True)
                slow |= args.fail_above is not None and fails(row, args.fail_above)
        finally:
            for side in sides.values():
                side.end()
    sys.exit(slow)


if __name__ == "__main__":
    try:
        main()
    except SmiError as error:
        sys.exit(f"error: {error}")
