#!/usr/bin/env python
"""Everything that a machine with one GPU can tell, in one go: correctness, sanitizers, then all benchmarks.

First all cores compile what will be launched: else each part would begin with half a minute of one kernel at a time.

    python -m benchmarks.everything --out gpu-results              # under 9 minutes
    python -m benchmarks.everything --out gpu-results --quick      # 2 minutes

Each part is a process with a time of its own; one that fails or takes too long stops nothing after it. The folder then
holds ``summary.json`` (what ran, how long, how it ended), ``log.txt`` (all that was printed) and the result files,
which are written as they grow: whatever ends the run leaves what was found. Copy them to benchmarks/results/ and run
``python -m benchmarks.readme`` to publish them. Without a GPU the same parts run on the CPU, so that the script itself
is tried out; nothing is downloaded. Before, ``python csrc/build.py --out smi_kernels/_native`` compiles the operators
that a checkout has not; what is not there is neither tested nor timed, and the summary says so under ``backends``.
What torch.compile tunes takes longer to compile than there is time here, and wants a run of its own: ``python -m
benchmarks.end_to_end --models Ti S --implementations SMI C16 --whole --name end_to_end-compiled --minutes 8``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES
from benchmarks.end_to_end import ALL, MODELS
from benchmarks.timing import environment
from smi.devices import resolve_device
from smi.files import atomic_write
from smi_kernels import backends

ROOT = Path(__file__).parent.parent
MINUTES, QUICK_MINUTES = 8.7, 1.9
# Of compilers alone, which would have all the time: nothing of them runs on a GPU.
COMPILING = tuple(
    f"tests/test_cuda_operators.py::test_{name}"
    for name in (
        "no_kernel_races_or_leaves_its_arrays",
        "a_missing_barrier_would_be_seen",
        "no_spills_and_whole_vectors_on_every_architecture",
    )
)
GRACE = 4.0  # seconds to say what there is to say once the time is over


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: for the summary.
        share: of the whole time, at most.
        command: what runs, at the root of the checkout.
        needs: a program without which it is left out.
        quick: whether the short form has it too.
        variables: of the environment, in addition.
    """

    name: str
    share: float
    command: list[str]
    needs: str | None = None
    quick: bool = False
    variables: tuple[tuple[str, str], ...] = ()


def parts(out: Path, on_gpu: bool, seconds: float, quick: bool) -> list[Part]:
    """What runs, in order; shares of the chosen ones add up to at most 1.

    Args:
        out: folder for result files.
        seconds: for all of it.
    """
    ahead = _python("benchmarks.ahead", "--what", "short" if quick else "all")
    compiled = [Part("ahead", 0.12 if quick else 0.07, ahead, quick=True)] if on_gpu else []
    made = [*compiled, *_correctness(quick), *_benchmarks(out, on_gpu, seconds, quick)]
    return [part for part in made if part.quick or not quick]


def _correctness(quick: bool) -> list[Part]:
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*_kernels.py"))
    kernels += ["tests/test_vit.py", "tests/test_cuda_operators.py"]
    kernels += [word for test in COMPILING for word in ("--deselect", test)]
    # Few iterations in each phase, so that nothing is captured: sanitizers see every launch by itself.
    schedule = ["--iterations", "7", "--prune-at", "2,4", "--prune-ratio", ".3,.3"]
    pool = str(Path(tempfile.gettempdir()) / "smi-sanitized")
    short = _python("smi.cli", "invert", "embedded:teacher", "-n", "4", "-b", "4", *schedule, "--overwrite")
    # The CUDA operators too, where they were built: without nvcc there are Triton kernels alone.
    short += ["--out", pool, "--backend", "auto" if backends.reasons_against("cuda") else "cuda"]

    def sanitized(tool: str, share: float, **more: Any) -> Part:
        # Calls that PyTorch and Triton make to see what is there may fail; a launch that fails raises in any case.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = ["compute-sanitizer", "--tool", tool, *quiet, "--error-exitcode", "9", *short]
        return Part(tool, share, command, needs="compute-sanitizer", **more)

    # The allocator hands out parts of larger blocks, within which nothing is out of bounds.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    few = (("OMP_NUM_THREADS", "1"),)  # or each process would have one for each core, and all wait for each other
    return [
        # Few at a time: each brings a large network.
        Part("correctness", 0.25 if quick else 0.12, _tests(6, "tests/gpu"), quick=True, variables=few),
        Part("kernels", 0.12, _tests(16, *kernels), variables=few),
        sanitized("memcheck", 0.13 if quick else 0.06, quick=True, variables=apart),
        sanitized("racecheck", 0.06),
        sanitized("synccheck", 0.05),
    ]


def _tests(most: int, *suites: str) -> list[str]:
    """In several processes, `most` of them, where that is possible: the time goes into compiling kernels."""
    workers = min(most, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    parallel = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    # Not ended by the first failures, which may all be one fault that has nothing to do with the rest.
    told = ["-q", "--tb", "short", "--no-summary", "-p", "benchmarks.failures", "-p", "no:cacheprovider"]
    return _python("pytest", *told, "--maxfail", "50", *parallel, *suites)


def _benchmarks(out: Path, on_gpu: bool, seconds: float, quick: bool) -> list[Part]:
    precision = ["--precision", "bf16" if on_gpu else "fp32"]
    to = ["--out", str(out)]

    def within(share: float) -> str:
        """Seconds that a benchmark gives itself, so that it ends before it is ended."""
        return f"{0.8 * share * seconds:.0f}"

    end_to_end = 0.4 if quick else 0.27
    # What torch.compile makes is not among them: to compile it takes minutes, for the gate alone more than one.
    soon = [name for name in ALL if name not in BASELINES or not BASELINES[name].compiled]
    whole = ["--models", *MODELS, "--batch-sizes", "32", "128", "--implementations", *soon]
    chosen = ["--quick"] if quick or not on_gpu else whole
    minutes = ["--minutes", f"{0.8 * end_to_end * seconds / 60:.2f}"]
    small = ["--batch-size", "1", "--rounds", "5"]
    deit = ["deit_tiny_patch16_224", "--no-pretrained", "--kept", "46", "-b", "32" if on_gpu else "2", "--json"]
    rounds = ["--steps", "24" if on_gpu else "2", "--rounds", "3", "--schedule-rounds", "1"]
    return [
        Part("profile", 0.05, _python("smi.cli", "profile", *deit, *precision)),
        Part("end_to_end", end_to_end, _python("benchmarks.end_to_end", *chosen, *minutes, *to), quick=True),
        Part(
            "operations",
            0.1,
            _python(
                *("benchmarks.operations", *precision, "--budget", within(0.1), *to),
                *(["--batch-size", "128"] if on_gpu else small),
            ),
            quick=True,
        ),
        Part(
            "scaling",
            0.05,
            _python("benchmarks.scaling", *precision, "--budget", within(0.05), *to, *([] if on_gpu else ["--few"])),
        ),
        Part(
            "sparse_vs_dense",
            0.05,
            _python("benchmarks.sparse_vs_dense", *rounds, *to, *([] if on_gpu else ["--batch-size", "1"])),
        ),
    ]


def _python(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", module, *args]


def run(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run one part, what it prints at the end of `log`; how it ended."""
    told: dict[str, Any] = {"part": part.name, "command": " ".join(map(str, part.command)), "limit": round(seconds, 1)}
    if part.needs and shutil.which(part.needs, path=_path()) is None:
        return {**told, "status": f"left out: there is no {part.needs} here", "seconds": 0.0}
    if seconds < 1:
        return {**told, "status": "left out: no time left", "seconds": 0.0}
    began = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n===== {part.name}: {told['command']}\n".encode())
        file.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict(part.variables), "PATH": _path(), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that its own children end with it
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = "took too long" if code is None else "ok" if code == 0 else f"failed with exit code {code}"
    return {**told, "status": status, "seconds": round(time.monotonic() - began, 1)}


def _path() -> str:
    """Where programs are looked for; tools of CUDA may lie beside its compiler, and not on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(home, "bin"))])


def run_all(chosen: list[Part], seconds: float, out: Path, device: torch.device) -> list[dict[str, Any]]:
    """Every part in its time, and what the ones before left over; the summary after each."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_bytes(b"")
    end = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    spare = 0.0
    for part in chosen:
        allowed = part.share * seconds + spare
        found.append(run(part, min(allowed, end - time.monotonic()), log))
        spare = max(0.0, allowed - found[-1]["seconds"])
        print(f"{part.name:16s} {found[-1]['seconds']:7.1f} s  {found[-1]['status']}", flush=True)
        # What is not live is left out by tests and benchmarks alike, which end well all the same.
        lives = {b.name: f"{'live' if b.live else 'not live'}: {b.reason}" for b in backends.status()}
        summary = {"environment": environment(device), "backends": lives, "seconds": seconds, "parts": found}
        atomic_write(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is found")
    parser.add_argument("--quick", action="store_true", help=f"in {QUICK_MINUTES} minutes")
    parser.add_argument("--minutes", type=float, help=f"in all; default {MINUTES}")
    parser.add_argument("--only", nargs="+", help="names of parts")
    args = parser.parse_args()
    device = resolve_device("auto")  # which every part takes too
    seconds = 60 * (args.minutes or (QUICK_MINUTES if args.quick else MINUTES))
    out = args.out.resolve()
    chosen = parts(out, device.type == "cuda", seconds, args.quick)
    names = [part.name for part in chosen]
    if args.only:
        unknown = set(args.only) - set(names)
        if unknown:
            parser.error(f"there is no part {sorted(unknown)[0]!r}; choose among {', '.join(names)}")
        chosen = [part for part in chosen if part.name in args.only]
    found = run_all(chosen, seconds, out, device)
    print(f"written to {out}")
    sys.exit(any(entry["status"].startswith(("failed", "took")) for entry in found))


if __name__ == "__main__":
    main()
