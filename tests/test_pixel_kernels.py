"""Priors and the pixel step: kernels against references, and both against autograd with torch.optim.Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernels import DEVICE, Kernels, error, poisoned, within_budget
from torch import Tensor

import smi_kernels
from smi_kernels.image_prior import reference as prior_reference
from smi_kernels.launch import count_launches, record_launches
from smi_kernels.patch_embed.reference import fed_cells, slot_table
from smi_kernels.pixel_update import reference
from smi_kernels.pixel_update.traffic import TILE_ROWS, pixel_step_bytes

kernels, prior_kernels = Kernels("pixel_update"), Kernels("image_prior")

ADAM = {"lr": 0.1, "beta1": 0.5, "beta2": 0.99, "eps": 1e-8}
WEIGHTS = (0.7, 0.4, 0.2)  # of tv1, tv2, l2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@dataclass
class Case:
    """A batch: rows and columns of tiles and of the grid whole and broken, groups whole and broken.

    `shared` offsets are one row for all images, `still` means no offsets, `kept` None all patches, `direct` a gradient
    of the pixels that comes through no patch.
    """

    shape: tuple[int, int, int, int]
    patch: tuple[int, int]
    kept: int | None
    group: int
    frozen: bool = False
    shared: bool = False
    still: bool = False
    direct: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[2] // self.patch[0], self.shape[3] // self.patch[1]

    def keep(self) -> Tensor | None:
        if self.kept is None:
            return None
        generator = torch.Generator().manual_seed(5)
        drawn = [torch.randperm(math.prod(self.grid), generator=generator)[: self.kept] for _ in range(self.shape[0])]
        return torch.stack([row.sort().values for row in drawn]).to(DEVICE)

    def slots(self) -> Tensor | None:
        keep = self.keep()
        return None if keep is None else slot_table(keep, math.prod(self.grid))

    def table(self, iterations: int) -> Tensor:
        """Offsets larger than the image among them, and both flips."""
        rows = 1 if self.shared else self.shape[0]
        generator = torch.Generator().manual_seed(6)
        H, W = self.shape[2:]
        columns = [torch.randint(-n, n + 1, (iterations, rows), generator=generator) for n in (2 * H, 2 * W)]
        columns.append((torch.arange(iterations * rows) % 2).view(iterations, rows))
        return torch.stack(columns, 2).to(DEVICE)

    def d_patches(self, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        B, C, _, _ = self.shape
        K = math.prod(self.grid) if self.kept is None else self.kept
        return normal(B, K, C * math.prod(self.patch), seed=100 + seed, dtype=dtype)

    def d_images(self, seed: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return normal(*self.shape, seed=200 + seed, dtype=dtype) if self.direct else None

    def bounds(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        low = torch.tensor([-1.0, -1.5, -2.0])[: self.shape[1]]
        return low.to(DEVICE, dtype), (0.8 - low).to(DEVICE, dtype)


CASES = [
    Case((3, 1, 20, 12), (4, 6), 5, group=2),
    Case((2, 2, 18, 14), (6, 7), 3, group=2, frozen=True, shared=True),
    Case((1, 1, 33, 5), (3, 5), None, group=1, frozen=True),
    Case((5, 1, 4, 6), (2, 3), 1, group=3, still=True, direct=True),
    Case((2, 1, 18, 10), (6, 5), 2, group=1, frozen=True, direct=True),
]


def descend(module: Any, case: Case, iterations: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The loop of begin_step, pixel_step and finish_prior_sums of one implementation."""
    images = normal(*case.shape, dtype=dtype)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    history = torch.full((iterations, -(-case.shape[0] // case.group), 3), math.nan, dtype=dtype, device=DEVICE)
    table, size = case.table(iterations), case.shape[2:]
    sums = (prior_kernels if module is kernels else prior_reference).prior_sums(images)
    betas = (ADAM["beta1"], ADAM["beta2"])
    for t in range(iterations):
        offsets, correction, coefficients = module.begin_step(
            step, table, sums, *WEIGHTS, case.group, *size, *betas, history
        )
        assert torch.equal(offsets, table[t])
        before = images.clone()
        new, row_sums = module.pixel_step(
            images,
            exp_avg,
            exp_avg_sq,
            case.d_patches(t, dtype),
            case.d_images(t, dtype),
            case.slots(),
            None if case.still else offsets,
            coefficients,
            case.group,
            correction,
            *ADAM.values(),
            *case.bounds(dtype),
            case.frozen,
            *case.patch,
        )
        assert torch.equal(images, before)
        assert row_sums.shape == (*case.shape[:3], 9) and not row_sums.isnan().any()
        images, sums = new, module.finish_prior_sums(new, row_sums, step)
    assert step.item() == iterations
    return {"images": images, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "sums": sums, "history": history}


def autograd(case: Case, iterations: int) -> dict[str, Tensor]:
    """The same by autograd through the patch reads and the public priors, torch.optim.Adam, and a clamp."""
    parameter = torch.nn.Parameter(normal(*case.shape))
    betas = (ADAM["beta1"], ADAM["beta2"])
    adam = torch.optim.Adam([parameter], lr=ADAM["lr"], betas=betas, eps=ADAM["eps"])
    keep, history = case.keep(), []
    live = None
    if case.frozen and keep is not None:
        flags = torch.zeros(case.shape[0], math.prod(case.grid), dtype=torch.bool, device=DEVICE)
        live = smi_kernels.patch_mask(flags.scatter(1, keep, True), case.grid, case.patch).expand(case.shape)
    for t, offsets in enumerate(case.table(iterations)):
        read = None if case.still else offsets
        cells = fed_cells(keep, read, case.shape[0], case.grid, case.patch).to(DEVICE)
        loss = (smi_kernels.gather_patches(parameter, cells, read, case.patch) * case.d_patches(t)).sum()
        if case.direct:
            loss = loss + (parameter * case.d_images(t)).sum()
        values = []
        for part in parameter.split(case.group):
            priors = [f(part, per_image=False) for f in (smi_kernels.tv_l1, smi_kernels.tv_l2, smi_kernels.l2_norm)]
            loss = loss + sum(weight * prior for weight, prior in zip(WEIGHTS, priors, strict=True))
            values.append(torch.stack(priors).detach())
        history.append(torch.stack(values))
        (parameter.grad,) = torch.autograd.grad(loss, parameter)
        state = adam.state[parameter]
        old = [parameter.detach().clone(), *(state[name].clone() for name in ("exp_avg", "exp_avg_sq") if state)]
        adam.step()
        low, high = (bound.view(-1, 1, 1) for bound in case.bounds())
        with torch.no_grad():
            parameter.clamp_(low, high)
            if live is not None:
                old += [torch.zeros_like(parameter)] * (3 - len(old))
                for now, before in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), old, strict=True):
                    now.copy_(torch.where(live, now, before))
    state = adam.state[parameter]
    moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    sums = prior_reference.prior_sums(parameter.detach())
    return {"images": parameter.detach(), **moments, "sums": sums, "history": torch.stack(history)}


@pytest.mark.native_cuda
@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loop_is_autograd_and_adam(case: Case, module: Any) -> None:
    expected = autograd(case, 5)
    with poisoned():
        found = descend(module, case, 5)
    for name, value in expected.items():
        assert error(found[name], value) < 1e-12, name
    low, high = case.bounds()
    clamped = (found["images"] == low.view(-1, 1, 1)) | (found["images"] == high.view(-1, 1, 1))
    assert clamped.any(), "nothing was clamped"


@pytest.mark.native_cuda
def test_float32_is_as_exact_as_plain_pytorch() -> None:
    case = Case((2, 2, 20, 12), (4, 6), 5, group=2)
    exact, plain = descend(reference, case, 2), descend(reference, case, 2, torch.float32)
    found = descend(kernels, case, 2, torch.float32)
    assert all(within_budget(found[name], plain[name], exact[name], factor=2.0) for name in exact)


def step_once(module: Any, case: Case, dtype: torch.dtype, **changed: Any) -> list[Tensor]:
    """One pixel step from given moments: images, moments, and sums of the new images."""
    B, C, _, _ = case.shape
    given = {
        "images": normal(*case.shape, dtype=dtype),
        "exp_avg": normal(*case.shape, seed=1, dtype=dtype),
        "exp_avg_sq": normal(*case.shape, seed=2, dtype=dtype).abs(),
        "d_patches": case.d_patches(3, dtype),
        "d_images": case.d_images(3, dtype),
        "keep_slots": case.slots(),
        "offsets": None if case.still else case.table(1)[0],
        "coefficients": normal(-(-B // case.group), 9, seed=4, dtype=dtype).abs(),
        "group": case.group,
        "bias_correction": torch.tensor([0.75, 0.2], dtype=dtype, device=DEVICE),
        **ADAM,
        "low": case.bounds(dtype)[0],
        "high": case.bounds(dtype)[1],
        "frozen": case.frozen,
        "patch_height": case.patch[0],
        "patch_width": case.patch[1],
        **changed,
    }
    new, row_sums = module.pixel_step(*given.values())
    return [new, given["exp_avg"], given["exp_avg_sq"], module.finish_prior_sums(new, row_sums, None)]


@pytest.mark.native_cuda
def test_frozen_pixels_keep_every_bit() -> None:
    case = Case((2, 1, 18, 10), (6, 5), 2, group=1, frozen=True)
    keep = case.keep()
    flags = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE).scatter(1, keep, True)
    still = ~smi_kernels.patch_mask(flags, case.grid, case.patch)
    old = [normal(*case.shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    old[0] = torch.where(still, 9 * old[0], old[0])  # beyond the bounds, where a clamp would show
    old[0][:, :, 0][still[:, :, 0]] = -0.0  # a sign that arithmetic would lose
    old[1][:, :, -1][still[:, :, -1]] = math.nan
    old[2].abs_()
    given = [tensor.clone() for tensor in old]
    with poisoned():
        found = step_once(kernels, case, torch.float32, images=given[0], exp_avg=given[1], exp_avg_sq=given[2])
    for now, before in zip(found, old, strict=False):
        assert torch.equal(now[still].view(torch.int32), before[still].view(torch.int32))
        assert not (now[~still] == before[~still]).any()


@pytest.mark.native_cuda
def test_a_group_alone_has_the_same_bits() -> None:
    case = Case((3, 1, 18, 6), (6, 3), 2, group=2, shared=True)
    together, table = descend(kernels, case, 2, torch.float32), case.table(2)
    for part in (slice(0, 2), slice(2, 3)):
        images, step = normal(*case.shape, dtype=torch.float32)[part], torch.zeros(1, dtype=torch.int64, device=DEVICE)
        exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
        sums = prior_kernels.prior_sums(images)
        for t in range(2):
            offsets, correction, coefficients = kernels.begin_step(
                step, table, sums, *WEIGHTS, 2, 18, 6, ADAM["beta1"], ADAM["beta2"], None
            )
            images, row_sums = kernels.pixel_step(
                images, exp_avg, exp_avg_sq, case.d_patches(t, torch.float32)[part], None, case.slots()[part], offsets,
                coefficients, 2, correction, *ADAM.values(), *case.bounds(torch.float32), False, 6, 3,
            )  # fmt: skip
            sums = kernels.finish_prior_sums(images, row_sums, step)
        assert torch.equal(images, together["images"][part]) and torch.equal(sums, together["sums"][part])
        assert torch.equal(exp_avg, together["exp_avg"][part])
        assert torch.equal(exp_avg_sq, together["exp_avg_sq"][part])


@pytest.mark.native_cuda
def test_constant_images_stay() -> None:
    """All differences and norms are zero, and so is their gradient."""
    images = torch.zeros(2, 1, 18, 6, device=DEVICE)
    sums = prior_kernels.prior_sums(images)
    values, coefficients = prior_kernels.prior_coefficients(sums, *WEIGHTS, 1, 18, 6)
    assert not sums.any() and not values.any() and not coefficients[:, [0, 1, 2, 3, 8]].any()
    case = Case((2, 1, 18, 6), (6, 3), 2, group=1)
    still = {
        "images": images,
        "exp_avg": torch.zeros_like(images),
        "exp_avg_sq": torch.zeros_like(images),
        "d_patches": torch.zeros(2, 2, 18, device=DEVICE),
        "coefficients": coefficients,
    }
    assert not any(tensor.any() for tensor in step_once(kernels, case, torch.float32, **still))


@pytest.mark.native_cuda
@pytest.mark.parametrize("where", ["images", "d_patches", "d_images"])
def test_not_a_number_stays_visible(where: str) -> None:
    case = Case((1, 1, 6, 6), (3, 3), 2, group=1)
    poison = case.d_patches(0) if where == "d_patches" else normal(*case.shape)
    poison.view(-1)[7] = math.nan
    found = step_once(kernels, case, torch.float64, **{where: poison.clone()})
    expected = step_once(reference, case, torch.float64, **{where: poison.clone()})
    for now, then in zip(found[:3], expected, strict=False):
        assert now.isnan().any() and torch.equal(now.isnan(), then.isnan())


@pytest.mark.native_cuda
def test_any_strides() -> None:
    case = Case((2, 2, 6, 6), (3, 3), 2, group=1)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    given = {
        "images": normal(*case.shape),
        "exp_avg": normal(*case.shape, seed=1),
        "exp_avg_sq": normal(*case.shape, seed=2).abs(),
        "d_patches": case.d_patches(3),
        "d_images": normal(*case.shape, seed=5),
        "keep_slots": case.slots(),
        "coefficients": normal(2, 9, seed=4).abs(),
    }
    found = step_once(kernels, case, torch.float64, **{name: strided(value) for name, value in given.items()})
    expected = step_once(reference, case, torch.float64, **given)
    assert all(error(now, then) < 1e-12 for now, then in zip(found, expected, strict=True))


# ---- sums and coefficients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 33, 21), (1, 1, 16, 130), (5, 1, 2, 2), (1, 2, 47, 64)], ids=str)
def test_prior_sums(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    images = normal(*shape, dtype=dtype).transpose(2, 3).contiguous().transpose(2, 3)
    with poisoned():
        found = prior_kernels.prior_sums(images)
    plain, exact = prior_reference.prior_sums(images), prior_reference.prior_sums(images.double())
    assert found.dtype == dtype
    # The interpreter adds one by one where a GPU adds in pairs.
    assert within_budget(found, plain, exact, floor=1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 18, 21), (2, 1, 2, 2)], ids=str)
def test_gradient_of_prior_sums(shape: tuple[int, int, int, int], magnitudes: bool, dtype: torch.dtype) -> None:
    images = (2 * normal(*shape, dtype=dtype)).round()  # some neighbours are equal
    d_sums = normal(*shape[:2], 9, seed=1, dtype=dtype)
    d_sums[..., 4:8] *= magnitudes
    leaf = images.double().requires_grad_()
    (exact,) = torch.autograd.grad(prior_reference.prior_sums(leaf), leaf, d_sums.double())
    plain = prior_reference.prior_sums_dx(images, d_sums)
    with poisoned():
        found = prior_kernels.prior_sums_dx(images, d_sums)
    floor = 1e-14 if dtype == torch.float64 else 1e-7
    assert found.dtype == plain.dtype == dtype
    assert error(plain, exact) < 10 * floor
    assert within_budget(found, plain, exact, floor=floor)


@pytest.mark.parametrize("module", [prior_reference, prior_kernels], ids=["reference", "kernels"])
@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_coefficients_are_gradients_of_the_priors(group: int, module: Any) -> None:
    images = normal(5, 2, 7, 6)
    images[4] = 0  # alone in its group, when there are groups of 2
    sums = prior_reference.prior_sums(images)
    values, coefficients = module.prior_coefficients(sums, *WEIGHTS, group, 7, 6)
    parts = images.split(group)
    priors = (smi_kernels.tv_l1, smi_kernels.tv_l2, smi_kernels.l2_norm)
    expected = torch.stack([torch.stack([prior(part, per_image=False) for prior in priors]) for part in parts])
    assert values.shape == (len(parts), 3) and error(values, expected) < 1e-14
    leaf = images.clone().requires_grad_()
    pairs = list(zip(WEIGHTS, priors, strict=True))
    objective = sum(weight * prior(part, per_image=False) for part in leaf.split(group) for weight, prior in pairs)
    (exact,) = torch.autograd.grad(objective, leaf)
    spread = coefficients.repeat_interleave(group, 0)[:5, None].expand(5, 2, 9)
    assert error(prior_reference.prior_sums_dx(images, spread), exact) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [smi_kernels.tv_l1, smi_kernels.tv_l2, smi_kernels.l2_norm])
def test_priors_of_16_bits_have_room_for_their_sums(prior: Any, dtype: torch.dtype) -> None:
    images = 60 * normal(2, 3, 24, 40, dtype=dtype)  # squares of a plane add up to 50 times what float16 has room for

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_(True)
        values = prior(images, per_image=True)
        return values, torch.autograd.grad(values.sum(), images)[0]

    found, truth = run(images), run(images.double())
    for value, exact in zip(found, truth, strict=True):
        assert value.dtype == dtype and error(value, exact) < 2 * torch.finfo(dtype).eps


def test_sums_of_a_large_group_are_exact() -> None:
    """More planes than a tile of them, of sizes that float32 would not add up."""
    sums = torch.full((131, 3, 9), 1.0, device=DEVICE)
    sums[0, 0] = 2.0**26
    values, _ = prior_kernels.prior_coefficients(sums, *WEIGHTS, 131, 8, 8)
    assert values[0, 2].item() == pytest.approx(math.sqrt(2**26 + 392), rel=6e-8)


# ---- begin and end of an iteration


@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999), (0.0, 0.9999)], ids=str)
@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "kernels"])
def test_bias_correction_to_the_last_digit(module: Any, betas: tuple[float, float]) -> None:
    sums = torch.ones(1, 1, 9, device=DEVICE)
    table = torch.zeros(1, 1, 3, dtype=torch.int64, device=DEVICE)
    for t in (0, 1, 2, 9, 100, 3999, 99_999):
        step = torch.tensor([t], device=DEVICE)
        _, found, _ = module.begin_step(step, table, sums, 0.0, 0.0, 0.0, 1, 4, 4, *betas, None)
        exact = [1 - betas[0] ** (t + 1), math.sqrt(1 - betas[1] ** (t + 1))]
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(exact, rel=6.1e-8, abs=0)
        assert step.item() == t


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("module", [reference, kernels], ids=["reference", "kernels"])
def test_tables_are_read_and_written_at_the_step_and_never_beyond(module: Any, rows: int) -> None:
    table = torch.arange(4 * rows * 3, device=DEVICE).view(4, rows, 3)
    sums = normal(50, 2, 9).abs()
    values, coefficients = prior_reference.prior_coefficients(sums, *WEIGHTS, 20, 6, 5)
    for t, row in ((0, 0), (3, 3), (4, 3), (1000, 3), (-1, 0)):
        history = torch.full((4, 3, 3), 7.0, device=DEVICE)
        step = torch.tensor([t], device=DEVICE)
        offsets, _, found = module.begin_step(step, table, sums, *WEIGHTS, 20, 6, 5, 0.5, 0.99, history)
        assert torch.equal(offsets, table[row]) and error(found, coefficients) < 1e-14
        assert error(history[row], values) < 1e-7
        assert (torch.cat([history[:row], history[row + 1 :]]) == 7).all()


@pytest.mark.native_cuda
def test_only_a_given_step_is_counted() -> None:
    images = normal(2, 1, 18, 6)
    row_sums = torch.zeros(2, 1, 18, 9, dtype=torch.float64, device=DEVICE)
    step = torch.tensor([2**40], device=DEVICE)
    kernels.finish_prior_sums(images, row_sums, None)
    kernels.finish_prior_sums(images, row_sums, step)
    assert step.item() == 2**40 + 1


@pytest.mark.native_cuda
def test_no_images_are_a_step_too() -> None:
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    images, row_sums = normal(0, 3, 18, 6), normal(0, 3, 18, 9)
    assert kernels.finish_prior_sums(images, row_sums, step).shape == (0, 3, 9)
    assert step.item() == 1


@pytest.mark.native_cuda
@pytest.mark.parametrize("number", range(5))
def test_autograd_notices_what_is_written_in_place(number: int) -> None:
    """A product remembers its factors, and must not be differentiated with others."""
    images, *state = (normal(1, 1, 4, 4, seed=seed).abs() for seed in range(6))
    factors = torch.ones(1, 1, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    product = factors * state[number]
    low, high = images.new_zeros(1), images.new_ones(1)
    if number < 3:
        kernels.adam_clamp_(state[0], images, *state[1:3], step=1, **ADAM, low=low, high=high)
    else:
        kernels.pixel_step(
            images, *state[3:], normal(1, 4, 4), None, None, None, normal(1, 9), 1, images.new_ones(2), *ADAM.values(),
            low, high, False, 2, 2,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- Adam alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_adam_clamp(masked: bool, dtype: torch.dtype) -> None:
    shape = (2, 3, 20, 30)  # more than a block of pixels does not divide
    live = None
    if masked:
        live = smi_kernels.patch_mask(normal(2, 4, seed=9) > 0, (2, 2), (10, 15))
    bounds = {"low": torch.tensor([-1.0, -0.5, 0.0]), "high": torch.tensor([1.0, 1.5, 2.0])}

    def run(adam: Any, dtype: torch.dtype) -> list[Tensor]:
        state = [normal(*shape, seed=seed, dtype=dtype) for seed in range(3)]
        state[0] = state[0].transpose(2, 3).contiguous().transpose(2, 3)  # in place, whatever the strides
        state[2].abs_()
        for step in range(1, 3):
            grad = normal(*shape, seed=10 + step, dtype=dtype)
            if live is not None:
                grad = torch.where(live, grad, math.nan)
            limits = {name: value.to(DEVICE, dtype) for name, value in bounds.items()}
            adam(state[0], grad, state[1], state[2], step=step, **ADAM, **limits, live=live)
        return state

    found, plain = run(kernels.adam_clamp_, dtype), run(reference.adam_clamp_, dtype)
    exact = run(reference.adam_clamp_, torch.float64)
    start = [normal(*shape, seed=seed, dtype=dtype) for seed in range(3)]
    for now, then, truth, old in zip(found, plain, exact, [*start[:2], start[2].abs()], strict=True):
        assert within_budget(now, then, truth, floor=1e-14 if dtype == torch.float64 else 1e-7)
        if live is not None:
            still = ~live.expand(shape)
            assert torch.equal(now[still], old[still])


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"low": (1,)}, r"\(3,\)"), ({"high": (4,)}, r"\(3,\)"), ({"live": (1, 1, 4, 4)}, r"\(2, 1, 4, 4\)")],
)
def test_adam_reads_no_bounds_and_no_mask_beyond_their_end(wrong: dict[str, Any], expected: str) -> None:
    images, shapes = [normal(2, 3, 4, 4, seed=seed) for seed in range(4)], {"low": (3,), "high": (3,), **wrong}
    ((name, shape),) = wrong.items()
    others = {name: torch.zeros(shape, dtype=torch.float64, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"{name} has shape .*; expected {expected}"):
        smi_kernels.adam_clamp_(*images, step=1, **ADAM, **others)


# ---- launches


def launch_all(B: int, H: int, W: int, K: int, patch: int, device: str) -> None:
    images = torch.empty(B, 3, H, W, device=device)
    sums = prior_kernels.prior_sums(images)
    prior_kernels.prior_sums_dx(images, sums)
    prior_kernels.prior_coefficients(sums, *WEIGHTS, 1, H, W)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    table = torch.zeros(9, B, 3, dtype=torch.int64, device=device)
    offsets, correction, coefficients = kernels.begin_step(
        step, table, sums, *WEIGHTS, 1, H, W, 0.5, 0.99, torch.empty(9, B, 3, device=device)
    )
    moments, bounds = [torch.empty_like(images) for _ in range(2)], [torch.empty(3, device=device) for _ in range(2)]
    slots = torch.zeros(B, H // patch * (W // patch), dtype=torch.int32, device=device)
    d_patches = torch.empty(B, K, 3 * patch * patch, device=device)
    new, row_sums = kernels.pixel_step(
        images, *moments, d_patches, None, slots, offsets, coefficients, 1, correction, *ADAM.values(), *bounds, True,
        patch, patch,
    )  # fmt: skip
    kernels.finish_prior_sums(new, row_sums, step)
    kernels.adam_clamp_(images, images, *moments, step=1, **ADAM, low=bounds[0], high=bounds[1])


@pytest.mark.triton
def test_each_operation_is_one_launch_without_looking_at_values() -> None:
    with record_launches() as seen:
        launch_all(32, 224, 224, 46, 16, "meta")
    assert [launch.name for launch in seen] == [
        "prior_sums_kernel",
        "prior_sums_dx_kernel",
        "prior_coefficients_kernel",
        "begin_step_kernel",
        "pixel_step_kernel",
        "finish_prior_sums_kernel",
        "adam_clamp_kernel",
    ]
    step = next(launch for launch in seen if launch.name == "pixel_step_kernel")
    assert step.grid == (32 * 3 * 14,) and step.args["BLOCK_H"] == TILE_ROWS


def test_no_images_no_launches() -> None:
    with count_launches() as seen:
        launch_all(0, 8, 8, 3, 4, DEVICE)
    assert not seen


def test_traffic_budget() -> None:
    """26 bytes for each pixel, 4 more for each in a kept patch, 4 more for each with a gradient of its own."""
    pixels, kept = 32 * 3 * 224 * 224, 46 * 16 * 16
    assert 24 * pixels < pixel_step_bytes(32, 3, 224, 224, 0) < 26 * pixels
    assert pixel_step_bytes(32, 3, 224, 224, kept) - pixel_step_bytes(32, 3, 224, 224, 0) == 4 * 32 * 3 * kept
    direct = pixel_step_bytes(32, 3, 224, 224, kept, direct=True)
    assert direct - pixel_step_bytes(32, 3, 224, 224, kept) == 4 * pixels
    # By hand: two tiles of an image of 17 x 10 share one border, whose two rows are read twice more each.
    by_hand = 6 * 170 + 2 * 2 * 10 + 9 * 17 + 9 * 2 + 9
    assert pixel_step_bytes(1, 1, 17, 10, 0) == 4 * by_hand
    assert pixel_step_bytes(1, 1, 17, 10, 50, frozen=True) == 4 * (by_hand - 4 * 120 + 50)
    assert pixel_step_bytes(1, 1, 17, 10, 50, frozen=True, direct=True) == 4 * (by_hand - 4 * 120 + 50 + 50)
