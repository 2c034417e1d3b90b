"""Attention: kernels against references, references against autograd through PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, poisoned, within_budget
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.attention import kernels, reference
from smi_kernels.launch import count_launches

# One tile, one tile with a tail, blocks of queries over all keys, a loop over keys.
TOKENS = [1, 2, 17, 47, 66, 130, 270]
FACTOR = {torch.bfloat16: 6.0 if DEVICE == "cpu" else 1.5}  # the interpreter cuts bits off where a GPU rounds


def draw(B: int, N: int, H: int, d: int, dtype: torch.dtype, norm: bool, std: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(N)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    return {
        "qkv": (normal(B, N, 3, H, d) * std).to(dtype),
        "d_out": normal(B, N, H * d).to(dtype),
        "qk_norm": normal(4, d).to(wide) if norm else None,
        "colsum": normal(3 * H * d).to(wide),
        "bias": normal(3 * H * d).to(wide),
    }


def exact(t: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.double() for name, value in t.items()}


def run(module: Any, t: dict[str, Any]) -> dict[str, Tensor]:
    out = module.attention(t["qkv"], t["qk_norm"], 1e-6)
    dqkv, dstats = module.attention_dx(t["qkv"], t["d_out"], t["qk_norm"], 1e-6, t["colsum"], t["bias"])
    return {"out": out, "dqkv": dqkv, "dstats": dstats}


def run_class(module: Any, t: dict[str, Any], R: int) -> dict[str, Tensor]:
    B, N, _, H, d = t["qkv"].shape
    query, kv = t["qkv"][:, :R, 0].contiguous(), t["qkv"][:, :, 1:].contiguous()
    d_out = t["d_out"][:, :R].contiguous()
    (q_colsum, kv_colsum), (q_bias, kv_bias) = (t[name].split((H * d, 2 * H * d)) for name in ("colsum", "bias"))
    out = module.class_attention(query, kv, t["qk_norm"], 1e-6)
    d_query, d_kv, dstats = module.class_attention_dx(
        query, kv, d_out, t["qk_norm"], 1e-6, q_colsum, q_bias, kv_colsum, kv_bias
    )
    return {"out": out, "d_query": d_query, "d_kv": d_kv, "dstats": dstats}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("N", TOKENS)
def test_kernels_compute_what_the_references_do(N: int, norm: bool) -> None:
    t = draw(1 if N > 100 else 2, N, 1 if N > 100 else 2, 24 if N == 47 else 16, torch.float64, norm)
    with poisoned():
        found = run(kernels, t)
    for name, value in run(reference, t).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("N", [2, 47, 270])
def test_class_kernels_compute_what_the_references_do(N: int, norm: bool, R: int) -> None:
    t = draw(2, N, 2, 24, torch.float64, norm)
    with poisoned():
        found = run_class(kernels, t, R)
    for name, value in run_class(reference, t, R).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [47, 130])
def test_rounding_is_that_of_the_dtype(N: int, dtype: torch.dtype) -> None:
    t = draw(1, N, 1, 64, dtype, False)
    with poisoned():
        found, few = run(kernels, t), run_class(kernels, t, 1)
    for ours, theirs, truth in (
        (found, run(reference, t), run(reference, exact(t))),
        (few, run_class(reference, t, 1), run_class(reference, exact(t), 1)),
    ):
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            floor = 1e-6 if dtype == torch.float32 else 2e-3
            assert within_budget(value, theirs[name], truth[name], FACTOR.get(dtype, 1.5), floor), name


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk norm"])
def test_references_are_pytorchs_attention_and_its_gradient(norm: bool) -> None:
    t = draw(2, 9, 3, 8, torch.float64, norm)
    qkv = t["qkv"].requires_grad_(True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if norm:
        q = F.layer_norm(q, (8,), t["qk_norm"][0], t["qk_norm"][1], 1e-6)
        k = F.layer_norm(k, (8,), t["qk_norm"][2], t["qk_norm"][3], 1e-6)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
    (expected,) = torch.autograd.grad(out, qkv, t["d_out"])
    found = run(reference, {**t, "qkv": t["qkv"].detach()})
    torch.testing.assert_close(found["out"], out.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["dqkv"], expected, rtol=1e-10, atol=1e-10)
    u = qkv.detach()
    sums = torch.stack((expected * t["colsum"].view(3, 3, 8), expected * (u - t["bias"].view(3, 3, 8))), dim=-1)
    torch.testing.assert_close(found["dstats"].view(2, 9, 3, 2), sums.sum((2, 4)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("N", [17, 66, 130])
def test_extreme_and_equal_scores(N: int) -> None:
    """Scores of 1e4 leave one key all the attention; equal rows share it evenly; nothing is NaN."""
    t = draw(1, N, 1, 16, torch.float32, False, std=50.0)
    found, expected = run(kernels, t), run(reference, exact(t))
    assert expected["out"].isfinite().all()
    torch.testing.assert_close(found["out"].double(), expected["out"], rtol=1e-3, atol=1e-2)
    assert found["dqkv"].isfinite().all() and found["dstats"].isfinite().all()

    t["qkv"] = torch.ones_like(t["qkv"])
    even = run(kernels, t)
    torch.testing.assert_close(even["out"], torch.ones_like(even["out"]))
    assert even["dqkv"][:, :, :2].abs().max() < 1e-4  # constant values: no score matters


def test_one_launch_each_and_the_same_bits_twice() -> None:
    for N in (17, 130):
        t = draw(1, N, 1, 16, torch.float32, True)
        with count_launches() as launches:
            once = {**run(kernels, t), **{f"class {k}": v for k, v in run_class(kernels, t, 1).items()}}
        assert len(launches) == 4
        twice = {**run(kernels, t), **{f"class {k}": v for k, v in run_class(kernels, t, 1).items()}}
        assert all(torch.equal(once[name], twice[name]) for name in once)


def test_no_images_no_launch() -> None:
    t = draw(0, 17, 2, 16, torch.float32, False)
    with count_launches() as launches:
        found, few = run(kernels, t), run_class(kernels, t, 1)
    assert not launches and found["dqkv"].shape == (0, 17, 3, 2, 16) and few["d_kv"].shape == (0, 17, 2, 2, 16)
