"""Kernels compiled before they are launched: what is foreseen, and that a launch then finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# With tensors that have memory, as a launch has them; the cache tells whether it had the kernel.
SCRIPT = """
import torch
import triton
from triton.runtime import driver
from benchmarks import ahead

if __name__ == "__main__":
    wanted = ahead.launches("teacher", 90)
    iteration = {
        *("begin_step", "embed_tokens", "norm_linear", "attention", "class_attention", "linear_residual"),
        *("cross_entropy_head", "linear_gelu_dx", "linear_dx", "norm_linear_dx", "attention_long_dx", "prior_sums"),
        *("class_attention_dx", "embed_tokens_dx", "pixel_step", "finish_prior_sums", "select_tokens", "rank_tokens"),
    }
    assert iteration == {launch.name.removesuffix("_kernel") for launch in wanted}
    names = ("prior_sums_kernel", "linear_dx_kernel")
    some = [next(launch for launch in wanted if launch.name == name) for name in names]
    assert ahead.compile_all(some, 90, 1, launchers=False) == []
    driver.set_active(ahead.Target(90))
    hits = []
    triton.knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
    for launch in some:
        args = {
            name: torch.empty(64, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in launch.args.items()
        }
        launch.kernel.run(grid=launch.grid, warmup=True, **args, **launch.options)
    assert hits == [True, True], hits
    (failed,) = ahead.compile_all([ahead.Launch(some[0].kernel, (1,), {}, {})], 90, 1, launchers=False)
    assert failed.startswith("prior_sums_kernel"), failed
"""


TILES = """
import itertools
import torch
from benchmarks import ahead
from smi_kernels import tuning

for capability, expected in ((80, {255}), (90, {128, 255})):
    products = [of for of in ahead.launches("short", capability) if of.name == "norm_linear_dx_kernel"]
    assert {of.options["maxnreg"] for of in products if of.args["BLOCK_N"] == 128 or capability == 80} <= expected
    assert any(of.options["maxnreg"] == 128 for of in products) is (capability == 90)
"""


def test_tiles_are_those_of_the_gpu_that_is_compiled_for() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TILES], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_launch_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SMI_PDL")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_there_is_nothing_to_compile_for() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.ahead", "--what", "teacher"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no CUDA GPU is visible" in done.stderr
