"""The reference operations against literal cases, loops over every element, torch.optim and finite differences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import one_thread  # noqa: F401
from torch import Tensor

from smi_kernels import (
    adam_clamp_,
    attention_row,
    augment,
    embed_patches,
    gather_patches,
    l2_norm,
    map_cells,
    patch_mask,
    received_attention,
    select_tokens,
    tv_l1,
    tv_l2,
    use_backend,
)
from smi_kernels.linear.reference import gradient_sums


@pytest.fixture(autouse=True, scope="module")
def on_the_reference() -> Iterator[None]:
    with use_backend("reference"):
        yield


quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)
shifts = st.tuples(st.integers(-17, 17), st.integers(-17, 17), st.integers(0, 1))
sizes = st.tuples(*[st.integers(1, 4)] * 4)  # rows, columns, patch height, patch width


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_cells(images: int, count: int, kept: int, seed: int) -> Tensor:
    """(images, kept) different cells out of `count`, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator)[:kept] for _ in range(images)])


def seen_from(y: int, x: int, offset: tuple[int, int, int], height: int, width: int) -> tuple[int, int]:
    """The pixel of the image that is at (y, x) once it was rolled and then flipped."""
    dy, dx, flip = offset
    if flip:
        x = width - 1 - x
    return (y - dy) % height, (x - dx) % width


def rounded(offset: int, patch: int) -> int:
    """Whole patches nearest to an offset, halves upwards."""
    return math.floor(offset / patch + 0.5)


# ---- token selection


def test_select_tokens_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.8, 0.7]])
    keep = torch.tensor([[2, 3, 5, 8], [0, 1, 6, 9]])
    assert select_tokens(scores, keep, 2).tolist() == [[3, 8], [0, 6]]
    assert select_tokens(scores, keep, 1).tolist() == [[3], [0]]
    assert torch.equal(select_tokens(scores, keep, 4), keep)


def test_ties_go_to_the_lower_index_and_nan_ranks_highest() -> None:
    keep = torch.arange(300)[None] * 2
    assert torch.equal(select_tokens(torch.zeros(1, 300), keep, 123), keep[:, :123])
    scores = torch.tensor([[1.0, math.nan, 1.0, 1.0, 2.0, -math.inf]])
    assert select_tokens(scores, torch.arange(6)[None], 4).tolist() == [[0, 1, 2, 4]]


@quick
@given(st.integers(1, 3), st.integers(1, 23), st.data())
def test_select_tokens_is_a_stable_sort(images: int, kept: int, data: st.DataObject) -> None:
    values = st.lists(st.integers(-3, 3), min_size=kept, max_size=kept)  # few values: many ties
    rows = data.draw(st.lists(values, min_size=images, max_size=images))
    count = data.draw(st.integers(1, kept))
    keep = some_cells(images, 40, kept, data.draw(seeds)).sort(1).values
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        selected = select_tokens(torch.tensor(rows, dtype=dtype), keep, count)
        for b, row in enumerate(rows):
            best = sorted(range(kept), key=lambda i, row=row: (-row[i], i))[:count]
            assert selected[b].tolist() == sorted(keep[b, best].tolist())


def test_select_tokens_refuses() -> None:
    keep = torch.arange(4)[None]
    for count in (0, 5, -1):
        with pytest.raises(ValueError, match=f"count is {count}; expected 1 to 4"):
            select_tokens(torch.zeros(1, 4), keep, count)
    for scores in (torch.zeros(1, 3), torch.zeros(2, 4), torch.zeros(4)):
        with pytest.raises(ValueError, match="expected the same"):
            select_tokens(scores, keep if scores.ndim == 2 else torch.arange(4), 1)


def equivalent(function: object, **values: object) -> object:
    """What the snippet of a docstring gives that says what the function is equivalent to."""
    found = re.search(r"Equ(?:ivalent to|als)\s+``(.+?)``", str(function.__doc__), re.DOTALL)
    assert found, "the docstring holds no snippet"
    return eval(" ".join(found[1].split()), values)


def test_docstring_of_select_tokens() -> None:
    scores, keep = random(3, 11).round(), some_cells(3, 30, 11, 0).sort(1).values
    expected = equivalent(select_tokens, scores=scores, keep=keep, count=5)
    assert torch.equal(select_tokens(scores, keep, 5), expected)


def test_docstring_of_embed_patches() -> None:
    images, offsets = random(2, 3, 8, 12), torch.tensor([[3, -5, 1], [-2, 1, 0]])
    weight, bias, cells = random(5, 3, 4, 3, seed=1), random(5, seed=2), some_cells(2, 8, 5, 3)
    dense = equivalent(
        embed_patches,
        conv2d=torch.nn.functional.conv2d,
        augment=augment,
        images=images,
        offsets=offsets,
        weight=weight,
        bias=bias,
        patch_size=(4, 3),
    )
    expected = dense.flatten(2).transpose(1, 2).gather(1, cells[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(embed_patches(images, cells, offsets, weight, bias), expected, rtol=1e-12, atol=1e-12)


# ---- augmentation and patches


def test_augment_by_hand() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3)
    for offset, expected in {
        (0, 0, 0): [[0, 1, 2], [3, 4, 5]],
        (1, 0, 0): [[3, 4, 5], [0, 1, 2]],
        (0, 1, 0): [[2, 0, 1], [5, 3, 4]],
        (0, -1, 0): [[1, 2, 0], [4, 5, 3]],
        (0, 1, 1): [[1, 0, 2], [4, 3, 5]],  # rolled first, then flipped
        (-3, 7, 1): [[4, 3, 5], [1, 0, 2]],
    }.items():
        assert augment(image, torch.tensor([offset]))[0, 0].tolist() == expected


@quick
@given(sizes, st.integers(1, 3), st.integers(1, 3), st.data())
def test_augment_and_gather_read_the_right_pixels(
    size: tuple[int, int, int, int], images: int, channels: int, data: st.DataObject
) -> None:
    rows, columns, height, width = size
    H, W = rows * height, columns * width
    offsets = data.draw(st.lists(shifts, min_size=images, max_size=images) | st.lists(shifts, min_size=1, max_size=1))
    cells = some_cells(images, rows * columns, data.draw(st.integers(1, rows * columns)), data.draw(seeds))
    # Every value names its own image, channel and pixel.
    source = torch.arange(images * channels * H * W, dtype=torch.float64).view(images, channels, H, W)
    table = torch.tensor(offsets)
    seen, patches = augment(source, table), gather_patches(source, cells, table, (height, width))
    assert seen.shape == source.shape and patches.shape == (images, cells.shape[1], channels * height * width)
    for b in range(images):
        offset = offsets[b % len(offsets)]
        for c, y, x in product(range(channels), range(H), range(W)):
            assert seen[b, c, y, x] == source[(b, c, *seen_from(y, x, offset, H, W))]
        for k, cell in enumerate(cells[b].tolist()):
            top, left = cell // columns * height, cell % columns * width
            flat = [
                source[(b, c, *seen_from(top + i, left + j, offset, H, W))].item()
                for c, i, j in product(range(channels), range(height), range(width))
            ]
            assert patches[b, k].tolist() == flat


@quick
@given(sizes, st.lists(shifts, min_size=1, max_size=3))
def test_map_cells_rounds_rolls_and_flips(size: tuple[int, int, int, int], offsets: list[tuple[int, int, int]]) -> None:
    rows, columns, height, width = size
    keep = torch.arange(rows * columns).repeat(len(offsets), 1)
    cells = map_cells(keep, torch.tensor(offsets), (rows, columns), (height, width))
    for b, (dy, dx, flip) in enumerate(offsets):
        for patch, cell in enumerate(cells[b].tolist()):
            row = (patch // columns + rounded(dy, height)) % rows
            column = (patch % columns + rounded(dx, width)) % columns
            assert cell == row * columns + (columns - 1 - column if flip else column)
        assert sorted(cells[b].tolist()) == keep[b].tolist()


def test_map_cells_by_hand() -> None:
    keep = torch.tensor([[0, 5]])  # a grid of 2 x 3 patches of 4 x 2 pixels
    for offset, expected in {
        (0, 0, 0): [0, 5],
        (1, 0, 0): [0, 5],
        (2, 0, 0): [3, 2],  # half a patch goes up,
        (-2, 0, 0): [0, 5],  # and minus a half goes up as well, to nothing
        (-3, 0, 0): [3, 2],
        (0, 1, 0): [1, 3],
        (0, -2, 0): [2, 4],
        (0, 0, 1): [2, 3],
        (4, 2, 1): [4, 2],
        (400, -600, 0): [0, 5],
    }.items():
        assert map_cells(keep, torch.tensor([offset]), (2, 3), (4, 2)).tolist() == [expected]


@quick
@given(sizes, st.tuples(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 1)), st.data())
def test_offsets_of_whole_patches_lose_nothing(
    size: tuple[int, int, int, int], patches: tuple[int, int, int], data: st.DataObject
) -> None:
    """Read where `map_cells` says, a kept patch of the augmented image is the patch of the image, flipped or not."""
    rows, columns, height, width = size
    images = random(2, 3, rows * height, columns * width, seed=data.draw(seeds), dtype=torch.float32)
    keep = some_cells(2, rows * columns, data.draw(st.integers(1, rows * columns)), data.draw(seeds))
    offsets = torch.tensor([[patches[0] * height, patches[1] * width, patches[2]]])
    cells = map_cells(keep, offsets, (rows, columns), (height, width))
    expected = gather_patches(images, keep, None, (height, width))
    if patches[2]:
        expected = expected.view(2, -1, 3, height, width).flip(4).flatten(2)
    assert torch.equal(gather_patches(images, cells, offsets, (height, width)), expected)
    assert torch.equal(gather_patches(augment(images, offsets), cells, None, (height, width)), expected)


@quick
@given(sizes, st.integers(1, 2), st.booleans(), st.data())
def test_embed_patches_is_the_convolution(
    size: tuple[int, int, int, int], images: int, biased: bool, data: st.DataObject
) -> None:
    rows, columns, height, width = size
    source = random(images, 2, rows * height, columns * width)
    weight, bias = random(5, 2, height, width, seed=1), random(5, seed=2) if biased else None
    offsets = torch.tensor(data.draw(st.lists(shifts, min_size=images, max_size=images)))
    cells = some_cells(images, rows * columns, data.draw(st.integers(1, rows * columns)), data.draw(seeds))
    for row in (offsets, None):
        seen = source if row is None else augment(source, row)
        dense = torch.nn.functional.conv2d(seen, weight, bias, stride=(height, width)).flatten(2).transpose(1, 2)
        expected = torch.stack([dense[b, cells[b]] for b in range(images)])
        torch.testing.assert_close(embed_patches(source, cells, row, weight, bias), expected, rtol=1e-12, atol=1e-12)


def test_embed_patches_runs_in_the_dtype_of_the_weights() -> None:
    images, cells = random(2, 3, 8, 8, dtype=torch.float32), some_cells(2, 4, 3, 0)
    weight = random(5, 3, 4, 4, seed=1, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    exact = embed_patches(images.double(), cells, None, weight.double(), None)
    assert embed_patches(images, cells, None, weight.bfloat16(), None).dtype == torch.bfloat16
    torch.testing.assert_close(embed_patches(images, cells, None, weight, None).double(), exact, rtol=1e-5, atol=1e-5)


OFFSETS = [None, [[3, -5, 1]], [[3, -5, 1], [-40, 1, 0]]]


@pytest.mark.parametrize("offsets", OFFSETS)
def test_gradients_of_the_patch_reads(offsets: list[list[int]] | None) -> None:
    table = None if offsets is None else torch.tensor(offsets)
    images, cells = random(2, 2, 4, 6).requires_grad_(), some_cells(2, 6, 4, 1)
    weight, bias = random(3, 2, 2, 2, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_patches(x, cells, table, (2, 2)), images)
    assert torch.autograd.gradcheck(lambda x, w, b: embed_patches(x, cells, table, w, b), (images, weight, bias))
    if table is not None:
        assert torch.autograd.gradcheck(lambda x: augment(x, table), images)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_only_read_pixels_get_a_gradient(offsets: list[list[int]] | None) -> None:
    """Each pixel of a fed cell is read once, so its gradient is one; every other is exactly zero."""
    table = None if offsets is None else torch.tensor(offsets)
    images, cells = random(2, 3, 8, 12).requires_grad_(), some_cells(2, 6, 2, 1)
    (grad,) = torch.autograd.grad(gather_patches(images, cells, table, (4, 4)).sum(), images)
    expected = torch.zeros(2, 3, 8, 12, dtype=torch.float64)
    for b, k, i, j in product(range(2), range(2), range(4), range(4)):
        offset = (0, 0, 0) if offsets is None else tuple(offsets[b % len(offsets)])
        cell = cells[b, k].item()
        y, x = seen_from(cell // 3 * 4 + i, cell % 3 * 4 + j, offset, 8, 12)
        expected[b, :, y, x] += 1
    assert torch.equal(grad, expected)


def test_patch_reads_refuse() -> None:
    images, cells, offsets = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 3).long()
    with pytest.raises(ValueError, match="8 x 8; expected multiples of the patch size 3 x 4"):
        gather_patches(images, cells, None, (3, 4))
    with pytest.raises(ValueError, match="expected multiples"):
        embed_patches(images, cells, None, torch.zeros(5, 3, 4, 5), None)
    for wrong in (cells[:1], cells[0], cells[None]):
        with pytest.raises(ValueError, match=r"expected \(2, K\) for 2 images"):
            gather_patches(images, wrong, None, (4, 4))
    for wrong in (offsets[0], offsets[:, :2], offsets.repeat(3, 1), offsets[:0]):
        with pytest.raises(ValueError, match=r"expected \(2, 3\) or \(1, 3\)"):
            gather_patches(images, cells, wrong, (4, 4))
        with pytest.raises(ValueError, match=r"expected \(2, 3\) or \(1, 3\)"):
            augment(images, wrong)
        with pytest.raises(ValueError, match=r"expected \(2, 3\) or \(1, 3\)"):
            map_cells(cells, wrong, (2, 2), (4, 4))


# ---- attention rows


def attention_by_loops(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, Q, N): the softmax of every query's scores, number by number."""
    B, H, Q, _ = query.shape
    result = torch.zeros(B, H, Q, key.shape[2], dtype=torch.float64)
    for b, h, q in product(range(B), range(H), range(Q)):
        dots = (query[b, h, q] * key[b, h]).tolist()
        scores = [scale * math.fsum(products) for products in dots]
        exponentials = [math.exp(s - max(scores)) for s in scores]
        result[b, h, q] = torch.tensor(exponentials, dtype=torch.float64) / math.fsum(exponentials)
    return result


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), seeds)
def test_attention_rows(images: int, heads: int, tokens: int, width: int, seed: int) -> None:
    query, key = random(images, heads, tokens, width, seed=seed), random(images, heads, tokens, width, seed=seed + 1)
    expected = attention_by_loops(query, key, 0.7)
    row, received = attention_row(query[:, :, 0], key, 0.7), received_attention(query, key, 0.7)
    torch.testing.assert_close(row, expected[:, :, 0].mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(received, expected.mean((1, 2)), rtol=1e-12, atol=1e-12)
    for scores in (row, received):
        torch.testing.assert_close(scores.sum(1), torch.ones(images, dtype=torch.float64))


def test_attention_by_hand() -> None:
    key = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 2, 1)
    torch.testing.assert_close(attention_row(torch.ones(1, 1, 1), key, 1.0), torch.tensor([[0.25, 0.75]]))
    query = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)  # the first looks everywhere alike
    torch.testing.assert_close(received_attention(query, key, 1.0), torch.tensor([[0.375, 0.625]]))


def test_attention_of_half_precision_is_taken_in_single() -> None:
    query, key = random(2, 2, 9, 8, dtype=torch.bfloat16), 8 * random(2, 2, 9, 8, seed=1, dtype=torch.bfloat16)
    for scores, exact in (
        (attention_row(query[:, :, 0], key, 0.3), attention_row(query[:, :, 0].double(), key.double(), 0.3)),
        (received_attention(query, key, 0.3), received_attention(query.double(), key.double(), 0.3)),
    ):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-7)


def test_attention_does_not_overflow() -> None:
    huge = torch.tensor([[[[3e4], [-3e4]]]])
    assert attention_row(huge[:, :, 0], huge, 1.0).tolist() == [[1.0, 0.0]]


# ---- image priors

NEIGHBOURS = {"right": (0, 1), "down": (1, 0), "down-left": (1, -1), "down-right": (1, 1)}


def neighbour_differences(images: Tensor) -> list[list[float]]:
    """For each of the four directions all differences between a pixel and that neighbour."""
    B, C, H, W = images.shape
    return [
        [
            (images[b, c, y + dy, x + dx] - images[b, c, y, x]).item()
            for b, c, y, x in product(range(B), range(C), range(H), range(W))
            if y + dy < H and 0 <= x + dx < W
        ]
        for dy, dx in NEIGHBOURS.values()
    ]


PRIORS = {
    tv_l1: lambda images: sum(sum(map(abs, d)) / len(d) for d in neighbour_differences(images)),
    tv_l2: lambda images: sum(math.sqrt(sum(v * v for v in d)) for d in neighbour_differences(images)),
    l2_norm: lambda images: math.sqrt(sum(v * v for v in images.flatten().tolist())),
}


def test_priors_by_hand() -> None:
    image = torch.tensor([[[[1.0, 4.0], [1.0, 0.0]]]])  # right 3, -1; down 0, -4; down-left -3; down-right -1
    assert tv_l1(image, per_image=False).item() == pytest.approx(2 + 2 + 3 + 1)
    assert tv_l2(image, per_image=False).item() == pytest.approx(math.sqrt(10) + 4 + 3 + 1)
    assert l2_norm(image, per_image=False).item() == pytest.approx(math.sqrt(18))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), seeds)
def test_priors_are_their_loops(images: int, channels: int, height: int, width: int, seed: int) -> None:
    source = random(images, channels, height, width, seed=seed)
    for prior, by_loops in PRIORS.items():
        assert prior(source, per_image=False).shape == ()
        assert prior(source, per_image=False).item() == pytest.approx(by_loops(source), rel=1e-12)
        assert prior(source, per_image=True).tolist() == pytest.approx([by_loops(image[None]) for image in source])


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
def test_gradients_of_the_priors(prior: object, per_image: bool) -> None:
    assert torch.autograd.gradcheck(lambda x: prior(x, per_image=per_image), random(2, 2, 3, 4).requires_grad_())
    flat = torch.zeros(2, 1, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(prior(flat, per_image=per_image).sum(), flat)
    assert torch.equal(grad, torch.zeros_like(flat))


@pytest.mark.parametrize("prior", PRIORS)
def test_per_image_priors_do_not_see_the_batch(prior: object) -> None:
    images = random(3, 2, 5, 4, dtype=torch.float32)
    assert torch.equal(prior(images, per_image=True)[1:2], prior(images[1:2], per_image=True))


# ---- pixel update


def test_patch_mask() -> None:
    live = torch.tensor([[True, False, False, False, True, True]])
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    expected = [expected[0], *expected[:1], *expected[:1], *expected[1:]]
    mask = patch_mask(live, (2, 3), (3, 2))
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].long().tolist() == expected


ADAM = {"lr": 0.25, "beta1": 0.5, "beta2": 0.99, "eps": 1e-8}
LOW, HIGH = [-2.0, -1.5, -1.0], [2.5, 2.0, 1.5]


@pytest.mark.parametrize("settings_", [ADAM, {"lr": 0.03, "beta1": 0.9, "beta2": 0.999, "eps": 1e-3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_clamp_is_torchs(dtype: torch.dtype, settings_: dict[str, float]) -> None:
    images = random(2, 3, 5, 7, dtype=dtype)
    low, high = torch.tensor(LOW, dtype=dtype), torch.tensor(HIGH, dtype=dtype)
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    parameter = torch.nn.Parameter(images.clone())
    betas = (settings_["beta1"], settings_["beta2"])
    adam = torch.optim.Adam([parameter], lr=settings_["lr"], betas=betas, eps=settings_["eps"], foreach=False)
    for step in range(1, 9):
        grad = random(2, 3, 5, 7, seed=step, dtype=dtype) * 10.0 ** (step % 4 - 6)
        adam_clamp_(images, grad, exp_avg, exp_avg_sq, step=step, low=low, high=high, **settings_)
        parameter.grad = grad.clone()
        adam.step()
        with torch.no_grad():
            for channel in range(3):
                parameter[:, channel].clamp_(LOW[channel], HIGH[channel])
        assert torch.equal(images, parameter)
        assert torch.equal(exp_avg, adam.state[parameter]["exp_avg"])
        assert torch.equal(exp_avg_sq, adam.state[parameter]["exp_avg_sq"])
    assert (images == low.view(-1, 1, 1)).any() or settings_["lr"] < 0.1, "nothing was clamped"


def test_first_adam_step_by_hand() -> None:
    """After bias correction the first step is the learning rate against the gradient's sign, if eps is small."""
    images, grad = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2), torch.tensor([2.0, -3.0, 0.0, 1e-3])
    exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
    bounds = {"low": torch.tensor([-0.2]), "high": torch.tensor([1.1])}
    adam_clamp_(images, grad.view(1, 1, 2, 2), exp_avg, exp_avg_sq, step=1, **ADAM, **bounds)
    torch.testing.assert_close(images.flatten(), torch.tensor([-0.2, 1.1, 0.0, 0.75]), rtol=0, atol=1e-5)
    torch.testing.assert_close(exp_avg.flatten(), grad / 2)
    torch.testing.assert_close(exp_avg_sq.flatten(), grad**2 / 100)


@pytest.mark.parametrize("step", [0, -1])
def test_there_is_no_adam_step_before_the_first(step: int) -> None:
    images, bound = torch.ones(1, 1, 2, 2), torch.ones(1)
    with pytest.raises(ValueError, match=f"step is {step}; expected at least 1"):
        adam_clamp_(images, images, images, images, step=step, **ADAM, low=bound, high=bound)


def test_a_pixel_that_is_not_live_keeps_every_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    live = patch_mask(torch.rand(2, 6, generator=generator) < 0.5, (2, 3), (2, 2))
    masked = [random(2, 3, 4, 6, seed=i, dtype=torch.float32) for i in range(3)]
    masked[0] *= 9  # beyond the bounds, where a clamp would show
    masked[2].abs_()
    masked[0][~live.expand_as(masked[0])] = -0.0  # a sign that arithmetic would lose
    before, free = [value.clone() for value in masked], [value.clone() for value in masked]
    bounds = {"low": torch.tensor(LOW), "high": torch.tensor(HIGH)}
    for step in range(3, 7):
        grad = random(2, 3, 4, 6, seed=10 + step, dtype=torch.float32)
        adam_clamp_(free[0], grad, *free[1:], step=step, **ADAM, **bounds)
        grad[~live.expand_as(grad)] = math.nan  # not even looked at
        adam_clamp_(masked[0], grad, *masked[1:], step=step, **ADAM, **bounds, live=live)
    for value, old, unmasked in zip(masked, before, free, strict=True):
        still = ~live.expand_as(value)
        assert torch.equal(value[still].view(torch.int32), old[still].view(torch.int32))
        assert torch.equal(value[~still], unmasked[~still])
        assert not torch.equal(value[~still], old[~still])


@pytest.mark.parametrize("width", [30, 128, 1000])
def test_sums_of_gradients_take_few_operations_however_wide(width: int) -> None:
    du, u = random(3, width, seed=1), random(3, width, seed=2)
    colsum, bias = random(2, width, seed=3)
    u[1, 7], du[1, 7] = math.inf, 0  # a class that is switched off
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        found = gradient_sums(du, u, colsum, bias)
    sums = sum(event.count for event in profiled.key_averages() if event.key == "aten::sum")
    assert 1 <= sums <= 2
    expected = torch.zeros(3, -(-width // 64), 2, dtype=torch.float64)
    for row, column in product(range(3), range(width)):
        if du[row, column] != 0:
            expected[row, column // 64, 0] += du[row, column] * colsum[column]
            expected[row, column // 64, 1] += du[row, column] * (u[row, column] - bias[column])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
