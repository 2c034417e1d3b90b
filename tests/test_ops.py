"""Every registered operator: schema and fakes hold, derivatives are those of finite differences."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import BACKENDS, DEVICE
from small import tiny
from torch import Tensor
from torch.library import opcheck

from smi_kernels import SparseViT, ops, tuning, use_backend
from smi_kernels.derivatives import DERIVATIVES
from smi_kernels.launch import count_launches
from smi_kernels.linear.reference import row_statistics

B, N, K, H, D, D_HEAD, OUT, C = 2, 5, 3, 2, 16, 8, 24, 3


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def integers(*rows: Any) -> Tensor:
    return torch.tensor(rows, device=DEVICE)


KEEP = integers([0, 2, 5], [1, 6, 7])
OFFSETS = integers([1, -2, 1], [0, 3, 0])


def samples(low: torch.dtype) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments of each operator; matrix operands in `low`."""
    wide = torch.promote_types(low, torch.float32)
    M = B * N

    def lo(*shape: int, seed: int = 0) -> Tensor:
        return normal(*shape, dtype=low, seed=seed)

    def wi(*shape: int, seed: int = 0) -> Tensor:
        return normal(*shape, dtype=wide, seed=seed)

    x = wi(M, D)
    stats, weight = row_statistics(x), lo(OUT, D)
    layer = (weight, weight.to(wide).sum(1), wi(OUT))
    moments = torch.stack((x.mean(1), x.var(1).rsqrt()), dim=1)
    images, norm = wi(B, C, 8, 16), wi(4, D_HEAD)
    sums, d_patches = wi(B, C, 9).abs(), wi(B, K, C * 16)
    counter, table = integers(1), integers([[1, 2, 0]], [[3, -1, 1]])
    slots = torch.full((B, 8), -1, dtype=torch.int32, device=DEVICE).scatter(
        1, KEEP, torch.arange(K, dtype=torch.int32, device=DEVICE).expand(B, K)
    )
    adam = {"step": 2, "lr": 0.1, "beta1": 0.5, "beta2": 0.99, "eps": 1e-8, "low": -wi(C).abs(), "high": wi(C).abs()}
    qkv, kv, query = lo(B, N, 3, H, D_HEAD), lo(B, N, 2, H, D_HEAD), lo(B, 1, H, D_HEAD)
    size, target = wi(B, N).abs() + 0.5, integers([0, 1, 1, 1, 2], [0, 1, 2, 2, 2])
    step = (4, adam["lr"], 0.5, 0.99, 1e-8)
    found: dict[str, list[tuple[Any, ...]]] = {
        "select_tokens": [(wi(B, K), KEEP, 2)],
        "rank_tokens": [(query[:, 0], lo(B, 1 + K, H, D_HEAD), 0.3, n, 1e-6, KEEP, 2, 1) for n in (None, norm)],
        "embed_tokens": [
            (images, keep, offsets, lo(D, C * 16), wi(8, D), wi(2, D), 4, 4, "ieee")
            for keep, offsets in ((KEEP, OFFSETS), (None, None), (KEEP, OFFSETS[:1]))
        ],
        "embed_tokens_dx": [(lo(B, 2 + K, D), lo(D, C * 16), 2, s, "ieee") for s in (None, wi(B))],
        "patches_to_pixels": [(d_patches, KEEP, OFFSETS, 8, 16, 4, 4)],
        "attention_row": [(query[:, 0], lo(B, H, N, D_HEAD), 0.3)],
        "attention": [(qkv, n, 1e-6, "ieee", s) for n, s in ((None, None), (norm, size))],
        "attention_dx": [
            (qkv, lo(B, N, D), n, 1e-6, wi(3 * D), wi(3 * D), "ieee", s) for n, s in ((None, None), (norm, size))
        ],
        "class_attention": [(query, kv, n, 1e-6, s) for n, s in ((None, None), (norm, size))],
        "class_attention_dx": [
            (query, kv, lo(B, 1, D), None, 1e-6, wi(D), wi(D), wi(2 * D), wi(2 * D), s) for s in (None, size)
        ],
        "match_tokens": [(qkv[:, :, 1], n, 1e-6, 1, 2) for n in (None, norm)],
        "merge_tokens": [(x, s, target, 3, low) for s in (None, size)],
        "merge_tokens_dx": [(wi(B * 3, D), s, target, wi(B, 3).abs() + 1, low) for s in (None, size)],
        "norm_linear": [(x.to(low), stats, *layer, 1e-6, out, "ieee") for out in (low, wide)],
        "norm_linear_gelu": [(x.to(low), stats, *layer, 1e-6, "ieee", kind) for kind in ("erf", "tanh", "sigmoid")],
        "linear_residual": [(lo(M, OUT), lo(D, OUT), wi(D), x, "ieee")],
        "linear_dx": [(lo(M, OUT), weight, wide, "ieee")],
        "linear_gelu_dx": [(lo(M, D), lo(D, OUT), lo(M, OUT), wi(OUT), wi(OUT), "ieee", "tanh")],
        "norm_linear_dx": [
            (lo(M, OUT), weight, wi(M, 3, 2), x.to(low), moments, wi(M, D), None, 1, 1, "ieee"),
            (lo(M, OUT), weight, wi(M, 3, 2), x.to(low), moments, wi(B, D), wi(B, D, seed=1), N, 1, "ieee"),
        ],
        "prior_sums": [(images,)],
        "prior_sums_dx": [(images, sums)],
        "prior_coefficients": [(sums, 0.1, 0.2, 0.3, 2, 8, 16)],
        "begin_step": [(counter, table, sums, 0.1, 0.2, 0.3, 1, 8, 16, 0.5, 0.99, h) for h in (None, wi(2, B, 3))],
        "pixel_step": [
            (images, wi(*images.shape), wi(*images.shape).square(), d_patches, direct, slots, OFFSETS, wi(B, 9), 1,
             wi(2).abs() + 0.1, *step[1:], adam["low"], adam["high"], frozen, 4, 4)
            for frozen, direct in ((True, None), (False, wi(*images.shape, seed=4)))
        ],
        "finish_prior_sums": [(images, wi(B, C, 8, 9), s) for s in (None, counter)],
        "cross_entropy_head": [
            (wi(1, B, 5), t, wi(1, 5), wi(1, 5), scale, low, h, s)
            for t, scale, h, s in ((integers(1, 4), None, None, None), (wi(B, 5).softmax(1), wi(B), wi(2, B), counter))
        ],
    }  # fmt: skip
    with_options = {name: [(args, {}) for args in several] for name, several in found.items()}
    moments_of = (wi(*images.shape, seed=1), wi(*images.shape, seed=2), wi(*images.shape, seed=3).square())
    with_options["adam_clamp_"] = [((images, *moments_of), adam)]
    return with_options


def test_every_operator_is_sampled() -> None:
    assert samples(torch.float32).keys() == ops.OPERATORS.keys()
    assert DERIVATIVES.keys() <= ops.OPERATORS.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_schema_and_fakes_hold(name: str, low: torch.dtype, backend: str) -> None:
    with use_backend(backend):
        for args, options in samples(low)[name]:
            clones = [a.clone() if isinstance(a, Tensor) else a for a in args]
            opcheck(
                getattr(torch.ops.smi, name).default, clones, options,
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(n for n, folder in ops.OPERATORS.items() if folder in ("attention", "linear")))
def test_results_are_contiguous_whatever_is_given_as_fakes_say(name: str, backend: str) -> None:
    """Of inputs that are dense, but in another order, and of heads of one column."""
    with use_backend(backend):
        for args, options in samples(torch.float64)[name]:
            moved = [a.mT.contiguous().mT if isinstance(a, Tensor) and a.ndim > 1 else a for a in args]
            opcheck(getattr(torch.ops.smi, name).default, moved, options, test_utils="test_faketensor")
        one = normal(B, N, 3, H, 1)
        of_one = {"attention": (one, None, 1e-6, "ieee"), "class_attention": (one[:, :2, 0], one[:, :, 1:], None, 1e-6)}
        if name in of_one:
            opcheck(getattr(torch.ops.smi, name).default, of_one[name], test_utils="test_faketensor")


def apart(value: Any) -> Any:
    """The same numbers, each with a neighbour behind it that does not belong."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    spread = torch.stack((value, torch.full_like(value, 3)), dim=-1).flatten(-2)
    return spread[..., ::2]


WRITTEN = {"adam_clamp_": (0, 2, 3), "pixel_step": (1, 2), "begin_step": (11,), "cross_entropy_head": (6,)}  # in place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_what_lies_apart_is_read_right(name: str, backend: str) -> None:
    """Every argument that is only read: weights, norms and scales too."""
    with use_backend(backend):
        for args, options in samples(torch.float64)[name]:
            spread = [a if place in WRITTEN.get(name, ()) else apart(a) for place, a in enumerate(args)]
            expected, found = (
                getattr(torch.ops.smi, name)(*copy.deepcopy(given), **options) for given in (list(args), spread)
            )
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def differentiable(name: str, args: tuple[Any, ...]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operator as a function of what it is differentiable in."""
    places = {"class_attention": (0, 1), "linear_residual": (0, 3)}.get(name, (0,))
    operator = getattr(torch.ops.smi, name)

    def function(*changed: Tensor) -> Any:
        full = list(args)
        for place, value in zip(places, changed, strict=True):
            full[place] = value
        if name.startswith("norm_linear"):
            full[1] = row_statistics(full[0].detach())
        out = operator(*full)
        if isinstance(out, Tensor):
            return out
        return tuple(part for part in out if part.requires_grad and part.numel())

    return function, [args[place].clone().requires_grad_(True) for place in places]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_derivatives_are_those_of_finite_differences(name: str, backend: str) -> None:
    with use_backend(backend):
        for args, _ in samples(torch.float64)[name]:
            function, inputs = differentiable(name, args)
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["attention", "class_attention"])
def test_of_no_images_there_is_a_gradient(name: str) -> None:
    function, inputs = differentiable(name, samples(torch.float32)[name][0][0])
    none = [value.detach()[:0].requires_grad_(True) for value in inputs]
    for value, grad in zip(none, torch.autograd.grad(function(*none).sum(), none), strict=True):
        assert grad.shape == value.shape


@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_second_derivatives_are_refused(name: str) -> None:
    """They would be left out of a sum with other terms, which has one."""
    function, inputs = differentiable(name, samples(torch.float32)[name][0][0])
    out = function(*inputs)
    first = (out if isinstance(out, Tensor) else out[0]).square().sum()
    with pytest.raises(RuntimeError, match=f"smi::{name} has no second derivative"):
        torch.autograd.grad(first, inputs, create_graph=True)


@pytest.mark.parametrize("name", ["attention", "norm_linear", "linear_residual", "embed_tokens"])
def test_low_precision_gradients_have_the_dtype_of_their_inputs(name: str) -> None:
    function, inputs = differentiable(name, samples(torch.float16)[name][0][0])
    out = function(*inputs)
    first = out if isinstance(out, Tensor) else out[0]
    for value, grad in zip(inputs, torch.autograd.grad(first.float().sum(), inputs), strict=True):
        assert grad.dtype == value.dtype and grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_the_backward_runs_on_the_backend_of_the_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, as autograd runs it on a GPU, and when the context is left."""
    ran: list[str] = []
    real = ops._implementation
    monkeypatch.setattr(ops, "_implementation", lambda folder, backend: ran.append(backend) or real(folder, backend))
    function, inputs = differentiable(name, samples(torch.float32)[name][0][0])
    with use_backend("reference"):
        out = function(*inputs)
    first = out if isinstance(out, Tensor) else out[0]
    ran.clear()
    thread = threading.Thread(target=lambda: first.sum().backward())
    thread.start()
    thread.join()
    assert ran and set(ran) == {"reference"} and all(value.grad is not None for value in inputs)


def in_a_thread(out: Tensor, caller: contextvars.Context | None = None) -> None:
    """The backward as autograd runs it on a GPU: in a thread that knows at most from where it was called."""

    def run() -> None:
        if caller is not None:
            torch._C._stash_obj_in_tls("context", caller)
        try:
            torch.autograd.Variable._execution_engine.run_backward(
                (out,), (torch.ones_like(out),), True, False, (), allow_unreachable=True, accumulate_grad=True
            )
        finally:
            if caller is not None:
                torch._C._remove_obj_from_tls("context")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
def test_in_a_thread_of_autograds_tiles_are_those_of_the_forward_and_launches_are_seen() -> None:
    function, inputs = differentiable("norm_linear", samples(torch.float32)["norm_linear"][0][0])
    images = torch.zeros(1, 3, 16, 16, device=DEVICE, requires_grad=True)
    vit = SparseViT.from_timm(tiny(depth=1).to(DEVICE))
    with use_backend("triton"), count_launches() as around, tuning.forcing(tuning.Tile(16, 64, 16, 4, 1)) as asked:
        outs = function(*inputs)[0], vit(images)
        for out, value, kernel in zip(outs, (inputs[0], images), ("norm_linear_dx", "embed_tokens_dx"), strict=True):
            before = len(around)
            del asked[:]
            in_a_thread(out)
            assert value.grad is not None and value.grad.abs().sum() > 0
            assert any(kernel in launch.name for launch in around[before:])
            assert any(shape.startswith(kernel) for shape in asked)
    if not hasattr(torch._C, "_remove_obj_from_tls"):
        return  # a PyTorch whose threads cannot tell who called
    before = len(around)
    for out in outs:
        with count_launches() as seen:
            caller = contextvars.copy_context()
        in_a_thread(out, caller)
        assert seen and len(around) == before  # not seen by who saw the forward
        assert all(launch.args["BLOCK_M"] == 16 for launch in seen if "norm_linear_dx" in launch.name)
