"""Attention: references against autograd through plain PyTorch, and kernels against references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, Kernels, launched, poisoned, within_budget
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.attention import kernels as triton_kernels
from smi_kernels.attention import reference
from smi_kernels.launch import count_launches

kernels = Kernels("attention")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# The interpreter cuts bits off where a GPU rounds to bfloat16: twice the error, and all of it in one direction.
FACTOR = {torch.bfloat16: 6.0 if DEVICE == "cpu" else 2.0}
EPS = 1e-6
# Images, tokens, heads, columns of a head, norm: tiles of all tokens and loops over blocks, both whole and broken.
SHAPES = [
    (2, 1, 1, 32, False),
    (1, 2, 3, 48, True),
    (2, 17, 1, 72, True),
    (2, 47, 2, 64, False),
    (1, 47, 1, 80, True),
    (1, 67, 1, 88, False),
    (1, 67, 1, 40, True),
]
# What 16 bits do in larger tiles.
LONG_SHAPES = [(1, 138, 1, 32, False), (1, 138, 1, 32, True), (1, 138, 1, 128, False), (1, 290, 1, 16, False)]
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
CASES += [(dtype, shape) for dtype in DTYPES[2:] for shape in LONG_SHAPES]
# One of each size of tile, and the loop over blocks.
HALVES = [(47, torch.float16), (70, torch.float16), (150, torch.float16)]
CLASS_SHAPES = [(2, 1, 1, 1, 32), (1, 2, 2, 3, 48), (2, 47, 1, 2, 64), (1, 47, 2, 1, 80), (1, 138, 2, 1, 128)]

# NaN and infinity, in rows beyond the last token too, are what some tests are about; NumPy, which interprets, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(B: int, N: int, H: int, d: int, dtype: torch.dtype, norm: bool = False, R: int = 1) -> dict[str, Any]:
    """Inputs of all four operations; queries are scaled, some scores are large, rows have means."""
    generator = torch.Generator().manual_seed(1000 * N + d)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(DEVICE)

    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor([d**-0.5, 1.0, 1.0], dtype=torch.float64, device=DEVICE)[:, None, None]
    return {
        "qkv": ((normal(B, N, 3, H, d, std=1.5) + 0.3) * scale).to(dtype),
        "d_out": normal(B, N, H * d).to(dtype),
        "query": normal(B, R, H, d, std=2 * d**-0.5).to(dtype),
        "kv": (normal(B, N, 2, H, d, std=1.5) - 0.2).to(dtype),
        "d_class": normal(B, R, H * d).to(dtype),
        "qk_norm": (normal(4, d, std=0.3) + 0.4).to(wide) if norm else None,
        "colsum": normal(3 * H * d).to(wide),
        "bias": normal(3 * H * d).to(wide),
    }


def exact(t: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None else value.double() for name, value in t.items()}


def attention(module: Any, t: dict[str, Any], precision: str = "ieee") -> dict[str, Tensor]:
    out = module.attention(t["qkv"], t["qk_norm"], EPS, precision)
    dqkv, dstats = module.attention_dx(
        t["qkv"], t["d_out"], t["qk_norm"], EPS, t["colsum"], t["bias"], precision=precision
    )
    return {"out": out, "dqkv": dqkv, "dstats": dstats}


def class_attention(module: Any, t: dict[str, Any]) -> dict[str, Tensor]:
    part = t["query"].shape[2] * t["query"].shape[3]
    sums = [t[name][columns] for columns in (slice(part), slice(part, None)) for name in ("colsum", "bias")]
    out = module.class_attention(t["query"], t["kv"], t["qk_norm"], EPS)
    d_query, d_kv, dstats = module.class_attention_dx(t["query"], t["kv"], t["d_class"], t["qk_norm"], EPS, *sums)
    return {"out": out, "d_query": d_query, "d_kv": d_kv, "dstats": dstats}


def assert_agree(run: Any, t: dict[str, Any], dtype: torch.dtype) -> None:
    with poisoned():
        found = run(kernels, t)
    expected, truth = run(reference, t), run(reference, exact(t))
    plain = 2.0 if Kernels.module == "kernels" else 3.0  # compiled sums run in order, those of BLAS in blocks
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        if dtype == torch.float64:
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
        else:
            assert within_budget(value, expected[name], truth[name], FACTOR.get(dtype, plain)), name


def skip_where_truncation_piles_up(dtype: torch.dtype, norm: bool) -> None:
    if norm and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's errors in bfloat16 have one sign, and a norm's gradient is made of differences")


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_attention_computes_what_its_reference_does(dtype: torch.dtype, shape: tuple[int, int, int, int, bool]) -> None:
    skip_where_truncation_piles_up(dtype, shape[-1])
    B, N, H, d, norm = shape
    assert_agree(attention, draw(B, N, H, d, dtype, norm), dtype)


@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CLASS_SHAPES, ids=str)
def test_class_attention_computes_what_its_reference_does(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, norm: bool
) -> None:
    skip_where_truncation_piles_up(dtype, norm)
    B, N, R, H, d = shape
    assert_agree(class_attention, draw(B, N, H, d, dtype, norm, R), dtype)


@pytest.mark.triton
@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize("N", [1, 17, 33])
def test_either_gradient_kernel_serves_any_number_of_tokens(
    N: int, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = draw(1, N, 2, 24, torch.float64, norm)
    expected = attention(reference, t)
    tiles = {"attention_dx_kernel": (64, 64, True, 4, 1), "attention_long_dx_kernel": (16, 32, False, 4, 1)}
    for name, tile in tiles.items():
        monkeypatch.setattr(triton_kernels, "_dx_tile", lambda *_, tile=tile: triton_kernels._Tile(*tile))
        with count_launches() as launches, poisoned():
            found = attention(kernels, t)
        assert [launch.name for launch in launches] == launched(["attention_kernel", name])
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=f"{name}: {key}")


@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
def test_references_are_attention_and_its_gradient(norm: bool) -> None:
    t = draw(2, 9, 3, 16, torch.float64, norm, R=2)
    qkv, query, kv = (t[name].requires_grad_() for name in ("qkv", "query", "kv"))

    def head_norm(x: Tensor, part: int) -> Tensor:
        return F.layer_norm(x, (16,), *t["qk_norm"][2 * part : 2 * part + 2], EPS) if norm else x

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (head_norm(q, 0), head_norm(k, 1), v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)

    out = attend(*qkv.unbind(2))
    class_out = attend(query, *kv.unbind(2))
    (dqkv,) = torch.autograd.grad(out, qkv, t["d_out"])
    d_query, d_kv = torch.autograd.grad(class_out, (query, kv), t["d_class"])
    t = {name: value if value is None else value.detach() for name, value in t.items()}

    def sums(du: Tensor, u: Tensor, columns: slice) -> Tensor:
        colsum, bias = (t[name][columns].view(du.shape[2:]) for name in ("colsum", "bias"))
        return torch.stack(((du * colsum).sum((2, 4)), (du * (u.detach() - bias)).sum((2, 4))), -1)

    found = attention(reference, t)
    torch.testing.assert_close(found["out"], out.detach())
    torch.testing.assert_close(found["dqkv"], dqkv)
    torch.testing.assert_close(found["dstats"], sums(dqkv, qkv, slice(None)).flatten(0, 1))
    found = class_attention(reference, t)
    torch.testing.assert_close(found["out"], class_out.detach())
    torch.testing.assert_close(found["d_query"], d_query)
    torch.testing.assert_close(found["d_kv"], d_kv)
    expected = sums(d_kv, kv, slice(48, None))
    expected[:, :2] += sums(d_query[:, :, None], query[:, :, None], slice(48))
    torch.testing.assert_close(found["dstats"], expected.flatten(0, 1))


@pytest.mark.parametrize(("N", "dtype"), [(47, torch.float64), (40, torch.float32), *HALVES], ids=str)
def test_huge_scores_leave_one_key_and_no_gradient_of_scores(N: int, dtype: torch.dtype) -> None:
    """Scores of one key are 1e4 above or, for every other query, all are 1e4 below zero but for that key's."""
    t = draw(1, N, 1, 32, dtype, R=1)
    sign = 1 - 2 * (torch.arange(N, device=DEVICE) % 2)
    chosen = N - 1
    for q, k in ((t["qkv"][:, :, 0], t["qkv"][:, :, 1]), (t["query"], t["kv"][:, :, 0])):
        q[:], k[:] = 0, 0
        q[..., 0], q[..., 1] = 100 * sign[: q.shape[1], None], 100
        k[..., 1] = -100
        k[:, chosen, :, 1] = 100
    found, found_class = attention(kernels, t), class_attention(kernels, t)
    v, d_out = t["qkv"][0, :, 2, 0], t["d_out"][0]
    assert torch.equal(found["out"][0], v[chosen].expand(N, -1))
    dq, dk, dv = found["dqkv"][0, :, :, 0].unbind(1)
    assert not dq.any() and not dk.any() and not dv[:chosen].any()
    torch.testing.assert_close(dv[chosen].double(), d_out.double().sum(0), rtol=2e-3, atol=2e-3)
    assert not found["dstats"][:chosen].any()
    assert torch.equal(found_class["out"][0, 0], t["kv"][0, chosen, 1, 0])
    assert not found_class["d_query"].any() and not found_class["d_kv"][:, :, 0].any()
    assert torch.equal(found_class["d_kv"][0, chosen, 1, 0], t["d_class"][0, 0])
    assert not found_class["d_kv"][:, :chosen, 1].any() and not found_class["dstats"][:chosen].any()


@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize(("N", "dtype"), [(40, torch.float32), *HALVES], ids=str)
def test_equal_rows_share_evenly(N: int, dtype: torch.dtype, norm: bool) -> None:
    """Also behind a norm, of rows without variance, and with scores far below those of padding."""
    t = draw(1, N, 1, 32, dtype, norm)
    t["qkv"][:, :, 0], t["qkv"][:, :, 1], t["query"][:], t["kv"][:, :, 0] = 30.0, -30.0, 30.0, -30.0
    truth = exact(t)
    found, found_class = attention(kernels, t), class_attention(kernels, t)
    mean = truth["qkv"][:, :, 2].mean(1).flatten(1)
    torch.testing.assert_close(found["out"].double(), mean[:, None].expand(-1, N, -1), rtol=2e-3, atol=2e-3)
    expected = truth["d_out"].mean(1)[:, None].expand(-1, N, -1)
    torch.testing.assert_close(found["dqkv"][:, :, 2].flatten(2).double(), expected, rtol=2e-3, atol=2e-3)
    mean = truth["kv"][:, :, 1].mean(1).flatten(1)
    torch.testing.assert_close(found_class["out"][:, 0].double(), mean, rtol=2e-3, atol=2e-3)
    assert all(value.isfinite().all() for value in (*found.values(), *found_class.values()))


@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_token_attends_to_itself(dtype: torch.dtype, norm: bool) -> None:
    t = draw(3, 1, 2, 40, dtype, norm)
    found, found_class = attention(kernels, t), class_attention(kernels, t)
    assert torch.equal(found["out"], t["qkv"][:, :, 2].flatten(2))
    assert not found["dqkv"][:, :, :2].any()
    assert torch.equal(found["dqkv"][:, :, 2].flatten(2), t["d_out"])
    assert torch.equal(found_class["out"], t["kv"][:, :, 1].flatten(2))
    assert not found_class["d_query"].any() and not found_class["d_kv"][:, :, 0].any()
    assert torch.equal(found_class["d_kv"][:, :, 1].flatten(2), t["d_class"])


@pytest.mark.parametrize("N", [47, 70, 150])
def test_no_gradient_in_none_out(N: int) -> None:
    t = draw(1, N, 1, 32, torch.float16, norm=True, R=2)
    t["d_out"].zero_()
    t["d_class"].zero_()
    for found in (attention(kernels, t), class_attention(kernels, t)):
        assert all(not value.any() for name, value in found.items() if name != "out")


@pytest.mark.parametrize(("N", "dtype"), [(40, torch.float32), *HALVES], ids=str)
def test_images_do_not_meet(N: int, dtype: torch.dtype) -> None:
    """Each image alone gives the same bits as between others that are NaN, which masks then keep out."""
    t = draw(3, N, 1, 32, dtype, norm=True, R=2)
    names = ("qkv", "d_out", "query", "kv", "d_class")
    alone = {**t, **{name: t[name][1:2].clone() for name in names}}
    for name in names:
        t[name][0], t[name][2] = torch.nan, torch.nan
    for run in (attention, class_attention):
        expected = run(kernels, alone)
        for name, value in run(kernels, t).items():
            assert torch.equal(value.view(3, -1)[1], expected[name].flatten()), name
            assert value.view(3, -1)[::2].isnan().any(1).all(), name


def test_views_are_read_right() -> None:
    t = draw(2, 19, 2, 32, torch.float16, R=2)
    views = dict(t)
    for name in ("qkv", "d_out", "query", "kv", "d_class"):
        every_third = torch.full((*t[name].shape[:-1], 3 * t[name].shape[-1]), torch.nan).to(t[name])
        views[name] = every_third[..., ::3].copy_(t[name])
        assert not views[name].is_contiguous()
    for run in (attention, class_attention):
        expected = run(kernels, t)
        assert all(torch.equal(value, expected[name]) for name, value in run(kernels, views).items())


@pytest.mark.parametrize("N", [47, 150])
def test_one_launch_each_and_the_same_bits_twice(N: int) -> None:
    t = draw(1, N, 2, 32, torch.float16, norm=True, R=2)
    with count_launches() as launches:
        once = [attention(kernels, t), class_attention(kernels, t)]
    assert [launch.name for launch in launches] == launched(
        [
            "attention_kernel",
            "attention_dx_kernel" if N == 47 else "attention_long_dx_kernel",
            "class_attention_kernel",
            "class_attention_dx_kernel",
        ]
    )
    twice = [attention(kernels, t), class_attention(kernels, t)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(once, twice, strict=True) for name in a)


@pytest.mark.triton
def test_tiles_are_the_same_for_any_batch_and_precision_may_ask_so() -> None:
    t = draw(1, 33, 2, 32, torch.float32)
    expected, found = attention(kernels, t), attention(kernels, t, "ieee+invariant")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_no_images_no_launch() -> None:
    t = draw(0, 47, 2, 32, torch.float32, R=2)
    with count_launches() as launches:
        found, found_class = attention(kernels, t), class_attention(kernels, t)
    assert not launches
    assert found["out"].shape == (0, 47, 64) and found["dqkv"].shape == (0, 47, 3, 2, 32)
    assert found["dstats"].shape == found_class["dstats"].shape == (0, 2, 2)
    assert found_class["out"].shape == (0, 2, 64) and found_class["d_kv"].shape == (0, 47, 2, 2, 32)
