"""Compiled operators: what they refuse, that threads and batches leave no trace, how they are built and found.

That they compute what the references do is shown by the tests of kernels, which run for them too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small import tiny
from torch import Tensor

import smi_kernels.ops  # noqa: F401
from smi_kernels import PixelDescent, SparseViT, backends, native, use_backend
from smi_kernels.patch_embed.reference import slot_table

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "csrc" / "build.py"
needs_compiler = pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler")
pytestmark = pytest.mark.skipif(bool(native.reasons_against()), reason="; ".join(native.reasons_against()))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- bad input ---

KEEP = torch.tensor([[0, 2, 3], [1, 2, 3]])


def good(name: str) -> dict[str, Any]:
    """Arguments that `name` takes: two images of 8 x 8 in patches of 4."""
    images, d_patches = random(2, 3, 8, 8), random(2, 3, 48)
    state = {"exp_avg": torch.zeros(2, 3, 8, 8), "exp_avg_sq": torch.zeros(2, 3, 8, 8)}
    adam = {"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-8}
    bounds = {"low": -torch.ones(3), "high": torch.ones(3)}
    patch = {"patch_height": 4, "patch_width": 4}
    return {
        "embed_tokens": {
            "images": images, "keep": KEEP, "offsets": torch.zeros(2, 3, dtype=torch.int64), "weight": random(5, 48),
            "position": random(4, 5), "prefix": random(1, 5), **patch, "precision": "ieee",
        },
        "patches_to_pixels": {
            "d_patches": d_patches, "keep": KEEP, "offsets": None, "height": 8, "width": 8, **patch,
        },
        "pixel_step": {
            "images": images, **state, "d_patches": d_patches, "d_images": None, "keep_slots": slot_table(KEEP, 4),
            "offsets": None, "coefficients": random(2, 9), "group": 1, "bias_correction": torch.ones(2), **adam,
            **bounds, "frozen": True, **patch,
        },
        "adam_clamp_": {"images": images, "grad": images.clone(), **state, "step": 1, **adam, **bounds},
        "select_tokens": {"scores": random(2, 3), "keep": KEEP, "count": 2},
        "rank_tokens": {
            "query": random(2, 1, 8), "key": random(2, 4, 1, 8), "scale": 1.0, "qk_norm": None, "eps": 0.0,
            "keep": KEEP, "count": 2, "prefix": 1,
        },
        "norm_linear": {
            "x": random(4, 6), "stats": random(4, 1, 2).abs(), "weight": random(5, 6), "colsum": random(5),
            "bias": random(5), "eps": 1e-6, "out_dtype": torch.float32, "precision": "ieee",
        },
        "norm_linear_dx": {
            "du": random(4, 5), "weight": random(5, 6), "dstats": random(4, 2, 2), "x": random(4, 6),
            "moments": random(4, 2), "residual": random(2, 6), "extra": None, "tokens": 2, "first": 1,
            "precision": "ieee",
        },
        "attention_dx": {
            "qkv": random(2, 3, 3, 1, 8), "d_out": random(2, 3, 8), "qk_norm": None, "eps": 0.0, "colsum": random(24),
            "bias": random(24), "precision": "ieee",
        },
        "cross_entropy_head": {
            "logits": random(1, 2, 5), "targets": torch.tensor([0, 4]), "colsum": random(1, 5), "bias": random(1, 5),
            "grad_scale": None, "low_dtype": torch.float32, "history": None, "step": None,
        },
        "prior_coefficients": {
            "sums": random(2, 3, 9).abs(), "tv1": 1.0, "tv2": 1.0, "l2": 1.0, "group": 1, "height": 8, "width": 8,
        },
    }[name]  # fmt: skip


def run(name: str, arguments: dict[str, Any]) -> Any:
    with use_backend("cpu"):
        return getattr(torch.ops.smi, name)(**arguments)


BAD = [
    ("embed_tokens", {"keep": KEEP + 1}, r"keep has 4; expected 0 to 3"),
    ("embed_tokens", {"keep": KEEP - 1}, r"keep has -1; expected 0 to 3"),
    ("embed_tokens", {"keep": KEEP.int()}, r"keep has dtype torch.int32; expected torch.int64"),
    ("embed_tokens", {"keep": KEEP[:1]}, r"keep has shape \(1, 3\); expected \(2, 3\)"),
    ("embed_tokens", {"offsets": torch.zeros(3, 3).long()}, r"offsets has shape \(3, 3\); expected \(2, 3\) or"),
    ("embed_tokens", {"offsets": torch.zeros(2, 3)}, r"offsets has dtype torch.float32; expected torch.int64"),
    ("embed_tokens", {"position": random(3, 5)}, r"position has shape \(3, 5\); expected \(4, 5\)"),
    ("embed_tokens", {"patch_width": 3}, r"images are 8 x 8; expected multiples of the patch size 4 x 3"),
    ("patches_to_pixels", {"keep": KEEP[:, :2]}, r"d_patches has shape \(2, 3, 48\); expected \(2, 2, 48\)"),
    ("patches_to_pixels", {"width": 10}, r"images are 8 x 10; expected multiples"),
    ("pixel_step", {"keep_slots": slot_table(KEEP, 4) + 1}, r"keep_slots has 3; expected at most 2"),
    ("pixel_step", {"keep_slots": slot_table(KEEP, 4).long()}, r"keep_slots has dtype torch.int64"),
    ("pixel_step", {"keep_slots": None}, r"d_patches has shape \(2, 3, 48\); expected \(2, 4, 48\)"),
    ("pixel_step", {"coefficients": random(3, 9)}, r"coefficients has shape \(3, 9\); expected \(2, 9\)"),
    ("pixel_step", {"group": 0}, r"group is 0; expected at least 1"),
    ("pixel_step", {"exp_avg": torch.zeros(2, 3, 8, 4)}, r"exp_avg has shape \(2, 3, 8, 4\)"),
    ("pixel_step", {"d_images": random(2, 3, 8, 7)}, r"d_images has shape \(2, 3, 8, 7\)"),
    ("adam_clamp_", {"live": torch.ones(2, 3, 8, 8).bool()}, r"live has shape \(2, 3, 8, 8\); expected \(2, 1, 8, 8\)"),
    ("adam_clamp_", {"live": torch.ones(2, 1, 8, 8)}, r"live has dtype torch.float32; expected torch.bool"),
    ("adam_clamp_", {"low": torch.zeros(2)}, r"low has shape \(2,\); expected \(3,\)"),
    ("select_tokens", {"count": 4}, r"count is 4; expected 1 to 3"),
    ("select_tokens", {"scores": random(2, 4)}, r"scores has shape \(2, 4\); expected \(2, 3\)"),
    ("rank_tokens", {"prefix": 2}, r"key has shape \(2, 4, 1, 8\); expected \(2, 5, 1, 8\)"),
    ("norm_linear", {"weight": random(5, 7)}, r"weight has shape \(5, 7\); expected \(5, 6\)"),
    ("norm_linear", {"stats": random(4, 2, 2)}, r"stats has shape \(4, 2, 2\); expected \(4, 1, 2\)"),
    ("norm_linear_dx", {"tokens": 3}, r"tokens is 3 and first 1 for 4 rows"),
    ("norm_linear_dx", {"residual": random(4, 6)}, r"residual has shape \(4, 6\); expected \(2, 6\)"),
    ("attention_dx", {"colsum": random(8)}, r"colsum has shape \(8,\); expected \(24,\)"),
    ("cross_entropy_head", {"targets": torch.tensor([0, 5])}, r"targets has 5; expected 0 to 4"),
    ("cross_entropy_head", {"targets": random(2, 4).softmax(1)}, r"targets has shape \(2, 4\); expected \(2, 5\)"),
    ("prior_coefficients", {"group": 0}, r"group is 0; expected at least 1"),
]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in BAD))
def test_the_good_arguments_are_taken(name: str) -> None:
    run(name, good(name))


@pytest.mark.parametrize(
    ("name", "change", "complaint"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_a_clear_error(name: str, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        run(name, {**good(name), **change})


def test_the_caller_of_the_library_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"prior_sums was given a tensor of strides \(1, 2\); expected a contiguous"):
        native.call("prior_sums", torch.float32, random(3, 2).T, random(2, 9), 1, 2, 3)
    with pytest.raises(ValueError, match=r"prior_sums was given a tensor of torch.float64; expected torch.float32"):
        native.call("prior_sums", torch.float32, random(2, 3).double(), random(2, 9), 1, 2, 3)
    with pytest.raises(ValueError, match=r"prior_sums was given a tensor on meta; expected one on the CPU"):
        native.call("prior_sums", torch.float32, torch.empty(2, 3, device="meta"), random(2, 9), 1, 2, 3)
    with pytest.raises(ValueError, match="there is no compiled operator 'prior_sum'"):
        native.call("prior_sum", torch.float32)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
@pytest.mark.parametrize("images", [1, 2], ids=["this thread", "others"])
def test_no_memory_is_an_error_and_not_the_end(images: int) -> None:
    one = torch.zeros(images, 1)
    with pytest.raises(MemoryError, match="select_tokens found no memory"):
        native.call("select_tokens", torch.float32, one, one.long(), one.long(), images, 2**45, 1)
    assert run("select_tokens", good("select_tokens")).shape == (2, 2)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
def test_no_memory_of_one_caller_is_no_error_of_another() -> None:
    one = torch.zeros(1, 1)
    args = (one, one.long(), one.long(), 1, 2**45, 1)
    function = native._operator("select_tokens", torch.float32, args)
    function(*[native._value("select_tokens", torch.float32, arg) for arg in args])  # of a thread that looks later
    assert run("select_tokens", good("select_tokens")).shape == (2, 2)


# --- the same bits ---


def descent(images: Tensor, targets: Tensor, table: Tensor, keep: Tensor, iterations: int) -> PixelDescent:
    vit = SparseViT.from_timm(tiny())
    bounds = {"low": torch.full((3,), -2.0), "high": torch.full((3,), 2.0)}
    with use_backend("cpu"):
        found = PixelDescent(vit, images, targets, table, **bounds, tv1=0.1, tv2=0.1, l2=0.1)
        found.advance(1)
        found.prune(keep)
        found.advance(iterations - 1)
    return found


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, targets = random(5, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0])
    table = torch.randint(-5, 6, (4, 5, 3), generator=torch.Generator().manual_seed(1))
    table[..., 2] = table[..., 2] > 0
    cells = SparseViT.from_timm(tiny()).weights.position.shape[0]
    keep = torch.stack([torch.randperm(cells, generator=torch.Generator().manual_seed(i))[:5] for i in range(5)])
    return images, targets, table, keep.sort(dim=1).values


def test_any_number_of_threads_gives_the_same_bits(batch: tuple[Tensor, ...]) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(descent(*batch, 4).images)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_image_has_the_same_bits_in_any_batch(batch: tuple[Tensor, ...]) -> None:
    images, targets, table, keep = batch
    together = descent(*batch, 4)
    for one in (slice(0, 1), slice(3, 5)):
        alone = descent(images[one], targets[one], table[:, one], keep[one], 4)
        assert torch.equal(alone.images, together.images[one])
        assert torch.equal(alone.exp_avg_sq, together.exp_avg_sq[one])


@pytest.mark.parametrize(
    ("options", "K", "merge_to"),
    [
        ({"qk_norm": True}, 9, None),
        ({"class_token": False, "global_pool": "avg"}, 9, None),
        ({"class_token": False, "global_pool": "avg"}, 16, 0.6),
    ],
    ids=["norms of queries and keys", "received attention", "sizes of tokens"],
)
def test_an_image_has_them_where_pytorch_computes_too(options: dict[str, Any], K: int, merge_to: float | None) -> None:
    vit = SparseViT.from_timm(tiny(**options), merge_to=merge_to)
    images, keep = random(5, 3, 16, 16), torch.arange(K).repeat(5, 1)

    def run(part: slice) -> list[Tensor]:
        given = images[part].clone().requires_grad_()
        with use_backend("cpu"):
            found = vit(given, keep[part], class_attention=merge_to is None)
            logits, *scores = found if isinstance(found, tuple) else (found,)
            return [logits, *scores, *torch.autograd.grad(logits.square().sum(), given)]

    whole = run(slice(None))
    for i in range(5):
        for together, alone in zip(whole, run(slice(i, i + 1)), strict=True):
            assert torch.equal(together[i : i + 1], alone)


# --- finding and building ---


def subprocess_output(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets_pass_the_same_tests(capability: str) -> None:
    if not (native.folder() / f"cpu_{capability}.so").is_file():
        pytest.skip(f"there is no {capability} on this machine's architecture")
    asked = {"ATEN_CPU_CAPABILITY": capability}
    assert subprocess_output("from smi_kernels import native; print(native.instruction_set())", **asked) == capability
    suites = [f"tests/test_{name}_kernels.py" for name in ("linear", "attention", "pixel", "patch_embed", "loss_head")]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider", *suites],
        cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]


def test_without_a_library_the_reference_runs_and_says_why(tmp_path: Path) -> None:
    code = """
import torch
from smi_kernels import backends, select_tokens
print(backends.choose(torch.device("cpu")))
print(select_tokens(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0, 1, 2]]), 2).tolist())
print(backends.reasons_against("cpu")[0])
"""
    lines = subprocess_output(code, SMI_NATIVE_LIBRARIES=str(tmp_path), TRITON_INTERPRET="0").splitlines()
    assert lines[:2] == ["reference", "[[1, 2]]"]
    assert lines[2].endswith("was not built; with a C++ compiler on PATH, install the package again")


def test_a_library_that_is_none_or_stale_is_not_used(tmp_path: Path) -> None:
    code = "from smi_kernels import native; print(native.reasons_against()[0])"
    name = f"cpu_{native.instruction_set()}.so"
    (tmp_path / name).write_bytes(b"not a library")
    assert f"{name} cannot be loaded" in subprocess_output(code, SMI_NATIVE_LIBRARIES=str(tmp_path))

    library = (native.folder() / name).read_bytes()
    builder = native._builder()
    assert builder is not None and library.count(builder.sources_hash().encode()) == 1
    (tmp_path / name).write_bytes(library.replace(builder.sources_hash().encode(), b"0" * 16))
    assert "built from other sources" in subprocess_output(code, SMI_NATIVE_LIBRARIES=str(tmp_path))


def test_what_would_be_built_is_said(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(BUILD.parent)!r}); import build; print(*build.plan().lines, sep='|')"
    nowhere = {"PATH": str(tmp_path), "CXX": "", "CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}
    assert "no C++ compiler" in subprocess_output(code, **nowhere)
    assert subprocess_output(code, SMI_NATIVE="0") == "native operators: none, SMI_NATIVE is 0"
    with pytest.raises(AssertionError, match="SMI_NATIVE is 'maybe'; expected 0"):
        subprocess_output(code, SMI_NATIVE="maybe")
    assert "native operators for CPUs: " in subprocess_output(code, SMI_NATIVE="cpu")


@needs_compiler
def test_a_wheel_serves_every_python_and_brings_the_libraries(tmp_path: Path) -> None:
    """From a copy of the sources, so that nothing of an earlier build helps."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "benchmarks/", "smi/assets/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--wheel-dir", str(tmp_path), "--quiet"]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SMI_NATIVE": "cpu"})
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and "any" not in wheel.name
    inside = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/_native/" in name}
    assert inside == {path.name for path in native.folder().glob("cpu_*.so")}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from smi_kernels import backends, native; print(native.folder()); print(backends.reasons_against('cpu'))"
    where, reasons = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    ).stdout.splitlines()  # fmt: skip
    assert where.startswith(str(tmp_path / "site")) and reasons == "[]"


def test_operators_are_chosen_for_processors_by_default() -> None:
    assert backends.choose(torch.device("cpu")) == "cpu"
    with use_backend("cpu"), pytest.raises(ValueError, match="its operators are for CPUs, not for meta"):
        backends.choose(torch.device("meta"))
