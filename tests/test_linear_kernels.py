"""The linear family: kernels against references, and references against autograd through plain PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import DEVICE, Kernels, launched, poisoned, within_budget
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import tuning
from smi_kernels.launch import count_launches
from smi_kernels.linear import reference, vendor

kernels = Kernels("linear")

# The interpreter cuts bits off where a GPU rounds to bfloat16: twice the error, and all of it in one direction.
FACTOR = {torch.bfloat16: 6.0 if DEVICE == "cpu" else 2.0}
WIDE = {torch.float64: torch.float64}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Rows, width, hidden: chunks of statistics whole and broken, tiles whole and broken, one row.
SHAPES = [(1, 16, 40), (17, 64, 128), (37, 80, 144), (66, 192, 65)]


def draw(M: int, D: int, OUT: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """A layer behind a norm and a layer behind that, rows with means and one outlier, and gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(DEVICE)

    wide = WIDE.get(dtype, torch.float32)
    x = normal(M, D, std=2.0) + 0.5
    x[:, 0] += 30
    weight, weight2 = normal(OUT, D, std=D**-0.5).to(dtype), normal(D, OUT, std=OUT**-0.5).to(dtype)
    return {
        "x": x.to(wide),
        "weight": weight,
        "colsum": weight.double().sum(1).to(wide),
        "bias": normal(OUT).to(wide),
        "weight2": weight2,
        "bias2": normal(D).to(wide),
        "residual": normal(M, D).to(wide),
        "dy": normal(M, D).to(dtype),
    }


def exact(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in tensors.items()}


def chain(module: Any, t: dict[str, Any], kind: str = "erf") -> dict[str, Tensor]:
    """All operations once, each on what the ones before it made."""
    low = t["weight"].dtype
    rows = t["x"].to(low)
    stats = reference.row_statistics(t["x"])
    u, activation, moments = module.norm_linear_gelu(
        rows, stats, t["weight"], t["colsum"], t["bias"], 1e-6, "ieee", kind
    )
    plain, _ = module.norm_linear(rows, stats, t["weight"], t["colsum"], t["bias"], 1e-6, t["x"].dtype)
    y, y_low, y_stats = module.linear_residual(activation, t["weight2"], t["bias2"], t["residual"])
    du, dstats = module.linear_gelu_dx(t["dy"], t["weight2"], u, t["colsum"], t["bias"], "ieee", kind)
    dx, dx_low = module.norm_linear_dx(du, t["weight"], dstats, rows, moments, t["residual"], None, 1, 1)
    d_activation = module.linear_dx(t["dy"], t["weight2"], t["x"].dtype)
    mean_rstd = reference.row_moments(y_stats, y.shape[1], 1e-6)
    found = {
        "u": u, "activation": activation, "moments": moments, "plain": plain, "y": y, "y_moments": mean_rstd,
        "du": du, "dsums": dstats.sum(1), "dx": dx, "d_activation": d_activation,
    }  # fmt: skip
    if low == t["x"].dtype:
        assert y_low.numel() == dx_low.numel() == 0
    else:
        found.update(y_low=y_low, dx_low=dx_low)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_what_the_references_do(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = draw(*shape, dtype)
    with poisoned():
        found = chain(kernels, tensors)
    expected = chain(reference, tensors)
    truth = chain(reference, exact(tensors))
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        if dtype == torch.float64:
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
        else:
            exact_value = truth[name.removesuffix("_low")]
            assert within_budget(value, expected[name], exact_value, FACTOR.get(dtype, 2.0)), name


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_epilogues_of_the_vendors_product_compute_the_same(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    with tuning.forcing(tuning.VENDOR) as asked:
        test_kernels_compute_what_the_references_do(shape, dtype)
    assert len(asked) == 6
    if dtype == torch.float32:
        tensors = draw(*shape, dtype)
        with tuning.forcing(tuning.VENDOR), count_launches() as launches:
            du = kernels.linear_dx(tensors["dy"], tensors["weight2"], dtype)
        assert launches == [] and torch.equal(du, tensors["dy"] @ tensors["weight2"])


@pytest.mark.triton
@pytest.mark.parametrize("by", ["pointers", "tma"])
@pytest.mark.parametrize("size", [(16, 64, 16), (32, 128, 64), (16, 256, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiles_of_any_size_fetched_or_loaded_compute_the_same(
    dtype: torch.dtype, size: tuple[int, int, int], by: str
) -> None:
    with tuning.forcing(tuning.Tile(*size, 4, 1, by)), count_launches() as launches:
        test_kernels_compute_what_the_references_do((37, 80, 144), dtype)
    assert [launch.args["BY"] for launch in launches] == [by] * 6


@pytest.mark.triton
def test_what_cannot_be_fetched_in_tiles_is_loaded() -> None:
    """Rows and addresses that are no multiples of 16 bytes, and nothing at all."""
    with tuning.forcing(tuning.Tile(16, 64, 16, 4, 1, "tma")), count_launches() as launches:
        test_kernels_compute_what_the_references_do((3, 66, 70), torch.float16)
        a, weight = torch.ones(3 * 16 + 1, device=DEVICE)[1:].view(3, 16), torch.ones(16, 16, device=DEVICE)
        assert kernels.linear_dx(a, weight, torch.float32).eq(16).all()
        assert kernels.linear_dx(a[:0], weight, torch.float32).shape == (0, 16)
    assert [launch.args["BY"] for launch in launches] == ["pointers"] * 7


@pytest.mark.triton
@pytest.mark.parametrize("D", [5, 37, 63, 100])
@pytest.mark.parametrize("size", [(16, 64, 16), (16, 128, 16)], ids=str)
def test_statistics_merge_without_a_loss(size: tuple[int, int, int], D: int) -> None:
    """Of chunks that are broken anywhere; of float64 to the last bits, and of means whose squares would overflow."""
    generator = torch.Generator().manual_seed(D)
    rows = torch.randn(7, D, generator=generator, dtype=torch.float64).to(DEVICE)
    for residual in (rows + 3.0, rows.float() + 1000.0, (rows * 1e18 + 1e20).float()):
        a, weight = residual.new_zeros(7, 16), residual.new_zeros(D, 16)
        with tuning.forcing(tuning.Tile(*size, 4, 1)), poisoned():
            _, _, stats = kernels.linear_residual(a, weight, residual.new_zeros(D), residual)
        mean, squares = stats.double().unbind(-1)
        expected_mean, expected = reference.row_statistics(residual.double()).unbind(-1)
        tolerance = 1e-13 if residual.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(mean, expected_mean, rtol=tolerance, atol=0)
        torch.testing.assert_close(squares, expected, rtol=100 * tolerance, atol=0)


@pytest.mark.triton
def test_statistics_may_lie_any_number_of_entries_apart() -> None:
    t = draw(5, 80, 40, torch.float32)
    stats = reference.row_statistics(t["x"])
    apart = stats.new_full((5, 7), float("nan"))
    apart[:, :4] = stats.flatten(1)
    apart = apart.as_strided((5, 2, 2), (7, 2, 1))
    found, expected = (
        kernels.norm_linear(t["x"], of, t["weight"], t["colsum"], t["bias"], 1e-6, torch.float32)
        for of in (apart, stats)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def matmul() -> Iterator[Any]:
    """PyTorch's settings of products on GPUs, which are back at its defaults afterwards."""
    matmul = torch.backends.cuda.matmul
    yield matmul
    matmul.allow_tf32 = False
    matmul.fp32_precision = "none"
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.triton
@pytest.mark.parametrize("theirs", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("precision", ["ieee", "tf32" + tuning.INVARIANT])
def test_the_vendor_multiplies_float32_as_asked_and_the_callers_setting_comes_back(
    precision: str, theirs: str, matmul: Any
) -> None:
    matmul.fp32_precision = theirs
    with vendor._sums_in_float32(torch.float32, precision):
        assert (matmul.fp32_precision == "tf32") == precision.startswith("tf32")
    assert matmul.fp32_precision == theirs


@pytest.mark.triton
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("allowed", [False, True])
def test_a_setting_by_its_old_name_comes_back(allowed: bool, precision: str, matmul: Any) -> None:
    matmul.allow_tf32 = allowed
    with vendor._sums_in_float32(torch.float32, precision):
        assert matmul.fp32_precision == precision
    assert matmul.allow_tf32 is allowed


@pytest.mark.triton
def test_a_setting_that_is_right_already_is_not_written() -> None:
    class Settings:
        fp32_precision = "none"
        allow_bf16_reduced_precision_reduction = False

        def __setattr__(self, name: str, value: object) -> None:
            raise AssertionError(f"{name} = {value!r}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cuda, "matmul", Settings())
        for dtype in (torch.float32, torch.bfloat16):
            with vendor._sums_in_float32(dtype, "ieee"):
                pass


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("theirs", [(True, True), (False, True), (False, False)], ids=str)
def test_the_vendor_sums_in_float32_and_the_callers_setting_comes_back(
    theirs: tuple[bool, bool], dtype: str, matmul: Any
) -> None:
    name = f"allow_{dtype}_reduced_precision_reduction"
    setattr(matmul, name, theirs)
    with vendor._sums_in_float32({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype], "ieee"):
        assert (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) == (False, theirs[1])
    assert (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) == theirs


@pytest.mark.triton
def test_settings_come_back_when_two_threads_multiply_at_once(matmul: Any) -> None:
    matmul.fp32_precision = "tf32"
    inside, left = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait()
        with vendor._sums_in_float32(torch.float32, "ieee"):
            left.wait(0.2)

    thread = threading.Thread(target=second)
    thread.start()
    with vendor._sums_in_float32(torch.float32, "ieee"):
        inside.set()
        thread.join(0.1)
    left.set()
    thread.join()
    assert matmul.fp32_precision == "tf32"


@pytest.mark.triton
def test_a_users_table_chooses_the_tile_of_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, device = tmp_path / "mine.json", torch.device("cpu")
    monkeypatch.setenv(tuning.USER_TABLE, str(table))
    monkeypatch.setattr(tuning, "shapes", tuning.shapes.__wrapped__)  # which remembers what it read

    def tile(M: int, precision: str = "ieee") -> tuning.Tile:
        return tuning.tile("linear_dx", torch.bfloat16, M, 192, 768, precision, device)

    table.write_text('{"shapes": {"linear_dx 16-bit 376x192x768": [128, 64, 64, 8, 2, "vendor"]}}')
    assert tile(376) == (128, 64, 64, 8, 2, "vendor", 1)
    assert tile(375).by == tile(376, "ieee" + tuning.INVARIANT).by == "pointers"
    assert str(table) in tuning.source()
    with tuning.forcing(tuning.VENDOR) as asked:
        assert tile(376).by == "vendor"
        assert tuning.tile("embed_tokens", torch.bfloat16, 376, 192, 768, "ieee", device).by == "pointers"
    assert asked == ["linear_dx 16-bit 376x192x768"]
    for wrong in (
        '{"shapes": {"linear_dx 16-bit 376x192x768": [128, 64, 64, 8]}}',
        '{"shapes": {"linear_dx 16-bit 376x192": [128, 64, 64, 8, 2]}}',
        '{"shapes": {"linear 16-bit 376x192x768": [128, 64, 64, 8, 2]}}',
        '{"shapes": {"embed_tokens 16-bit 376x192x768": [64, 64, 64, 4, 1, "vendor"]}}',
        '{"shapes": {"linear_dx 16-bit 376x192x768": [64, 64, 64, 4, 1, "cutlass"]}}',
        '{"shapes": {"linear_residual 16-bit 376x192x768": [64, 32, 64, 4, 1]}}',
        '{"shapes": {"linear_dx 16-bit 376x192x768": [64, 64, 64, 4, 1, "tma", 0]}}',
        '{"shapes": [1]}',
        "[]",
        "{",
    ):
        table.write_text(wrong)
        with pytest.raises(ValueError, match=r"SMI_TUNING names .*mine.json.* benchmarks.tune"):
            tile(376)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_so_they_do_with_other_gelus(kind: str, dtype: torch.dtype) -> None:
    tensors = draw(9, 80, 72, dtype)
    with poisoned():
        found = chain(kernels, tensors, kind)
    expected, truth = chain(reference, tensors, kind), chain(reference, exact(tensors), kind)
    for name in ("u", "activation", "du", "dsums", "dx"):
        if dtype == torch.float64:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)
        else:
            assert within_budget(found[name], expected[name], truth[name], FACTOR.get(dtype, 2.0)), name
    with_erf = chain(kernels, tensors)
    assert not any(torch.equal(found[name], with_erf[name]) for name in ("activation", "du"))


@pytest.mark.parametrize("kind", reference.GELUS)
def test_gelus_and_their_slopes(kind: str) -> None:
    """By their definitions, and finite differences; far out they are 0 or u."""
    u = torch.linspace(-6, 6, 97, dtype=torch.float64)
    expected = {
        "erf": 0.5 * u * (1 + torch.erf(u / 2**0.5)),
        "tanh": 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
        "sigmoid": u / (1 + torch.exp(-1.702 * u)),
    }[kind]
    torch.testing.assert_close(reference.gelu(u, kind), expected, rtol=1e-12, atol=1e-12)
    difference = (reference.gelu(u + 1e-5, kind) - reference.gelu(u - 1e-5, kind)) / 2e-5
    torch.testing.assert_close(reference.gelu_slope(u, kind), difference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", reference.GELUS)
def test_far_out_gelus_are_nothing_or_their_argument(kind: str) -> None:
    """Where exponentials overflow too."""
    far = torch.tensor([-1e4, -300.0, -40.0, 40.0, 300.0, 1e4], device=DEVICE)
    eye = torch.eye(6, device=DEVICE)
    zero = torch.zeros(6, device=DEVICE)
    stats = torch.tensor([[[0.0, 6.0]]], device=DEVICE)  # mean 0, variance 1
    u, activation, _ = kernels.norm_linear_gelu(far[None], stats, eye, zero, zero, 1e-12, "ieee", kind)
    du, _ = kernels.linear_gelu_dx(torch.ones(1, 6, device=DEVICE), eye, far[None], zero, zero, "ieee", kind)
    torch.testing.assert_close(activation[0], far.clamp_min(0), rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(du[0], (far > 0).float(), rtol=1e-6, atol=1e-20)


def test_references_are_a_norm_two_layers_and_their_gradient() -> None:
    t = draw(9, 80, 72, torch.float64)
    gamma, beta = torch.randn(2, 80, dtype=torch.float64, device=DEVICE)
    weight, bias = t["weight"], t["bias"]
    x = t["x"].requires_grad_(True)
    hidden = F.linear(F.layer_norm(x, (80,), gamma, beta, 1e-6), weight, bias)
    y = x + F.linear(F.gelu(hidden), t["weight2"], t["bias2"])
    (expected,) = torch.autograd.grad(y, x, t["dy"])
    x = x.detach()

    folded, folded_bias = weight * gamma, bias + weight @ beta
    colsum = folded.sum(1)
    stats = reference.row_statistics(x)
    u, activation, moments = reference.norm_linear_gelu(x, stats, folded, colsum, folded_bias, 1e-6)
    torch.testing.assert_close(u, hidden.detach(), rtol=1e-10, atol=1e-10)
    out, _, out_stats = reference.linear_residual(activation, t["weight2"], t["bias2"], x)
    torch.testing.assert_close(out, y.detach(), rtol=1e-10, atol=1e-10)
    mean, rstd = reference.row_moments(out_stats, 80, 1e-6).unbind(1)
    torch.testing.assert_close(mean, out.mean(1))
    torch.testing.assert_close(rstd, (out.var(1, unbiased=False) + 1e-6).rsqrt())
    du, dstats = reference.linear_gelu_dx(t["dy"], t["weight2"], u, colsum, folded_bias)
    dx, _ = reference.norm_linear_dx(du, folded, dstats, x, moments, t["dy"], None, 9, 9)
    torch.testing.assert_close(dx, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [1, 2])
def test_gradient_of_few_tokens_joins_that_of_all(first: int) -> None:
    """As in a last block: keys and values of all tokens, the query of the first ones."""
    B, tokens, D = 3, 7, 80
    t = draw(B * tokens, D, 2 * D, torch.float64)
    stats = reference.row_statistics(t["x"])
    _, moments = reference.norm_linear(t["x"], stats, t["weight"], t["colsum"], t["bias"], 1e-6, torch.float64)
    du, extra, residual = (torch.randn(rows, w, dtype=torch.float64, device=DEVICE)
                           for rows, w in ((B * tokens, 2 * D), (B * first, D), (B * first, D)))  # fmt: skip
    dstats = torch.randn(B * tokens, 5, 2, dtype=torch.float64, device=DEVICE)
    args = (du, t["weight"], dstats, t["x"], moments, residual, extra, tokens, first)
    with poisoned():
        found, _ = kernels.norm_linear_dx(*args)
    expected, _ = reference.norm_linear_dx(*args)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    without, _ = kernels.norm_linear_dx(*args[:5], None, None, tokens, first)
    same = torch.isclose(found, without, rtol=0, atol=1e-14).all(1).view(B, tokens)
    assert same[:, first:].all() and not same[:, :first].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_rows_may_be_strided(dtype: torch.dtype) -> None:
    t = draw(6, 80, 72, dtype)
    every_third = torch.full((18, 80), torch.nan, dtype=dtype, device=DEVICE)
    every_third[::3] = t["x"].to(dtype)
    stats = reference.row_statistics(t["x"])
    apart = torch.full((18, *stats.shape[1:]), torch.nan, dtype=stats.dtype, device=DEVICE)
    apart[::3] = stats
    layer = (t["weight"], t["colsum"], t["bias"], 1e-6, stats.dtype)
    for strided, packed in zip(
        kernels.norm_linear(every_third[::3], apart[::3], *layer),
        kernels.norm_linear(t["x"].to(dtype), stats, *layer),
        strict=True,
    ):
        assert torch.equal(strided, packed)
    residual = torch.full((18, 80), torch.nan, dtype=stats.dtype, device=DEVICE)
    residual[::3] = t["residual"]
    a = torch.randn(6, 72, device=DEVICE).to(dtype)
    strided = kernels.linear_residual(a, t["weight2"], t["bias2"], residual[::3])
    packed = kernels.linear_residual(a, t["weight2"], t["bias2"], t["residual"])
    assert all(map(torch.equal, strided, packed))


def test_any_strides_are_read_right() -> None:
    t = draw(9, 80, 72, torch.float64)
    spread = {name: torch.stack((value, value), dim=-1)[..., 0] for name, value in t.items()}
    assert not any(value.is_contiguous() for value in spread.values())
    found, expected = chain(kernels, spread), chain(kernels, t)
    for name in expected:  # not the bits: the sums of row_statistics run in another order
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_constant_rows_have_no_gradient_through_their_norm() -> None:
    t = draw(5, 64, 64, torch.float64)
    t["x"] = torch.full_like(t["x"], 3.0)
    found, expected = chain(kernels, t), chain(reference, t)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-8, msg=name)
        assert found[name].isfinite().all()


def test_no_rows_no_launch() -> None:
    t = draw(0, 64, 64, torch.float32)
    with count_launches() as launches:
        found = chain(kernels, t)
    assert not launches
    assert found["dx"].shape == (0, 64)


def test_one_launch_each_and_the_same_bits_twice() -> None:
    t = draw(37, 80, 144, torch.float16)
    with count_launches() as launches:
        once = chain(kernels, t)
    assert [launch.name for launch in launches] == launched(
        [
            "norm_linear_kernel",
            "norm_linear_kernel",
            "linear_residual_kernel",
            "linear_gelu_dx_kernel",
            "norm_linear_dx_kernel",
            "linear_dx_kernel",
        ]
    )
    twice = chain(kernels, t)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_rows_do_not_depend_on_their_batch_where_tiles_are_pinned() -> None:
    t = draw(300, 80, 144, torch.float32)
    stats = reference.row_statistics(t["x"])
    layer = (t["weight"], t["colsum"], t["bias"], 1e-6, torch.float32, "ieee+invariant")
    whole, _ = kernels.norm_linear(t["x"], stats, *layer)
    part, _ = kernels.norm_linear(t["x"][131:140], stats[131:140], *layer)
    assert torch.equal(whole[131:140], part)
