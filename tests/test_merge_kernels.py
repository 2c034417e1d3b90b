"""Token merging: references against slow loops, kernels against references, and attention that knows sizes."""

from __future__ import annotations

from typing import Any

import pytest
import test_attention_kernels as attention_tests
import torch
from kernels import DEVICE, Kernels, launched, poisoned, within_budget
from torch import Tensor

from smi_kernels import merge_counts
from smi_kernels.attention import kernels as attention_kernels
from smi_kernels.attention import reference as attention_reference
from smi_kernels.launch import count_launches
from smi_kernels.linear.reference import row_statistics
from smi_kernels.token_merge import reference

kernels = Kernels("token_merge")

EPS = 1e-6
# Images, tokens, prefix, tokens to merge, heads, columns of a head: one pair, several blocks of pairs, nothing over.
MATCHED = [
    (2, 3, 1, 1, 1, 8),
    (1, 17, 1, 5, 3, 24),
    (2, 71, 2, 34, 2, 16),
    (1, 40, 0, 20, 1, 72),
    (1, 138, 5, 40, 2, 32),
]
# And width.
MERGED = [(2, 3, 1, 1, 8), (1, 17, 1, 5, 72), (2, 25, 2, 11, 64), (1, 18, 0, 9, 300)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def qk_norm(d: int, seed: int = 3) -> Tensor:
    return normal(4, d, seed=seed) * 0.3 + 0.5


def slow_targets(key: Tensor, prefix: int, fewer: int) -> list[int]:
    """Of one image (N, H, d), pair by pair."""
    means = [row.mean(0) for row in key.double().cpu()]
    patches = range(prefix, len(means))
    evens, odds = patches[::2], patches[1::2]
    wanted = []
    for i in evens:
        cosines = [float(means[i] @ means[j] / (means[i].norm() * means[j].norm())) for j in odds]
        best = max(range(len(odds)), key=lambda j: (cosines[j], -j))
        wanted.append((-cosines[best], i, odds[best]))
    into = {i: j for _, i, j in sorted(wanted)[:fewer]}
    stay = [n for n in range(len(means)) if n not in into]
    return [stay.index(into.get(n, n)) for n in range(len(means))]


@pytest.mark.parametrize("shape", MATCHED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matching_is_that_of_the_slow_loop(dtype: torch.dtype, shape: tuple[int, int, int, int, int, int]) -> None:
    B, N, prefix, fewer, H, d = shape
    key = normal(B, N, 3, H, d).to(dtype)[:, :, 1]  # a view, as it is of qkv
    with poisoned():
        found = kernels.match_tokens(key, None, 0.0, prefix, fewer)
    assert found.dtype == torch.int64
    assert found.tolist() == [slow_targets(image, prefix, fewer) for image in key]
    assert torch.equal(found, reference.match_tokens(key, None, 0.0, prefix, fewer))


def test_keys_are_compared_behind_their_norm() -> None:
    key, norm = normal(2, 23, 2, 24) * 3 + 1, qk_norm(24)
    found = kernels.match_tokens(key, norm, EPS, 1, 9)
    normed = (key - key.mean(-1, keepdim=True)) / (key.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    normed = normed * norm[2] + norm[3]
    assert found.tolist() == [slow_targets(image, 1, 9) for image in normed]
    assert found.tolist() != [slow_targets(image, 1, 9) for image in key]


def test_ties_go_to_the_lower_index() -> None:
    for N, prefix, fewer in ((7, 2, 2), (150, 1, 60)):
        found = kernels.match_tokens(torch.ones(1, N, 2, 16, device=DEVICE), None, 0.0, prefix, fewer)
        gone = [prefix + 2 * i for i in range(fewer)]
        stay = [n for n in range(N) if n not in gone]
        expected = [stay.index(prefix + 1) if n in gone else stay.index(n) for n in range(N)]
        assert found[0].tolist() == expected


def test_keys_that_are_not_finite_still_give_targets_in_range() -> None:
    key = normal(2, 20, 1, 16)
    key[0, 5], key[1] = torch.nan, torch.nan
    with poisoned():
        found = kernels.match_tokens(key, None, 0.0, 1, 7)
    assert found.min() == 0 and found.max() == 12
    assert torch.equal(found, reference.match_tokens(key, None, 0.0, 1, 7))


FAR = 2**30 + 64


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 6, 3, 8), (0, 8, FAR, 1)), ((1, 3, 2, 8), (0, FAR, 8, 1))], ids=str
)
def test_keys_may_lie_further_apart_than_32_bits_count(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Heads, or tokens; the memory between is never touched, so that a host need not have it."""
    memory = torch.empty(2 * FAR + 64, dtype=torch.float16, device=DEVICE)
    key = memory.as_strided(shape, strides).copy_(normal(*shape, seed=2))
    assert kernels.match_tokens(key, None, 0.0, 0, 1).tolist() == [slow_targets(key[0], 0, 1)]


def test_nothing_to_merge_leaves_every_token_where_it_is() -> None:
    found = kernels.match_tokens(normal(2, 6, 1, 16), None, 0.0, 1, 0)
    assert found.tolist() == [list(range(6))] * 2


# --- merging ---


def case(shape: tuple[int, ...], dtype: torch.dtype, sized: bool) -> tuple[Tensor, Tensor | None, Tensor, int]:
    """x (B N, D), sizes, targets and tokens left."""
    B, N, prefix, fewer, D = shape
    target = reference.match_tokens(normal(B, N, 1, 8), None, 0.0, prefix, fewer)
    size = torch.arange(B * N, device=DEVICE).remainder(5).add(1).view(B, N).to(dtype) if sized else None
    return normal(B * N, D).to(dtype), size, target, N - fewer


@pytest.mark.parametrize("sized", [False, True], ids=["", "sized"])
@pytest.mark.parametrize("shape", MERGED, ids=str)
def test_merging_is_a_weighted_mean(shape: tuple[int, ...], sized: bool) -> None:
    x, size, target, left = case(shape, torch.float64, sized)
    B, N = target.shape
    with poisoned():
        out, low, stats, total = kernels.merge_tokens(x, size, target, left, torch.float16)
    weight = torch.ones_like(target) if size is None else size
    for image in range(B):
        for place in range(left):
            members = [n for n in range(N) if target[image, n] == place]
            amount = sum(float(weight[image, n]) for n in members)
            expected = sum(float(weight[image, n]) * x[image * N + n] for n in members) / amount
            torch.testing.assert_close(out[image * left + place], expected, rtol=1e-12, atol=1e-12)
            assert total[image, place] == amount
            if len(members) == 1:
                assert torch.equal(out[image * left + place], x[image * N + members[0]])
    torch.testing.assert_close(low, out.half(), rtol=1e-3, atol=1e-6)  # the interpreter rounds twice
    torch.testing.assert_close(stats, row_statistics(out), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sized", [False, True], ids=["", "sized"])
@pytest.mark.parametrize("shape", MERGED, ids=str)
def test_kernels_merge_as_the_reference_and_back(shape: tuple[int, ...], sized: bool) -> None:
    for dtype, low in ((torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        x, size, target, left = case(shape, dtype, sized)
        dx = normal(target.shape[0] * left, x.shape[1], seed=5).to(dtype)
        with poisoned():
            found = kernels.merge_tokens(x, size, target, left, low)
            back = kernels.merge_tokens_dx(dx, size, target, found[3], low)
        expected = reference.merge_tokens(x, size, target, left, low)
        wide = reference.merge_tokens(x.double(), None if size is None else size.double(), target, left, torch.float64)
        expected_back = reference.merge_tokens_dx(dx, size, target, expected[3], low)
        for value, plain in zip((*found, *back), (*expected, *expected_back), strict=True):
            assert value.shape == plain.shape and value.dtype == plain.dtype
        assert within_budget(found[0], expected[0], wide[0], 2.0)
        assert torch.equal(found[3], expected[3])
        torch.testing.assert_close(back[0], expected_back[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(back[1], expected_back[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("sized", [False, True])
def test_a_place_that_no_token_goes_to_is_zero(sized: bool) -> None:
    x, target = normal(4, 70).float(), torch.tensor([[0, 2, 2, 0]], device=DEVICE)
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0]], device=DEVICE) if sized else None
    with poisoned():
        found = kernels.merge_tokens(x, size, target, 3, torch.float32)
    expected = reference.merge_tokens(x, size, target, 3, torch.float32)
    assert found[0][1].eq(0).all() and found[2][1].eq(0).all() and found[3][0, 1] == 0
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_gradient_is_the_transpose() -> None:
    x, size, target, left = case((2, 17, 1, 6, 20), torch.float64, True)
    dx = normal(2 * left, 20, seed=5)
    out, _, _, total = kernels.merge_tokens(x, size, target, left, torch.float64)
    back, _ = kernels.merge_tokens_dx(dx, size, target, total, torch.float64)
    assert float((out * dx).sum()) == pytest.approx(float((x * back).sum()), rel=1e-12)


def test_launches_and_the_same_bits_twice() -> None:
    x, size, target, left = case((2, 21, 2, 9, 64), torch.float32, True)
    key = normal(2, 21, 2, 16).float()
    with count_launches() as launches:
        once = (kernels.match_tokens(key, None, 0.0, 2, 9), *kernels.merge_tokens(x, size, target, left, torch.half))
        once += kernels.merge_tokens_dx(once[1], size, target, once[4], torch.half)
    names = ["pair_tokens_kernel", "merge_targets_kernel", "merge_tokens_kernel", "merge_tokens_dx_kernel"]
    assert [launch.name for launch in launches] == launched(names)
    twice = (kernels.match_tokens(key, None, 0.0, 2, 9), *kernels.merge_tokens(x, size, target, left, torch.half))
    twice += kernels.merge_tokens_dx(twice[1], size, target, twice[4], torch.half)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_images_do_not_meet() -> None:
    key, x = normal(3, 23, 2, 16).float(), normal(3 * 23, 40).float()
    target = kernels.match_tokens(key, None, 0.0, 1, 8)
    out, *_ = kernels.merge_tokens(x, None, target, 15, torch.float32)
    key[::2], x.view(3, 23, 40)[::2] = torch.nan, torch.nan
    alone = kernels.match_tokens(key, None, 0.0, 1, 8)
    assert torch.equal(alone[1], target[1])
    assert torch.equal(kernels.merge_tokens(x, None, alone, 15, torch.float32)[0].view(3, 15, 40)[1], out[15:30])


# --- attention that counts tokens as often as patches went into them ---


def sizes(B: int, N: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.arange(B * N, device=DEVICE).remainder(4).add(1).view(B, N).to(torch.promote_types(dtype, torch.float32))
    )


def attend(module: Any, t: dict[str, Any], size: Tensor | None) -> dict[str, Tensor]:
    part = t["query"].shape[2] * t["query"].shape[3]
    sums = [t[name][columns] for columns in (slice(part), slice(part, None)) for name in ("colsum", "bias")]
    out = module.attention(t["qkv"], t["qk_norm"], EPS, "ieee", size)
    dqkv, dstats = module.attention_dx(t["qkv"], t["d_out"], t["qk_norm"], EPS, t["colsum"], t["bias"], "ieee", size)
    row = module.class_attention(t["query"], t["kv"], t["qk_norm"], EPS, size)
    made = module.class_attention_dx(t["query"], t["kv"], t["d_class"], t["qk_norm"], EPS, *sums, size)
    found = {"out": out, "dqkv": dqkv, "dstats": dstats, "row": row}
    return {**found, **dict(zip(("dq", "dkv", "sums"), made, strict=True))}


def test_a_token_of_some_size_is_that_many_equal_tokens() -> None:
    t = attention_tests.draw(1, 9, 2, 16, torch.float64, norm=True, R=1)
    size = sizes(1, 9, torch.float64)
    often = [n for n in range(9) for _ in range(int(size[0, n]))]
    found = attend(attention_reference, t, size)
    qkv, kv = t["qkv"].requires_grad_(), t["kv"].requires_grad_()
    first = [often.index(n) for n in range(9)]
    out = attention_reference.attention(qkv[:, often], t["qk_norm"], EPS)[:, first]
    row = attention_reference.class_attention(t["query"], kv[:, often], t["qk_norm"], EPS)
    torch.testing.assert_close(found["out"], out.detach())
    torch.testing.assert_close(found["row"], row.detach())
    (dqkv,) = torch.autograd.grad((out * t["d_out"]).sum(), qkv)
    (dkv,) = torch.autograd.grad((row * t["d_class"]).sum(), kv)
    torch.testing.assert_close(found["dqkv"], dqkv)
    torch.testing.assert_close(found["dkv"], dkv)


# Tiles of all tokens, loops over blocks, and in 16 bits the long kernels.
SIZED = [
    (torch.float64, (2, 17, 1, 72, True)),
    (torch.float64, (2, 47, 2, 64, False)),
    (torch.float32, (1, 67, 1, 40, True)),
    (torch.float16, (2, 47, 2, 64, False)),
    (torch.float16, (1, 138, 1, 32, True)),
]


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "shape"), SIZED, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_count_keys_by_size(dtype: torch.dtype, shape: tuple[int, int, int, int, bool]) -> None:
    B, N, H, d, norm = shape
    t, size = attention_tests.draw(B, N, H, d, dtype, norm, R=2), sizes(B, N, dtype)
    with poisoned():
        found = attend(attention_kernels, t, size)
    expected = attend(attention_reference, t, size)
    truth = attend(attention_reference, attention_tests.exact(t), size.double())
    unsized = attend(attention_reference, t, None)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        if dtype == torch.float64:
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
        else:
            assert within_budget(value, expected[name], truth[name], 2.0), name
        assert (value - unsized[name]).abs().max() > 1e-3, name


# --- how many ---


def test_counts_by_hand() -> None:
    assert merge_counts(16, 4, 0.25) == (12, 8, 4, 4)
    assert merge_counts(196, 12, 0.25)[:2] == (183, 170) and merge_counts(196, 12, 0.25)[-2:] == (49, 49)
    assert merge_counts(10, 3, 0.9) == (10, 9, 9)
    assert merge_counts(100, 2, 0.57) == (57, 57)  # as it is written: of floats, 100 * 0.57 is below 57
    assert merge_counts(7, 1, 1.0) == (7,) and merge_counts(7, 4, 1.0) == (7, 7, 7, 7)
    with pytest.raises(ValueError, match=r"leaves 1 of 7 patches, but the 2 blocks .* leave 4; use .* 0.572"):
        merge_counts(7, 2, 0.2)
    for merge_to in (0.0, 1.01):
        with pytest.raises(ValueError, match=f"merge_to is {merge_to}; expected a share"):
            merge_counts(7, 2, merge_to)


@pytest.mark.parametrize(("tokens", "blocks"), [(7, 1), (15, 3), (100, 3), (196, 4), (1369, 12)])
def test_the_share_that_a_refusal_names_is_the_least_that_is_accepted(tokens: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="use a merge_to of") as refused:
        merge_counts(tokens, blocks, 1e-4)
    named = float(str(refused.value).split("use a merge_to of ")[1].split(" or more")[0])
    assert merge_counts(tokens, blocks, named)[-1] == int(named * tokens + 1e-9)
    with pytest.raises(ValueError, match=f"use a merge_to of {named:g} or more"):
        merge_counts(tokens, blocks, named - 0.5 / tokens - 0.001)
