"""CUDA operators without a GPU: on the host thread for thread, under sanitizers, and as machine code.

What they compute is tested beside Triton's kernels, in the modules of the operations.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cuda_operators
from kernels import DEVICE, ROOT, builder, emulated, error, poisoned
from test_pixel_kernels import Case, normal, step_once
from torch import Tensor

import smi
from smi.embedded import load_teacher
from smi_kernels import native_cuda, ops
from smi_kernels.pixel_update import reference
from smi_kernels.token_select import reference as select_reference


@pytest.fixture
def operators() -> Any:
    """Of both folders, on the device of the tests."""
    with cuda_operators():
        yield importlib.import_module("smi_kernels.pixel_update.cuda")


@pytest.fixture
def select_tokens(operators: Any) -> Any:
    return importlib.import_module("smi_kernels.token_select.cuda").select_tokens


# --- results that only these kernels could get wrong ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("patch", [(12, 8), (9, 6), (18, 12)], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_whole_vectors_and_single_pixels_agree(
    operators: Any, frozen: bool, patch: tuple[int, int], dtype: torch.dtype
) -> None:
    """Aligned and not: images of whole vectors, patches of them and not, roll and flip across borders."""
    case = Case((3, 2, 36, 24), patch, 3, group=2, frozen=frozen, direct=True)
    for dx in range(-3, 26):
        offsets = torch.tensor([[5, dx, dx % 2], [-40, 2 * dx, 1 - dx % 2], [dx, -dx, 1]], device=DEVICE)
        if dx > 1 and dtype == torch.float64:
            continue  # of two at once, all places have been met
        expected = step_once(reference, case, torch.float64, offsets=offsets, **rounded(case, dtype))
        with poisoned():
            wide = step_once(operators, case, dtype, offsets=offsets)
        allowed = 1e-13 if dtype == torch.float64 else 3e-6
        for now, then in zip(wide, expected, strict=True):
            assert error(now, then) < allowed
    apart = torch.empty(math.prod(case.shape) + 1, dtype=dtype, device=DEVICE)[1:].view(case.shape)
    narrow = step_once(operators, case, dtype, offsets=offsets, images=apart.copy_(normal(*case.shape, dtype=dtype)))
    wide = step_once(operators, case, dtype, offsets=offsets)
    assert all(error(now, then) < 1e-6 for now, then in zip(narrow, wide, strict=True))


def rounded(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `step_once` makes in `dtype`, in float64: the same numbers."""
    images, exp_avg, exp_avg_sq = (normal(*case.shape, seed=seed, dtype=dtype).double() for seed in range(3))
    direct = case.d_images(3, dtype)
    assert direct is not None
    G = -(-case.shape[0] // case.group)
    return {
        "images": images,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq.abs(),
        "d_patches": case.d_patches(3, dtype).double(),
        "d_images": direct.double(),
        "coefficients": normal(G, 9, seed=4, dtype=dtype).abs().double(),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_selects_among_16384(select_tokens: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (100 * torch.randn(2, 16384, generator=generator)).round().to(DEVICE, dtype)  # many are equal
    keep = torch.arange(16384, device=DEVICE).mul(3).expand(2, -1)
    for count in (1, 5000, 16383):
        assert torch.equal(select_tokens(scores, keep, count), select_reference.select_tokens(scores, keep, count))


def test_nothing_to_step_still_counts(operators: Any) -> None:
    step = torch.tensor([3], device=DEVICE)
    empty = torch.empty(0, 3, 8, 8, device=DEVICE)
    assert operators.finish_prior_sums(empty, torch.empty(0, 3, 8, 9, device=DEVICE), step).shape == (0, 3, 9)
    assert step.item() == 4


# --- what is refused ---


def given(**changed: Any) -> Any:
    case = Case((2, 1, 8, 6), (4, 3), 2, group=1)
    return lambda operators: step_once(operators, case, torch.float32, **changed)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"images": torch.zeros(2, 1, 8, 6, dtype=torch.bfloat16)}, "images has dtype torch.bfloat16"),
        ({"exp_avg": torch.zeros(2, 1, 8, 5)}, "exp_avg has shape"),
        ({"d_patches": torch.zeros(2, 2, 11)}, "d_patches has shape"),
        ({"d_patches": torch.zeros(2, 2, 12, dtype=torch.float64)}, "was given a tensor of torch.float64"),
        ({"keep_slots": torch.zeros(2, 4, dtype=torch.int64)}, "keep_slots has dtype torch.int64"),
        ({"keep_slots": torch.zeros(2, 5, dtype=torch.int32)}, "keep_slots has shape"),
        ({"offsets": torch.zeros(3, 3, dtype=torch.int64)}, "offsets has shape"),
        ({"offsets": torch.zeros(2, 3)}, "offsets has dtype"),
        ({"group": 0}, "group is 0"),
        ({"patch_width": 4}, "images are 8 x 6; expected a multiple of the patch, 4 x 4"),
        ({"low": torch.zeros(1, device="meta")}, "on meta"),
    ],
)
def test_what_does_not_fit_is_refused(operators: Any, changed: dict[str, Any], complaint: str) -> None:
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in changed.items()
    }
    with pytest.raises(ValueError, match=complaint):
        given(**moved)(operators)


def test_indices_are_looked_at_on_demand(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.tensor([[-1, 0, 1, -1], [-1, 2, 0, 1]], dtype=torch.int32, device=DEVICE)
    assert not native_cuda.checks_indices(slots.device)
    monkeypatch.setenv("SMI_CHECK", "1")
    with pytest.raises(ValueError, match="keep_slots has 2; expected at most 1"):
        given(keep_slots=slots)(operators)


def test_selection_refuses(select_tokens: Any) -> None:
    scores, keep = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"count is {count}; expected 1 to 5"):
            select_tokens(scores, keep, count)
    with pytest.raises(ValueError, match="scores has shape"):
        select_tokens(scores[:, 1:], keep, 1)
    with pytest.raises(ValueError, match="keep has dtype"):
        select_tokens(scores, keep.int(), 1)


def test_an_error_of_cuda_has_the_name_of_the_operator(operators: Any) -> None:
    scores, keep = torch.zeros(1, 1, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"select_tokens could not be launched: invalid configuration argument"):
        native_cuda.call("select_tokens", torch.float32, scores, keep, keep.clone(), 2**31, 1, 1)
    with pytest.raises(ValueError, match="no compiled operator 'sort'"):
        native_cuda.call("sort", torch.float32, scores)


def test_folders_without_cuda_operators_run_triton() -> None:
    for folder in set(ops.OPERATORS.values()):
        name = ops._implementation(folder, "cuda").__name__.rsplit(".", 1)[1]
        assert name == ("cuda" if folder in ("token_select", "pixel_update") else "kernels")


def test_operators_are_reached_through_torch(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.backends, "choose", lambda device: "cuda")
    case = Case((2, 1, 18, 12), (6, 4), 4, group=1, frozen=True)
    found = step_once(torch.ops.smi, case, torch.float32)
    assert all(
        torch.equal(now, then) for now, then in zip(found, step_once(operators, case, torch.float32), strict=True)
    )
    scores, keep = normal(2, 9, dtype=torch.float32), torch.arange(9, device=DEVICE).expand(2, -1)
    with torch.no_grad():
        chosen = torch.ops.smi.select_tokens(scores, keep, 4)
    assert torch.equal(chosen, select_reference.select_tokens(scores, keep, 4))


def test_a_model_on_a_cpu_gets_every_reason() -> None:
    with pytest.raises(smi.SmiError, match=r"backend 'cuda' cannot run .*its operators are for GPUs, not for cpu"):
        smi.SparseModel(load_teacher(), device="cpu", backend="cuda")


# --- sanitizers ---


def sanitized(kind: str, *args: str) -> subprocess.CompletedProcess[str]:
    program = emulated(kind)
    if isinstance(program, str):
        pytest.skip(program)
    return subprocess.run([str(program), *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_no_kernel_races_or_leaves_its_arrays(kind: str) -> None:
    done = sanitized(kind)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_missing_barrier_would_be_seen() -> None:
    done = sanitized("thread", "without barriers")
    for kernel in ("select_tokens_kernel", "pixel_step_kernel", "block_sums"):
        assert f"{kernel}<" in done.stderr
    assert done.returncode == 66 and "data race" in done.stderr


# --- machine code ---


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``csrc/resources.py``."""
    monkeypatch.setitem(sys.modules, "build", builder())
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return importlib.import_module("resources")


def test_no_spills_and_whole_vectors_on_every_architecture(resources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("SMI_NATIVE", raising=False)
    build = builder()
    nvcc = build._nvcc()
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME or on PATH")
    cuobjdump = resources.find_cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    work = ROOT / "build" / "resources"
    rows = resources.built(work, nvcc, cuobjdump)
    assert {row.architecture for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row.kernel.split()[0] for row in rows} == {"select_tokens", "pixel_step", "finish_prior_sums"}
    assert [(row.kernel, row.architecture, fault) for row in rows for fault in row.faults()] == []
    steps = [row for row in rows if row.kernel == "pixel_step float, 4 at once"]
    assert len(steps) == 3
    for row in steps:  # three blocks of 256 threads to a multiprocessor; images, moments and gradients in 16 bytes
        assert row.registers <= 85 and row.wide["LDG"] >= 7 and row.wide["STG"] >= 3
    assert all(row.shared <= 48 * 1024 for row in rows)
    page = (ROOT / "docs" / "resources.md").read_text()
    assert all(f"| {row.kernel} | {row.architecture[3:]} |" in page for row in rows)
    library = ctypes.CDLL(str(Path(work, "lib", "cuda.so")))  # needs no GPU, nor its driver
    library.smi_error.restype = ctypes.c_char_p
    assert library.smi_error(9) == b"invalid configuration argument"
    assert native_cuda.native.text(library.smi_sources) == build.sources_hash()


def test_the_table_knows_what_is_bad(resources: Any) -> None:
    good = {"architecture": "sm_90", "registers": 80, "stack": 0, "shared": 0, "narrow": {}}
    for name, spills, wide, faults in [
        ("pixel_step float, 4 at once", 0, {"LDG": 7, "STG": 3}, 0),
        ("pixel_step float, 4 at once", 0, {"LDG": 7}, 1),
        ("pixel_step float, 1 at once", 0, {}, 0),
        ("select_tokens float", 8, {}, 1),
    ]:
        assert len(resources.Resources(kernel=name, spills=spills, wide=wide, **good).faults()) == faults
