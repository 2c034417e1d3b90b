"""Losses of the caller's in `PixelDescent`: against autograd, and how graphs go through or around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import DEVICE
from rehearsal import Rehearsal
from small import one_thread, tiny  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

import smi_kernels
from smi_kernels import PixelDescent, SparseViT, use_backend
from smi_kernels.graphs import NoWaiting
from smi_kernels.profiling import record_operations

T, UNROLL = 11, 3
WEIGHTS = {"cross_entropy": 0.5, "tv1": 0.1, "tv2": 0.2, "l2": 0.05}
ADAM = {"learning_rate": 0.05, "beta1": 0.5, "beta2": 0.99, "eps": 1e-4}
KEEP = torch.tensor([[0, 3, 5, 6, 9, 15], [1, 2, 4, 8, 10, 11], [0, 1, 7, 12, 13, 14]], device=DEVICE)
TARGETS = torch.tensor([0, 3, 1], device=DEVICE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def table() -> Tensor:
    drawn = torch.randint(-5, 6, (T, 3, 3), generator=torch.Generator().manual_seed(3))
    drawn[..., 2] = drawn[..., 2] > 0
    return drawn.to(DEVICE)


def everything(images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
    """Of pixels, logits, augmentation and iteration, and one that mixes images."""
    seen = smi_kernels.augment(images, offsets)[:, :, :5].square().mean()
    mixed = (logits.softmax(1) * logits.flip(0).log_softmax(1)).sum()
    return 3 * seen - 0.3 * mixed * (1 + step[0]) + images.mean((2, 3)).square().sum()


Loss = Callable[..., Tensor]
BOUNDS = {"low": torch.full((3,), -1.5), "high": torch.full((3,), 1.5)}


def descent(loss: Loss | None, precision: Any = "fp32", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    vit = SparseViT.from_timm(tiny().to(DEVICE, dtype), precision)
    images = normal(3, 3, 16, 16).to(vit.weights.wide)
    bounds = {name: bound.to(images) for name, bound in BOUNDS.items()}
    options = {**WEIGHTS, **ADAM, "group": 2, "frozen": False, "unroll": UNROLL, **options}
    return PixelDescent(vit, images, TARGETS, table(), **bounds, loss=loss, **options)


def run(one: Any) -> dict[str, Tensor]:
    """Five iterations, a pruning, the rest in two goes."""
    with use_backend("reference"):
        one.advance(5)
        one.prune(KEEP)
        one.advance(5)
        one.advance(T - 10)
    assert one.iteration == T and one._step.item() == T
    names = ("images", "exp_avg", "exp_avg_sq", "cross_entropies", "priors")
    return {name: getattr(one, name).clone() for name in names}


def by_autograd(loss: Loss) -> dict[str, Tensor]:
    """The same with torch.optim.Adam on a sum of public functions."""
    vit = SparseViT.from_timm(tiny().double().to(DEVICE))
    images = torch.nn.Parameter(normal(3, 3, 16, 16))
    adam = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.99), eps=1e-4)
    entropies = []
    for t, offsets in enumerate(table()):
        logits = vit(images, KEEP if t >= 5 else None, offsets)
        each = F.cross_entropy(logits, TARGETS, reduction="none")
        total = 0.5 * (each[:2].mean() + each[2]) + loss(images, logits, offsets, torch.tensor([t], device=DEVICE))
        for part in images.split(2):
            total = total + 0.1 * smi_kernels.tv_l1(part, per_image=False)
            total = total + 0.2 * smi_kernels.tv_l2(part, per_image=False)
            total = total + 0.05 * smi_kernels.l2_norm(part, per_image=False)
        (images.grad,) = torch.autograd.grad(total, images)
        adam.step()
        with torch.no_grad():
            images.clamp_(-1.5, 1.5)
        entropies.append(each.detach())
    return {"images": images.detach(), "cross_entropies": torch.stack(entropies)}


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def switch_on(one: Any, *more: Tensor) -> Any:
        monkeypatch.setattr("smi_kernels.descent.Graph", Rehearsal)
        state = [value for value in vars(one).values() if isinstance(value, Tensor)]
        monkeypatch.setattr(Rehearsal, "tensors", staticmethod(lambda: [*state, *more]), raising=False)
        monkeypatch.setattr(Rehearsal, "made", [])
        one.in_graphs = True
        return one

    return switch_on


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_loss_is_added_to_what_is_built_in() -> None:
    found, expected = run(descent(everything)), by_autograd(everything)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
    assert not torch.allclose(found["images"], run(descent(None))["images"], atol=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        lambda images, logits, offsets, step: logits.square().sum(),
        lambda images, logits, offsets, step: images.sum(),
        lambda images, logits, offsets, step: images.new_ones(()),
    ],
    ids=["logits", "images", "neither"],
)
def test_a_loss_may_leave_out_what_it_is_given(loss: Loss, with_graphs: Callable[..., Any]) -> None:
    found, expected = run(descent(loss)), by_autograd(loss)
    torch.testing.assert_close(found["images"], expected["images"], rtol=0, atol=1e-9)
    assert same(run(with_graphs(descent(loss, around_loss="it was said"))), found)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-9), ("bf16", 3e-2), ("fp16", 3e-3)])
def test_cross_entropy_as_a_loss_is_the_one_that_is_built_in(precision: Any, tolerance: float) -> None:
    """Also where it is so small that float16 has no such numbers; its history is kept either way."""
    dtype = torch.float64 if precision == "fp32" else torch.float32

    def entropy(images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
        return 1e-9 * F.cross_entropy(logits, TARGETS, reduction="sum")

    options: dict[str, Any] = {"tv1": 0.0, "tv2": 0.0, "l2": 0.0, "group": 1, "eps": 1e-13}
    ours = descent(None, precision, dtype, cross_entropy=1e-9, **options)
    theirs = descent(entropy, precision, dtype, cross_entropy=0.0, **options)
    with use_backend("reference"):
        ours.advance(1)
        theirs.advance(1)
    scale = ours.exp_avg.abs().max()
    assert scale > 0 and theirs.exp_avg.isfinite().all()
    torch.testing.assert_close(theirs.exp_avg / scale, ours.exp_avg / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(theirs.cross_entropies[:1], ours.cross_entropies[:1])


def test_on_kernels() -> None:
    """Two iterations, pruned; the kernels' are those of the reference."""
    found = {}
    for backend in ("reference", "triton"):
        one = descent(everything)
        one.prune(KEEP)
        with use_backend(backend):
            one.advance(2)
        found[backend] = one.images
    torch.testing.assert_close(found["triton"], found["reference"], rtol=0, atol=1e-9)


def test_images_that_may_meet_are_not_split() -> None:
    with pytest.raises(ValueError, match="micro_batch is 2; expected None or 3, because images may meet"):
        descent(everything, micro_batch=2)
    descent(everything, micro_batch=3)


def test_inference_mode_is_refused_where_a_loss_needs_autograd() -> None:
    """Nothing requires a gradient there, as if the loss depended on nothing."""
    one = descent(everything)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"no gradient under torch.inference_mode"):
        one.advance(1)
    with torch.inference_mode():
        descent(None).advance(1)


def test_no_images_are_iterated_too() -> None:
    vit = SparseViT.from_timm(tiny().to(DEVICE))
    none, bounds = torch.empty(0, 3, 16, 16, device=DEVICE), {name: bound.to(DEVICE) for name, bound in BOUNDS.items()}
    one = PixelDescent(vit, none, TARGETS[:0], table()[:, :1], **bounds)
    one.advance(2)
    one.prune(KEEP[:0])
    one.advance(1)
    assert one.images.shape == none.shape and one.iteration == one._step.item() == 3


@pytest.mark.parametrize("option", ["micro_batch", "unroll"])
def test_sizes_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is 0; expected at least 1"):
        descent(None, **{option: 0})


def test_factors_of_the_learning_rate_are_where_the_images_are() -> None:
    with pytest.raises(ValueError, match="lr_factors is on meta, the images are on"):
        descent(None, lr_factors=torch.ones(len(table()), dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("in_graphs", [False, True])
def test_images_that_somebody_wrote_to_are_measured_anew(in_graphs: bool, with_graphs: Callable[..., Any]) -> None:
    one = descent(None, group=1)
    if in_graphs:
        with_graphs(one)
    with use_backend("reference"), record_operations() as operations:
        one.advance(UNROLL + 1)
        one.advance(1)
        assert "prior_sums" not in {operation.name for operation in operations}  # as long as nobody does
        for written in (lambda: one.images.mul_(0.5), lambda: one.images[0].zero_(), lambda: one.images.fill_(0.7)):
            written()
            now, t = one.images.clone(), one.iteration
            one.advance(1)
            norms = (smi_kernels.tv_l1, smi_kernels.tv_l2, smi_kernels.l2_norm)
            expected = torch.stack([norm(now, per_image=True) for norm in norms], dim=1)
            torch.testing.assert_close(one.priors[t], expected, rtol=0, atol=1e-9)


def test_a_state_holds_the_sums_of_images_that_somebody_wrote_to() -> None:
    one, other = descent(None), descent(None)
    with use_backend("reference"):
        one.advance(2)
        one.images.mul_(0.5)
        other.load_state_dict(one.state_dict())
        for each in (one, other):
            each.advance(1)
    assert torch.equal(one.images, other.images) and torch.equal(one.priors[2], other.priors[2])


def test_a_state_of_all_patches_undoes_a_pruning() -> None:
    one, other = descent(None), descent(None)
    with use_backend("reference"):
        other.prune(KEEP)
        other.load_state_dict(one.state_dict())
        for each in (one, other):
            each.advance(2)
    assert torch.equal(one.images, other.images) and other.keep is None


# --- graphs ---


def test_a_graph_ends_with_the_merging_it_was_made_for(with_graphs: Callable[..., Any]) -> None:
    one = with_graphs(descent(None))
    with use_backend("reference"):
        for merge_to, iterations, made in ((None, 1 + UNROLL, 1), (None, UNROLL, 1), (0.5, 1 + UNROLL, 2)):
            one.vit.merge_to = merge_to
            one.advance(iterations)  # of other shapes the first runs before the rest is captured
            assert Rehearsal.made == ["_unrolled"] * made


def test_what_can_be_captured_is_captured_whole(with_graphs: Callable[..., Any]) -> None:
    history = torch.full((T,), torch.nan, dtype=torch.float64, device=DEVICE)

    def remembered(images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
        value = everything(images, logits, offsets, step)
        history.index_copy_(0, step, value.detach().view(1))
        return value

    expected = run(descent(remembered))
    expected_history = history.clone()
    history.fill_(torch.nan)
    one = with_graphs(descent(remembered), history)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(one)
    assert same(found, expected) and torch.equal(history, expected_history) and history.isfinite().all()
    assert Rehearsal.made == ["_unrolled", "_unrolled"] and one.around_loss == ""


def waits(images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
    return everything(images, logits, offsets, step) * (2.0 if logits.detach().sum().item() > 0 else 1.0)


def reads_the_host(images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
    if Rehearsal.capturing:
        raise KeyError("a number\nof the host")
    return everything(images, logits, offsets, step)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(waits, r"RuntimeError: aten\._local_scalar_dense.* wait for the device"), (reads_the_host, "KeyError: ")],
    ids=["waits", "reads the host"],
)
def test_what_cannot_be_captured_runs_between_two_graphs(
    loss: Loss, reason: str, with_graphs: Callable[..., Any]
) -> None:
    expected = run(descent(loss))
    one = with_graphs(descent(loss))
    with pytest.warns(
        UserWarning, match=rf"cannot be captured, so it runs between two CUDA graphs \({reason}"
    ) as notes:
        found = run(one)
    assert same(found, expected)
    assert len(notes) == 1 and one.around_loss in str(notes[0].message)
    assert Rehearsal.made == ["feed", "move"] * 2  # before and after pruning, without another try


def test_what_must_not_be_captured_is_not_tried(with_graphs: Callable[..., Any]) -> None:
    seen: list[bool] = []

    def counted(*args: Tensor) -> Tensor:
        seen.append(Rehearsal.capturing)
        return len(seen) * everything(*args)

    expected = run(descent(counted))
    seen.clear()
    one = with_graphs(descent(counted, around_loss="it counts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(one)
    assert same(found, expected) and seen == [False] * T
    assert one.around_loss == "it counts"


@pytest.mark.parametrize("first", ["logits", "pixels", "nothing"])
def test_graphs_around_a_loss_hold_what_was_launched_before(
    first: str, with_graphs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA loads no kernel while it captures, and with and without a further gradient the pixel step's is another."""
    terms: dict[str, Loss] = {
        "logits": lambda images, logits, *_: logits.square().sum(),
        "pixels": lambda images, logits, *_: images.square().sum(),
        "nothing": lambda images, logits, *_: torch.zeros((), dtype=images.dtype, device=images.device),
        "both": everything,
    }
    done = 0

    def changing(*args: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return terms[first if done < 5 else "both"](*args)

    expected = run(descent(changing))
    done = 0
    one = with_graphs(descent(changing, around_loss="it changes"))
    launched: set[tuple[bool, bool]] = set()
    move = one._move

    def watched(images: Tensor, fed: Any, d_logits: Tensor | None, d_images: Tensor | None) -> Any:
        variant = d_logits is not None, d_images is not None
        if Rehearsal.capturing:
            assert variant in launched
        launched.add(variant)
        return move(images, fed, d_logits, d_images)

    monkeypatch.setattr(one, "_move", watched)
    assert same(run(one), expected)
    assert len(launched) == 2 and "move" in Rehearsal.made


def test_a_loss_that_fails_costs_no_iteration(with_graphs: Callable[..., Any]) -> None:
    calls: list[int] = []

    def failing(*args: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return everything(*args)

    expected = run(descent(everything))
    one = with_graphs(descent(failing, around_loss="it fails"))
    with use_backend("reference"), pytest.raises(ZeroDivisionError):
        one.advance(5)
    assert one.iteration == 3 and one._step.item() == 3
    with use_backend("reference"):
        one.advance(2)
        one.prune(KEEP)
        one.advance(6)
    assert torch.equal(one.images, expected["images"])


def test_without_a_loss_a_failing_capture_is_an_error(
    with_graphs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = with_graphs(descent(None, around_loss="there is none"))
    assert one.around_loss == ""

    def spoilt(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("smi_kernels.descent.Graph", spoilt)
    with use_backend("reference"), pytest.raises(MemoryError, match="no room"):
        one.advance(5)


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "move": lambda x: x.to("meta"),
}
NOT_WAITING: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda x: x[torch.arange(2, device=x.device), torch.zeros(2, dtype=torch.int64, device=x.device)],
    "row": lambda x: x[0],
    "cast": lambda x: x.float().double(),
    "same device": lambda x: x.float().to(x.device),
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("what", [*WAITING, *NOT_WAITING])
def test_waiting_is_noticed(what: str) -> None:
    x = normal(2, 3)
    with NoWaiting():
        if what in NOT_WAITING:
            NOT_WAITING[what](x)
        else:
            with pytest.raises(RuntimeError, match="needs the host to wait"):
                WAITING[what](x)
