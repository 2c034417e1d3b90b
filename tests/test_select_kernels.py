"""Kernels of token selection and of the attention row: the reference's choice exactly, its scores within budget."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, Kernels, error, launched, poisoned, within_budget
from torch import Tensor

from smi_kernels.attention import reference as attention_reference
from smi_kernels.launch import count_launches, record_launches
from smi_kernels.token_select import reference

kernels, attention_kernels = Kernels("token_select"), Kernels("attention", triton="row")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def kept(B: int, K: int, seed: int = 0) -> Tensor:
    """Another increasing subset of 2 K + 3 patches for each image."""
    order = random(B, 2 * K + 3, seed=seed).argsort(1)[:, :K]
    return order.sort(1).values


def check_selection(scores: Tensor, keep: Tensor, count: int) -> None:
    with poisoned():
        found = kernels.select_tokens(scores, keep, count)
    assert torch.equal(found, reference.select_tokens(scores, keep, count))


# --- select_tokens ---


@pytest.mark.native_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 2, 17, 46, 47])
def test_selects_what_the_reference_selects(K: int, dtype: torch.dtype) -> None:
    scores = random(3, K, dtype=dtype)
    for count in {1, (K + 1) // 2, K - 1, K} - {0}:
        check_selection(scores, kept(3, K), count)


@pytest.mark.native_cuda
@pytest.mark.parametrize(
    "row",
    [
        [1.0] * 9,
        [0.0, -0.0] * 4 + [0.0],
        [-0.0, 0.0, 1e-45, -1e-45, -0.0, 0.0, 1e-45, -1e-45, 0.0],
        [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0],
        [NAN, 1.0, INF, -INF, NAN, -NAN, INF, 0.0, 3e38],
        [-INF] * 8 + [-3e38],
        [NAN] * 9,
        [1e4, -1e4, 1e4, 9.9e3, -1e4, 1e4, 0.0, 1e4, -1.0],
        [-5.0, -4.0, -3.0, -5.0, -4.0, -3.0, -5.0, -4.0, -3.0],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # what the others are widened to
def test_ties_and_extremes_for_every_count(row: list[float], dtype: torch.dtype) -> None:
    scores = torch.tensor([row, row[::-1]], dtype=torch.float64).to(DEVICE, dtype)
    for count in range(1, 10):
        check_selection(scores, kept(2, 9), count)


@pytest.mark.native_cuda
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([-INF, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, INF, NAN]), min_size=1, max_size=33),
    st.floats(0, 1),
)
def test_random_ties(row: list[float], share: float) -> None:
    count = 1 + round(share * (len(row) - 1))
    check_selection(torch.tensor([row], device=DEVICE), kept(1, len(row)), count)


@pytest.mark.native_cuda
def test_4096_tokens_with_blocks_of_ties() -> None:
    scores = random(1, 4096).mul(2).round()
    for count in (1, 1000, 4096):
        check_selection(scores, kept(1, 4096), count)


@pytest.mark.native_cuda
def test_strided_inputs_one_launch_and_the_same_bits_twice() -> None:
    scores, keep = random(10, 6).T[::2], kept(6, 20)[::2, ::2]
    assert not scores.is_contiguous() and not keep.is_contiguous()
    with count_launches() as launches:
        once, again = (kernels.select_tokens(scores, keep, 4) for _ in range(2))
    assert [launch.name for launch in launches] == launched(["select_tokens_kernel"] * 2)
    assert torch.equal(once, again)
    check_selection(scores, keep, 4)


@pytest.mark.native_cuda
def test_no_images() -> None:
    empty = torch.empty(0, 7, device=DEVICE)
    assert kernels.select_tokens(empty, empty.long(), 3).shape == (0, 3)


# --- rank_tokens and attention_row ---


def tokens(B: int, N: int, H: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A class token's query and the keys of all tokens, strided as a last block leaves them."""
    return random(B, 2, H, d, dtype=dtype, seed=1)[:, 0], random(B, N, 2, H, d, dtype=dtype, seed=2)[:, :, 0]


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check_rank(
    query: Tensor,
    key: Tensor,
    scale: float,
    qk_norm: Tensor | None,
    keep: Tensor,
    count: int,
    prefix: int,
    factor: float = 2,
) -> None:
    with poisoned(), count_launches() as launches:
        found, scores = kernels.rank_tokens(query, key, scale, qk_norm, 1e-6, keep, count, prefix)
    assert [launch.name for launch in launches] == launched(["rank_tokens_kernel"])
    assert torch.equal(found, reference.select_tokens(scores, keep, count))
    plain = reference.rank_tokens(query, key, scale, qk_norm, 1e-6, keep, count, prefix)[1]
    wide_query, wide_key, wide_norm = widened(query, key, qk_norm)
    assert wide_query is not None and wide_key is not None
    exact = reference.rank_tokens(wide_query, wide_key, scale, wide_norm, 1e-6, keep, count, prefix)[1]
    assert scores.dtype == plain.dtype
    if query.dtype == torch.float64:
        assert error(scores, exact) < 1e-12
    else:
        assert within_budget(scores, plain, exact, factor=factor)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "prefix", "H", "d"), [(1, 1, 1, 8), (2, 0, 3, 5), (17, 5, 2, 64), (47, 1, 3, 12)])
def test_ranks_as_the_reference(K: int, prefix: int, H: int, d: int, dtype: torch.dtype, normed: bool) -> None:
    query, key = tokens(2, prefix + K, H, d, dtype)
    norm = random(4, d, seed=3, dtype=torch.promote_types(dtype, torch.float32)) if normed else None
    check_rank(query, key, d**-0.5, norm, kept(2, K), (K + 1) // 2, prefix)


def test_a_norm_of_keys_far_from_zero_keeps_its_digits() -> None:
    """Mean 1000 and spread 1: a variance out of squares of what is nearly the mean would be off by percents.

    The means themselves are known to some 1e-5 only, by luck better or worse than the reference's: hence the factor.
    """
    query, key = tokens(1, 9, 2, 16, torch.float32)
    check_rank(query + 1000, key + 1000, 0.25, random(4, 16, seed=3), kept(1, 8), 3, 1, factor=10)


def test_the_prefix_counts_in_the_softmax_and_is_never_chosen() -> None:
    query, key = tokens(1, 6, 1, 4, torch.float32)
    key[:, :2] = 50 * query[:, None]
    found, scores = kernels.rank_tokens(query, key, 1.0, None, 0.0, kept(1, 4), 4, 2)
    assert torch.equal(found, kept(1, 4))
    assert float(scores.sum()) < 1e-3


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_equal_keys_tie_and_huge_logits_do_not_overflow(size: float) -> None:
    query, key = tokens(2, 8, 2, 4, torch.float32)
    check_rank(query * size, key, 1.0, None, kept(2, 7), 3, 1)
    alike = key[:, :1].expand_as(key)
    check_rank(query * size, alike, 1.0, None, kept(2, 7), 3, 1)
    found = kernels.rank_tokens(query * size, alike, 1.0, None, 0.0, kept(2, 7), 3, 1)[0]
    assert torch.equal(found, kept(2, 7)[:, :3])


def test_a_nan_makes_all_of_its_image_tie_and_nothing_else() -> None:
    query, key = tokens(2, 8, 2, 4, torch.float32)
    clean = kernels.rank_tokens(query, key, 1.0, None, 0.0, kept(2, 7), 3, 1)
    key[0, 5, 1, 2] = NAN
    found, scores = kernels.rank_tokens(query, key, 1.0, None, 0.0, kept(2, 7), 3, 1)
    assert scores[0].isnan().all() and torch.equal(found[0], kept(2, 7)[0, :3])
    assert torch.equal(scores[1], clean[1][1]) and torch.equal(found[1], clean[0][1])


def test_4096_tokens_are_ranked() -> None:
    query, key = tokens(1, 4096, 1, 4, torch.float32)
    check_rank(query, key, 0.5, None, kept(1, 4095), 1234, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 17, 47])
def test_attention_row_within_budget_in_one_launch(N: int, dtype: torch.dtype) -> None:
    query, key = tokens(2, N, 3, 10, dtype)
    key = key.transpose(1, 2)
    with poisoned(), count_launches() as launches:
        row = attention_kernels.attention_row(query, key, 0.3)
    assert [launch.name for launch in launches] == launched(["attention_row_kernel"])
    exact = attention_reference.attention_row(query.double(), key.double(), 0.3)
    plain = attention_reference.attention_row(query, key, 0.3)
    assert row.dtype == plain.dtype
    assert within_budget(row, plain, exact, factor=2, floor=1e-12 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("d", [1, 2])
def test_attention_row_reads_columns_that_lie_apart(d: int) -> None:
    query, key = (random(*shape, seed=4) for shape in ((2, 3, 3 * d), (2, 3, 5, 3 * d)))
    row = attention_kernels.attention_row(query[..., ::3], key[..., ::3], 0.7)
    expected = attention_reference.attention_row(query[..., ::3].double(), key[..., ::3].double(), 0.7)
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-7)


def test_ranks_have_the_same_bits_alone_and_in_a_batch() -> None:
    query, key = tokens(3, 20, 2, 12, torch.bfloat16)
    norm, keep = random(4, 12, seed=3), kept(3, 19)
    found, scores = kernels.rank_tokens(query, key, 0.3, norm, 1e-6, keep, 5, 1)
    for b in range(3):
        one = slice(b, b + 1)
        alone = kernels.rank_tokens(query[one], key[one], 0.3, norm, 1e-6, keep[one], 5, 1)
        assert torch.equal(alone[0], found[one]) and torch.equal(alone[1], scores[one])


def test_nothing_to_rank() -> None:
    query, key = tokens(0, 8, 2, 4, torch.float32)
    keep = torch.empty(0, 7, dtype=torch.int64, device=DEVICE)
    assert [t.shape for t in kernels.rank_tokens(query, key, 1.0, None, 0.0, keep, 3, 1)] == [(0, 3), (0, 7)]
    assert attention_kernels.attention_row(query, key.transpose(1, 2), 1.0).shape == (0, 8)


FAR = 2**30 + 64


@pytest.mark.parametrize(
    ("H", "d", "query_strides", "key_strides"),
    [(3, 8, (0, FAR, 1), (0, FAR, 8, 1)), (2, 3, (0, 1, FAR), (0, 4, 1, FAR))],
    ids=["heads", "columns"],
)
def test_attention_row_of_what_lies_further_apart_than_32_bits_count(
    H: int, d: int, query_strides: tuple[int, ...], key_strides: tuple[int, ...]
) -> None:
    """The memory between is never touched, so that a host need not have it."""
    memory = torch.empty(2 * FAR + 64, dtype=torch.float16, device=DEVICE)
    key = memory.as_strided((1, H, 4, d), key_strides).copy_(random(1, H, 4, d, seed=5))
    query = memory.as_strided((1, H, d), query_strides, 32).copy_(random(1, H, d, seed=6))
    row = attention_kernels.attention_row(query, key, 0.5)
    expected = attention_reference.attention_row(query.double(), key.double(), 0.5)
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_row_over_no_tokens_is_empty() -> None:
    """In a thread that has no memory of earlier calls to read from."""
    query, key = tokens(1, 0, 2, 4, torch.float32)
    with ThreadPoolExecutor(1) as fresh:
        row = fresh.submit(attention_kernels.attention_row, query, key.transpose(1, 2), 1.0).result()
    assert row.shape == (1, 0)


@pytest.mark.triton
def test_launches_are_decided_without_looking_at_values() -> None:
    with record_launches() as launches:
        kernels.rank_tokens(
            torch.empty(2, 2, 4, device="meta"), torch.empty(2, 8, 2, 4, device="meta"), 1.0, None, 0.0,
            torch.empty(2, 7, dtype=torch.int64, device="meta"), 3, 1,
        )  # fmt: skip
    assert [(launch.name, launch.grid) for launch in launches] == [("rank_tokens_kernel", (2,))]
