"""Compiling ahead of time: what Triton would compile, what the machine code is read to need, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smi_kernels.aot import Resources

ROOT = Path(__file__).parent.parent

COMPILED = """
import dataclasses, json, torch
from smi_kernels import aot
from smi_kernels.launch import record_launches
from smi_kernels.linear.kernels import linear_dx
from smi_kernels.token_select.kernels import select_tokens

def empty(*shape, dtype): return torch.empty(shape, dtype=dtype, device="meta")

with record_launches() as launches:
    select_tokens(empty(2, 46, dtype=torch.float32), empty(2, 46, dtype=torch.int64), 23)
    linear_dx(empty(1504, 384, dtype=torch.bfloat16), empty(384, 384, dtype=torch.bfloat16), torch.bfloat16)
select, matrix = launches
starved = dataclasses.replace(matrix, options={"num_warps": 1, "num_stages": 2})
found = [aot.compile_launch(launch, 90) for launch in (select, matrix, starved)]
print(json.dumps([{**dataclasses.asdict(one), "faults": one.faults()} for one in found]))
"""

AGREES = """
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from smi_kernels import aot

backend = CUDABackend(GPUTarget("cuda", 90, 32))
values = [True, 0, 2, 16, -16, 2**31 - 1, 2**31, 2**40 + 1, 1.0, 0.5, *(torch.empty(8, dtype=t) for t in aot._TYPES)]
values += [torch.empty(64)[4:], torch.empty(64)[1:], torch.empty(64, dtype=torch.bfloat16)[8:]]
for value in values:
    kind, attributes = native_specialize_impl(backend, value, False, True, True)
    assert aot._describe(value) == (kind, "D" in (attributes or "")), value
for value, expected in ((1, ("constexpr", 1)), (16, ("i32", ""))):  # what do_not_specialize_on_alignment leaves
    assert native_specialize_impl(backend, value, False, True, False) == expected, value
"""


def plain(code: str) -> str:
    """What `code` prints in a process in which Triton is not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_describes_arguments_as_triton_does() -> None:
    pytest.importorskip("triton._C.libtriton")
    plain(AGREES)


def test_reads_the_machine_code_of_a_gpu_that_is_not_here() -> None:
    pytest.importorskip("triton._C.libtriton")
    select, matrix, starved = json.loads(plain(COMPILED))
    assert select["kernel"] == "select_tokens_kernel" and select["faults"] == []
    assert select["matrix"] == {} and select["products16"] == [] and 8 <= select["registers"] <= 64
    assert select["narrow"]["LDG"] >= 2 and select["narrow"]["STG"] >= 1
    assert matrix["faults"] == [] and matrix["matrix"].keys() == {"HGMMA"}
    assert matrix["products16"][0] >= 64 and matrix["shared"] > 0 and matrix["wide"]["LDGSTS"] > 0
    assert starved["spills"] > 0 and starved["stack"] > 0
    assert any(fault.startswith("spills") for fault in starved["faults"])


GOOD = Resources(
    kernel="k",
    specialization="bf16",
    capability=90,
    registers=255,
    stack=0,
    spills=0,
    shared=227 * 1024,
    matrix={"HGMMA": 4},
    wide={},
    narrow={},
    early=None,
    products16=(64,),
)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spills": 1}, "spills"),
        ({"stack": 8}, "spills"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"capability": 80, "matrix": {"HMMA": 1}}, "shared memory"),
        ({"capability": 100, "matrix": {"UTCHMMA": 1}}, None),
        ({"matrix": {"HMMA": 4}}, "without HGMMA"),
        ({"matrix": {"HMMA": 4}, "products16": (16,)}, None),
        ({"matrix": {}, "products16": (16,)}, "without matrix"),
        ({"matrix": {}, "products16": ()}, None),
        ({"early": 0}, None),
        ({"early": 2}, "before it waits"),
    ],
)
def test_faults(changes: dict[str, object], fault: str | None) -> None:
    found = dataclasses.replace(GOOD, **changes).faults()  # type: ignore[arg-type]
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]


COVERED = """
from smi_kernels import aot, tuning

for capability in aot.SHARED_MEMORY:
    met = set()
    for launch in aot.shipped_launches(capability, few=True):
        args, by = launch.args, launch.args.get("BY", "pointers")
        if "BLOCK_K" in args and "weight_ptr" in args and by != "tma":
            arithmetic = "16-bit" if args["weight_ptr"].dtype.itemsize == 2 else args["PRECISION"]
            sizes = (args["BLOCK_M"], args["BLOCK_N"], args["BLOCK_K"], launch.options["maxnreg"], by)
            met.add((arithmetic, launch.name.removesuffix("_kernel"), *sizes))
    for (arithmetic, operation), tiles in tuning.candidates(capability).items():
        for tile in tiles:
            if (arithmetic, operation, tile.m, tile.n, tile.k, tile.registers, tile.by) not in met:
                print(capability, arithmetic, operation, tile)
"""


PRUNED = """
import timm.models.vision_transformer as timm
import torch
import smi_kernels
from smi_kernels import aot, tuning
from smi_kernels.launch import record_launches

def empty(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device="meta")

TILES = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D", "EVEN_K", "WHOLE"}
B, found = 32, {}
for merge_to in (None, 0.8):
    with torch.device("meta"):
        vit = smi_kernels.SparseViT.from_timm(timm.VisionTransformer(embed_dim=192, depth=3, num_heads=3), "bf16")
    vit.merge_to = merge_to
    for K in (*range(46, 69), 80, 96, *((137, 176, 195) if merge_to is None else ())):  # merged from one kernel's reach
        images, keep = empty(B, 3, 224, 224), empty(B, K, dtype=torch.int64)
        table, of_class = empty(9, B, 3, dtype=torch.int64), empty(B, dtype=torch.int64)
        with record_launches() as launches, tuning.assuming(90):
            descent = smi_kernels.PixelDescent(vit, images, of_class, table, low=empty(3), high=empty(3))
            descent.prune(keep)
            descent.advance(1)
            if merge_to is None:
                descent.rank(K // 2)
            torch.ops.smi.select_tokens(empty(B, K), keep, K // 2)
            key = empty(B, 3, 1 + K, 64, dtype=torch.bfloat16)
            torch.ops.smi.attention_row(key[:, :, 0], key, 0.125)
            torch.ops.smi.patches_to_pixels(empty(B, K, 768), keep, None, 224, 224, 16, 16)
        kinds = {}
        for launch in launches:
            made = aot.specialize(launch)
            constants = tuple((name, value) for name, value in made.constants if name not in TILES)
            kinds.setdefault(launch.name, set()).add((made.types, constants, made.aligned))
        for name, kind in kinds.items():
            if found.setdefault((name, merge_to), kind) != kind:
                print(name, merge_to, K, kind ^ found[name, merge_to])
print(*sorted({name for name, _ in found}))
"""


def test_a_pruning_changes_tiles_and_nothing_else_that_is_compiled_for() -> None:
    kernels = plain(PRUNED).splitlines()
    assert len(kernels) == 1, "\n".join(kernels[:-1])
    iteration = {"embed_tokens", "norm_linear", "norm_linear_dx", "embed_tokens_dx", "pixel_step", "rank_tokens"}
    assert {f"{name}_kernel" for name in iteration | {"merge_tokens", "pair_tokens"}} - set(kernels[0].split()) == set()


UNEVEN = """
import torch
from smi_kernels import aot, tuning
from smi_kernels.launch import record_launches
from smi_kernels.linear import kernels

def empty(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device="meta")

low = torch.bfloat16
with record_launches() as launches, tuning.assuming(90):
    for width, hidden in ((200, 800), (208, 832), (384, 1000)):
        rows, weight = empty(16384, width, dtype=low), empty(hidden, width, dtype=low)
        wide, weight2 = empty(16384, hidden, dtype=low), empty(width, hidden, dtype=low)
        vector = empty(hidden)
        kernels.norm_linear(rows, empty(16384, -(-width // 64), 2), weight, vector, vector, 1e-6, torch.float32)
        kernels.linear_residual(wide, weight2, vector[:width], empty(16384, width))
        kernels.linear_gelu_dx(rows, weight2, wide, vector, vector)
for launch in launches:
    found = aot.compile_launch(launch, 90)
    if found.spills or (launch.args["BLOCK_M"], launch.args["BLOCK_N"]) != (128, 128):
        print(found)
"""


def test_widths_that_are_no_multiples_of_16_do_not_spill() -> None:
    pytest.importorskip("triton._C.libtriton")
    assert plain(UNEVEN) == ""


def test_workloads_meet_every_shipped_tile() -> None:
    assert plain(COVERED) == ""


def test_everything_shipped_compiles_without_faults(tmp_path: Path) -> None:
    """No spills, no more shared memory than there is, matrix instructions where there are matrix products."""
    pytest.importorskip("triton._C.libtriton")
    out = tmp_path / "resources.json"
    command = [sys.executable, "-m", "smi_kernels.aot", "--few", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    sources = "".join(path.read_text() for path in ROOT.glob("smi_kernels/*/*.py"))
    assert {row["kernel"] for row in rows} == set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))
    assert {row["capability"] for row in rows} == {80, 90, 100}


def test_kernels_launched_as_dependents_wait_before_they_touch_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton._C.libtriton")
    out = tmp_path / "resources.json"
    command = [sys.executable, "-m", "smi_kernels.aot", "--few", "--capability", "90", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "SMI_PDL": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert {row["early"] for row in rows} == {0}
    sources = "".join(path.read_text() for path in ROOT.glob("smi_kernels/*/*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE)
    assert len(kernels) == len(re.findall(r"^    wait_for_previous\(\)$", sources, flags=re.MULTILINE))
    assert {row["kernel"] for row in rows} <= set(kernels) and len({row["kernel"] for row in rows}) > 15


def test_an_interpreted_process_refuses_to_compile() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smi_kernels.aot"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
