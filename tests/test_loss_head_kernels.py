"""The cross-entropy head: hand-computed, against autograd of PyTorch's own loss, and kernel against reference."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import DEVICE, Kernels, error, launched, poisoned, within_budget
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.launch import count_launches
from smi_kernels.loss_head import reference

kernels = Kernels("loss_head")

BOTH = [lambda *args: kernels.cross_entropy_head(*args), reference.cross_entropy_head]
NAMES = ["kernel", "reference"]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def inputs(R: int, B: int, classes: int, soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, targets, column sums, biases and gradient scales, in float64."""
    targets = random(B, classes, seed=1).softmax(1) if soft else random(B, classes, seed=1).argmax(1)
    scale = 1 + random(B, seed=4).abs()
    return 2 * random(R, B, classes), targets, random(R, classes, seed=2), random(R, classes, seed=3), scale


def to(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


@pytest.mark.parametrize("head", BOTH, ids=NAMES)
def test_by_hand(head: object) -> None:
    """Logits (log 3, 0): probabilities 3/4 and 1/4, of which the first is the target."""
    logits = torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64, device=DEVICE)
    colsum = torch.tensor([[2.0, 10.0]], dtype=torch.float64, device=DEVICE)
    bias = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=DEVICE)
    target = torch.tensor([0], device=DEVICE)
    loss, d_logits, dstats = head(logits, target, colsum, bias, None, torch.float64)  # type: ignore[operator]
    assert loss.tolist() == pytest.approx([math.log(4 / 3)])
    assert d_logits.tolist()[0] == pytest.approx([-0.25, 0.25])
    assert dstats.shape == (1, 1, 1, 2)
    assert dstats.flatten().tolist() == pytest.approx([2.0, -0.25 * math.log(3.0) - 0.25])


@pytest.mark.parametrize("head", BOTH, ids=NAMES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("R", "B", "classes"), [(1, 3, 5), (2, 2, 5), (1, 1, 2), (3, 2, 17)])
def test_agrees_with_autograd(R: int, B: int, classes: int, soft: bool, scaled: bool, head: object) -> None:
    logits, targets, colsum, bias, scale = inputs(R, B, classes, soft)
    with poisoned():
        loss, d_logits, dstats = head(  # type: ignore[operator]
            logits, targets, colsum, bias, scale if scaled else None, torch.float64
        )
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf.sum(0), targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * (scale if scaled else 1.0)).sum(), leaf)
    assert error(loss, expected) < 1e-14
    for r in range(R):
        assert error(d_logits, gradient[r]) < 1e-14
        assert error(dstats[r, :, 0, 0], (gradient[r] * colsum[r]).sum(1)) < 1e-13
        assert error(dstats[r, :, 0, 1], (gradient[r] * (logits[r] - bias[r])).sum(1)) < 1e-13


def check_budget(low: torch.dtype, *exactly: Tensor) -> None:
    """Loss and gradient near the truth; the row sums near those of the gradient as it was stored."""
    given = to(torch.float32, *exactly)
    logits, _, colsum, bias, _ = (tensor.double() for tensor in given)
    with poisoned(), count_launches() as launches:
        ours = kernels.cross_entropy_head(*given, low)
    assert [launch.name for launch in launches] == launched(["cross_entropy_head_kernel"])
    plain = reference.cross_entropy_head(*given, low)
    exact = reference.cross_entropy_head(*to(torch.float64, *given), torch.float64)
    assert [t.dtype for t in ours] == [t.dtype for t in plain] == [torch.float32, low, torch.float32]
    # Interpreted kernels cut float32 off to bfloat16 where GPUs round: twice the error.
    factor = 2.5 if low == torch.bfloat16 and DEVICE == "cpu" else 1.5
    assert within_budget(ours[0], plain[0], exact[0])
    assert within_budget(ours[1], plain[1], exact[1], factor=factor)
    stored = ours[1].double()
    sums = ((stored * colsum[:, None]).sum(2), (stored * (logits - bias[:, None])).sum(2))
    assert error(ours[2][:, :, 0], torch.stack(sums, dim=2)) < 1e-6


@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("R", [1, 2])
def test_low_precision_within_budget(R: int, soft: bool, low: torch.dtype) -> None:
    check_budget(low, *inputs(R, 3, 29, soft))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [1000, 2049, 5000])
def test_many_classes(classes: int, soft: bool) -> None:
    check_budget(torch.float32, *inputs(2, 1, classes, soft))


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(sign: int) -> None:
    logits = torch.zeros(1, 3, 5, device=DEVICE)
    logits[0, 0, 2] = sign * 1e4  # certain and right, or certain and wrong
    logits[0, 1] = sign * 1e4  # all alike
    logits[0, 2, 0], logits[0, 2, 2] = -float("inf"), 3.0
    targets = torch.full((3,), 2, device=DEVICE)
    nothing = torch.zeros(1, 5, device=DEVICE)
    loss, d_logits, dstats = kernels.cross_entropy_head(logits, targets, nothing, nothing, None, torch.float32)
    expected = F.cross_entropy(logits[0].double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_logits[1], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2], device=DEVICE))
    assert d_logits[2, 0] == 0
    if sign == 1:
        assert torch.equal(d_logits[0], torch.zeros(5, device=DEVICE)) and dstats[0, 0].eq(0).all()


def test_a_block_of_minus_infinity_first_leaves_the_rest() -> None:
    logits = torch.full((1, 1, 2050), -float("inf"), device=DEVICE)
    logits[0, 0, 2048:] = torch.tensor([1.0, 1.0])
    folded = torch.zeros(1, 2050, device=DEVICE)
    target = torch.tensor([2049], device=DEVICE)
    loss, d_logits, _ = kernels.cross_entropy_head(logits, target, folded, folded, None, torch.float32)
    assert float(loss) == pytest.approx(math.log(2))
    assert d_logits[0, 2048:].tolist() == [0.5, -0.5] and d_logits[0, :2048].eq(0).all()


@pytest.mark.parametrize("head", BOTH, ids=NAMES)
@pytest.mark.parametrize("R", [1, 2])
def test_classes_that_a_bias_of_minus_infinity_switches_off_are_as_if_they_were_not(R: int, head: object) -> None:
    logits, targets, colsum, bias, scale = inputs(R, 2, 7, False)
    logits[..., 5:], bias[..., 5:] = -torch.inf, -torch.inf
    targets = targets.remainder(5)
    expected = head(logits[..., :5], targets, colsum[:, :5], bias[:, :5], scale, torch.float64)  # type: ignore[operator]
    loss, d_logits, dstats = head(logits, targets, colsum, bias, scale, torch.float64)  # type: ignore[operator]
    torch.testing.assert_close((loss, d_logits[:, :5], dstats), expected)
    assert not d_logits[:, 5:].any()


@pytest.mark.parametrize("head", BOTH, ids=NAMES)
def test_history_takes_the_loss_at_the_step_and_nothing_else(head: object) -> None:
    logits, targets, colsum, bias, scale = to(torch.float32, *inputs(1, 3, 5, False))
    history = torch.full((3, 4), 7.0, device=DEVICE)[:, :3]
    step = torch.tensor([1], device=DEVICE)
    loss, _, _ = head(logits, targets, colsum, bias, scale, torch.float32, history, step)  # type: ignore[operator]
    assert torch.equal(history[1], loss)
    assert history[[0, 2]].eq(7).all()


def test_a_step_beyond_the_history_writes_nothing() -> None:
    logits, targets, colsum, bias, _ = to(torch.float32, *inputs(1, 2, 5, False))
    memory = torch.full((4, 2), 7.0, device=DEVICE)
    kernels.cross_entropy_head(
        logits, targets, colsum, bias, None, torch.float32, memory[:2], torch.tensor([2], device=DEVICE)
    )
    assert memory.eq(7).all()


def test_no_images() -> None:
    none, folded = torch.empty(0, dtype=torch.int64, device=DEVICE), random(2, 5)
    loss, d_logits, dstats = kernels.cross_entropy_head(random(2, 0, 5), none, folded, folded, None, torch.float16)
    assert [loss.shape, d_logits.shape, dstats.shape] == [(0,), (0, 5), (2, 0, 1, 2)]


def test_strided_inputs_and_the_same_bits_twice() -> None:
    logits, targets, colsum, bias, scale = to(torch.float32, *inputs(2, 3, 7, True))
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    soft = targets.T.contiguous().T
    assert not strided.is_contiguous() and not soft.is_contiguous()
    expected = kernels.cross_entropy_head(logits, targets, colsum, bias, scale, torch.bfloat16)
    for _ in range(2):
        found = kernels.cross_entropy_head(strided, soft, colsum, bias, scale, torch.bfloat16)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
