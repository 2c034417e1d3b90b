"""`SparseViT` against timm's own forward and autograd, on references and on interpreted kernels."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels import BACKENDS, DEVICE, error, poisoned
from small import CLASSES, N, randomise, tiny
from timm.layers import GluMlp, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from smi import SparseModel, with_text_head
from smi_kernels import SparseViT, use_backend
from smi_kernels.folding import unsupported_reasons
from smi_kernels.launch import count_launches, record_launches
from smi_kernels.profiling import record_operations
from smi_kernels.vit import Trace

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale, qk norm": {"init_values": 0.1, "qk_norm": True},
    "registers, apart from positions": {"reg_tokens": 3, "no_embed_class": True},
    "mean of patches": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "no head, no qkv bias": {"num_classes": 0, "qkv_bias": False},
    "odd widths": {"embed_dim": 72, "num_heads": 3, "mlp_ratio": 2.5, "depth": 3},
    "norm before the blocks": {"pre_norm": True},
    "norm of tokens, then their mean": {"global_pool": "avg", "fc_norm": False, "pre_norm": True},
    "mean of all tokens": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "attention pooling, not of prefix": {"global_pool": "map", "reg_tokens": 2},
    "attention pooling, of prefix": {"global_pool": "map", "pool_include_prefix": True, "num_classes": 0},
    "tanh GELU": {"act_layer": "gelu_tanh", "global_pool": "map", "depth": 1},
    "quick GELU": {"act_layer": "quick_gelu"},
    "SwiGLU": {"mlp_layer": SwiGLUPacked, "act_layer": "silu", "mlp_ratio": 5.0},
    "texts": {"num_classes": 70, "depth": 1},
    "texts of an attention pooling": {"global_pool": "map", "num_classes": 0, "embed_dim": 72, "num_heads": 3},
    "not square, patch 2 x 3": {"img_size": (8, 12), "patch_size": (2, 3)},
}
QUERY_KEY_NORM = "qk_norm" in inspect.signature(Eva).parameters
EVA = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
ROTARY: dict[str, dict[str, Any]] = {
    "turned neighbours": {"rope_type": "cat", "init_values": 0.1},
    "turned halves": {"rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 2, "use_abs_pos_emb": False},
    "turned apart in every head": {"rope_type": "mixed", "attn_type": "rope", "qkv_bias": False},
    "turned, attention pooling": {"global_pool": "map", "use_pre_transformer_norm": True},
    "turned, no class token": {"global_pool": "avg", "class_token": False},
}


def build(variant: str) -> Any:
    if variant == "turned apart in every head" and not QUERY_KEY_NORM:
        pytest.skip("this timm's mixed rotary embeddings fail in float64")
    if variant in ROTARY:
        return randomise(Eva(**EVA, **{"use_rot_pos_emb": True, **ROTARY[variant]})).double().to(DEVICE)
    options = VARIANTS[variant]
    model = tiny(**options)
    if variant.startswith("texts"):
        embeddings = torch.randn(CLASSES, model.num_classes or 72, generator=torch.Generator().manual_seed(3))
        model = with_text_head(model, embeddings, logit_scale=4.0, bias=-1.0)
    return model.double().to(DEVICE)


def distilled() -> Any:
    model = VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES
    )
    return randomise(model).double().to(DEVICE)


def pixels(model: Any, B: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, height, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def some_patches(B: int, K: int, of: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(of, generator=generator)[:K].sort().values for _ in range(B)]).to(DEVICE)


def gradient(network: Any, images: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the images' gradient of a sum of them with uneven weights."""
    images = images.detach().clone().requires_grad_(True)
    logits = network(images, *args, **options)
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype, device=logits.device).sin()
    (grad,) = torch.autograd.grad((logits * weights).sum(), images)
    return logits.detach(), grad


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if DEVICE == "cuda" and request.param == "triton":
        with use_backend("auto"):
            yield request.param
    else:
        with use_backend(request.param):
            yield request.param


@pytest.mark.parametrize("variant", [*VARIANTS, *ROTARY, "distilled"])
def test_all_patches_give_timms_logits_and_gradient(variant: str, backend: str) -> None:
    model = distilled() if variant == "distilled" else build(variant)
    vit = SparseViT.from_timm(model)
    expected_logits, expected_grad = gradient(model, pixels(model))
    with poisoned():
        logits, grad = gradient(vit, pixels(model))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("K", [1, 7, 16])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize(
    "variant",
    ["plain", "registers, apart from positions", "no class token", "distilled", "turned apart in every head"],
)
def test_kept_patches_under_jitter_are_those_of_the_augmented_image(
    variant: str, per_image: bool, K: int, backend: str
) -> None:
    """Against timm's own modules, fed the same cells of the same augmented image by the adapter."""
    model = distilled() if variant == "distilled" else build(variant)
    keep = some_patches(2, K, N)
    jitter = torch.tensor([[3, -5, 1], [-2, 1, 0]], device=DEVICE)[: 2 if per_image else 1]
    twin = SparseModel(model)
    expected = gradient(lambda x: twin.feed(x, keep, jitter)[0], pixels(model))
    found = gradient(SparseViT.from_timm(model), pixels(model), keep, jitter)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if K == 1:  # what no patch reads has no gradient at all
        assert (found[1] == 0).sum() == 2 * 3 * 15 * 16


def test_all_patches_under_jitter_are_turned_where_they_lie(backend: str) -> None:
    model, jitter = build("turned neighbours"), torch.tensor([[4, -8, 1]], device=DEVICE)
    expected = gradient(lambda x: SparseModel(model, backend="reference").feed(x, None, jitter)[0], pixels(model))
    found = gradient(SparseViT.from_timm(model), pixels(model), None, jitter)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["layer scale, qk norm", "distilled", "turned neighbours", "turned halves"])
def test_class_attention_is_the_last_blocks(variant: str, backend: str) -> None:
    model = distilled() if variant == "distilled" else build(variant)
    keep = some_patches(2, 9, N)
    _, expected = SparseModel(model).feed(pixels(model), keep, None, scores=True)
    _, scores = SparseViT.from_timm(model)(pixels(model), keep, class_attention=True)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


def test_mean_pooled_models_rank_by_their_class_token_too(backend: str) -> None:
    model = build("mean of patches")
    twin = SparseModel(model, ranking="class_attention")
    _, expected = twin.feed(pixels(model), None, None, scores=True)
    _, scores = SparseViT.from_timm(model)(pixels(model), class_attention=True)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


POOLED = {
    "no class token": "received_attention",
    "norm of tokens, then their mean": "class_attention",
    "attention pooling": "attention_pool",
    "attention pooling, not of prefix": "attention_pool",
    "attention pooling, of prefix": "attention_pool",
    "turned, no class token": "received_attention",
}


@pytest.mark.parametrize("variant", POOLED)
def test_other_rankings(variant: str, backend: str) -> None:
    model, keep = build(variant), some_patches(2, 9, N)
    twin, vit = SparseModel(model, backend="reference"), SparseViT.from_timm(model)
    assert vit.ranking == twin.info.ranking == POOLED[variant]
    _, expected = twin.feed(pixels(model), keep, None, scores=True)
    _, scores = vit(pixels(model), keep, class_attention=True)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    chosen, again = vit.rank(vit.run(pixels(model), keep, None), keep, 4)
    assert torch.equal(again, scores)
    for row, kept, by in zip(chosen, keep, expected, strict=True):
        assert row.tolist() == sorted(kept[by.argsort(descending=True)[:4]].tolist())


def test_received_attention_of_normed_queries_and_keys(backend: str) -> None:
    model = tiny(class_token=False, global_pool="avg", qk_norm=True).double().to(DEVICE)
    _, expected = SparseModel(model, backend="reference").feed(pixels(model), None, None, scores=True)
    _, scores = SparseViT.from_timm(model)(pixels(model), class_attention=True)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_error_is_within_that_of_eager_pytorch(precision: Any, backend: str) -> None:
    """At the same precision, against float64; few numbers, so 1.5 times it in 16 bits and twice in float32."""
    _within_eager(tiny(embed_dim=64, depth=3, num_heads=2).to(DEVICE), precision, backend)


def test_error_of_other_parts_is_too(backend: str) -> None:
    model = tiny(embed_dim=32, num_classes=32, pre_norm=True, global_pool="map", class_token=False)
    embeddings = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(3))
    _within_eager(with_text_head(model, embeddings, logit_scale=4.0).to(DEVICE), "bf16", backend)


def _within_eager(model: Any, precision: Any, backend: str) -> None:
    keep, images = some_patches(4, 7, N), pixels(model, 4, torch.float32)
    found = gradient(SparseViT.from_timm(model, precision), images, keep)
    assert found[0].dtype == found[1].dtype == torch.float32
    twin = SparseModel(model, backend="reference")
    exact = gradient(SparseViT.from_timm(model.double()), images.double(), keep)
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(DEVICE, cast, enabled=cast is not None):
        eager = gradient(lambda x: twin.feed(x, keep, None)[0], images)
    factor = 1.5 if cast else 2.0
    if precision == "bf16" and DEVICE == "cpu" and backend == "triton":
        factor = 4.0  # the interpreter cuts off where a GPU rounds
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        floor = 8e-3 if precision == "tf32" else 0.0  # eager runs in IEEE float32; emulated, TF32 errs by 4e-3 here
        assert error(ours, truth) <= factor * error(theirs, truth) + floor
        assert F.cosine_similarity(ours.flatten().double(), truth.flatten(), dim=0) > 0.999


def test_tiny_and_huge_gradients_survive_float16(backend: str) -> None:
    model = tiny(embed_dim=64).to(DEVICE)
    vit, images = SparseViT.from_timm(model, "fp16"), pixels(model, dtype=torch.float32).requires_grad_(True)
    plain, small, large = (torch.autograd.grad(s * vit(images)[:, 0].sum(), images)[0] for s in (1, 2**-40, 2**40))
    assert torch.equal(small * 2**40, plain) and torch.equal(large / 2**40, plain) and plain.abs().max() > 0
    zero = torch.autograd.grad(0 * vit(images).sum(), images)[0]
    assert (zero == 0).all()


@pytest.mark.parametrize("variant", ["plain", "distilled"])
def test_classes_that_are_switched_off_leave_the_gradient_of_the_others(variant: str, backend: str) -> None:
    model = distilled() if variant == "distilled" else build(variant)
    model.head.bias.data[1] = -torch.inf
    vit, targets = SparseViT.from_timm(model), torch.tensor([0, 2], device=DEVICE)
    images = pixels(model).requires_grad_(True)
    expected, found = (
        torch.autograd.grad(F.cross_entropy(network(images), targets), images)[0] for network in (model.eval(), vit)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rotary_embeddings_in_16_bits_and_computed_again(backend: str) -> None:
    model: Any = Eva(**{**EVA, "embed_dim": 32}, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True)
    model = randomise(model).to(DEVICE)
    _within_eager(model, "bf16", backend)
    if backend != "triton" or DEVICE != "cpu":
        model, keep = model.float(), some_patches(2, 7, N)
        images = pixels(model, dtype=torch.float32)
        plans = [gradient(SparseViT.from_timm(model, memory=memory), images, keep) for memory in ("fast", "small")]
        assert torch.equal(plans[0][1], plans[1][1])


def test_angles_that_all_blocks_share_are_gathered_once_on_either_way() -> None:
    for depth in (2, 4):
        model = randomise(Eva(**{**EVA, "depth": depth}, use_rot_pos_emb=True, rope_type="cat")).to(DEVICE)
        vit, images = SparseViT.from_timm(model), pixels(model, dtype=torch.float32)
        keep = some_patches(2, 7, N)
        with use_backend("reference"), torch.profiler.profile() as profiled:
            trace = vit.run(images, keep, None)
            vit.backward_of(trace, torch.ones_like(trace.parts[0]))
        gathered = [event for event in profiled.events() if event.name == "aten::index"]
        assert len(gathered) == 2 + 1  # and the reference's kept patches


@pytest.mark.parametrize(
    "options",
    [{"embed_dim": 64, "depth": 3}, {"pre_norm": True, "global_pool": "map", "reg_tokens": 1}],
    ids=["plain", "pool"],
)
def test_small_memory_plan_computes_again_and_gets_the_same_bits(options: dict[str, Any], backend: str) -> None:
    model = tiny(**options).to(DEVICE)
    images, keep = pixels(model, dtype=torch.float32), some_patches(2, 7, N)
    fast, small = (gradient(SparseViT.from_timm(model, memory=memory), images, keep) for memory in ("fast", "small"))
    assert torch.equal(fast[1], small[1])


@pytest.mark.parametrize(
    ("variant", "again"),
    [
        ("plain", {"norm_linear": 2 + 3, "attention": 1, "class_attention": 1, "linear_residual": 2}),
        ("SwiGLU", {"norm_linear": 2 + 3, "attention": 1, "class_attention": 1, "linear_residual": 2}),
        ("turned neighbours", {"norm_linear": 2 + 2, "attention": 2, "linear_residual": 2}),
        ("attention pooling", {"norm_linear": 2 + 2 + 2, "attention": 2, "class_attention": 1, "linear_residual": 3}),
    ],
)
def test_small_memory_plan_computes_no_more_again_than_the_backward_needs(variant: str, again: dict[str, int]) -> None:
    """Of a block: projections in front of attention and MLP, attention, and its output's projection."""
    model = build(variant)
    calls = []
    for memory in ("fast", "small"):
        vit = SparseViT.from_timm(model, memory=memory)
        trace = vit.run(pixels(model), None, None)
        with use_backend("reference"), record_operations() as operations:
            vit.backward_of(trace, torch.ones_like(trace.parts[0]))
        calls.append(Counter(name for operation in operations for name in [operation.name] * operation.calls))
    assert dict(calls[1] - calls[0]) == again and not calls[0] - calls[1]


@pytest.mark.parametrize(("memory", "of_width", "of_row"), [("fast", 18, 16), ("small", 4, 8)], ids=["fast", "small"])
def test_what_a_block_saves(memory: Any, of_width: int, of_row: int) -> None:
    """Bytes a token: 18 times width and 16 of moments, or the input in float32 and its statistics."""
    D = 64
    vit = SparseViT.from_timm(tiny(embed_dim=D, depth=3).to(DEVICE), "bf16", memory=memory)
    with use_backend("reference"):
        trace: Trace = vit.run(pixels(tiny(), 5, torch.float32), None, None)
    for kept in trace.saved[:-1]:
        size = sum(t.numel() * t.element_size() for t in kept if t is not None)
        assert size <= 5 * (N + 1) * (of_width * D + of_row)


def test_bits_of_an_image_do_not_depend_on_its_batch(backend: str) -> None:
    model = tiny(embed_dim=64).to(DEVICE)
    vit = SparseViT.from_timm(model, "fp32", batch_invariant=True)
    images, keep = pixels(model, 5, torch.float32), some_patches(5, 7, N)
    if backend == "reference":
        pytest.skip("PyTorch's matrix products promise nothing of the kind")
    whole, alone = gradient(vit, images, keep), gradient(vit, images[3:4], keep[3:4])
    assert torch.equal(whole[0][3:4], alone[0]) and torch.equal(whole[1][3:4], alone[1])


@pytest.mark.parametrize("norm", [False, True], ids=["", "qk_norm"])
def test_bits_of_received_attention_do_not_depend_on_the_batch(norm: bool, backend: str) -> None:
    model = tiny(class_token=False, global_pool="avg", qk_norm=norm).to(DEVICE)
    vit = SparseViT.from_timm(model, batch_invariant=True)
    keep = some_patches(5, 9, N)
    trace = vit.run(pixels(model, 5, torch.float32), keep, None)
    _, whole = vit.rank(trace, keep, 7)
    for i in range(5):
        one = dataclasses.replace(trace, query=trace.query[i : i + 1].clone(), key=trace.key[i : i + 1].clone())
        _, alone = vit.rank(one, keep[i : i + 1], 7)
        assert torch.equal(whole[i : i + 1], alone)
    none = dataclasses.replace(trace, query=trace.query[:0], key=trace.key[:0])
    assert vit.rank(none, keep[:0], 7)[1].shape == (0, 9)


@pytest.mark.parametrize(("depth", "variant"), [(12, {}), (24, {}), (4, {"qk_norm": True})])
def test_ten_launches_a_block(depth: int, variant: dict[str, Any]) -> None:
    """With the last block's two more, three of embedding and head, and the way back to pixels."""
    vit = SparseViT.from_timm(tiny(depth=depth, **variant), device="meta")
    images = torch.empty(1, 3, 16, 16, device="meta", requires_grad=True)
    with record_launches() as launches:
        logits = vit(images, torch.empty(1, 2, dtype=torch.int64, device="meta"))
        forward = len(launches)
        logits.sum().backward()
    assert forward == 5 * depth + 1 + 2
    assert len(launches) - forward == 5 * depth + 1 + 3


# --- autograd ---


def test_gradcheck_through_the_kernels() -> None:
    model = tiny(img_size=8, embed_dim=8, depth=2, num_heads=1, num_classes=2, in_chans=1).double().to(DEVICE)
    vit = SparseViT.from_timm(model)
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    keep, jitter = torch.tensor([[0, 3]], device=DEVICE), torch.tensor([[1, -3, 1]], device=DEVICE)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(lambda x: vit(x, keep, jitter), images, fast_mode=True)


def test_a_graph_serves_twice_and_then_is_gone() -> None:
    model = build("plain")
    vit, images = SparseViT.from_timm(model), pixels(model).requires_grad_(True)
    loss = vit(images).square().sum()
    (once,) = torch.autograd.grad(loss, images, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, images)
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, images)
    with pytest.raises(RuntimeError, match=r"a SparseViT has no second derivative.*create_graph=True"):
        torch.autograd.grad(vit(images).square().sum(), images, create_graph=True)


def test_backward_runs_on_the_backend_of_its_forward() -> None:
    vit = SparseViT.from_timm(tiny(depth=1).to(DEVICE))
    for backend, expected in (("triton", True), ("reference", False)):
        images = pixels(tiny(), 1, torch.float32).requires_grad_(True)
        with use_backend(backend):
            logits = vit(images)
        with count_launches() as launches:
            torch.autograd.grad(logits.sum(), images)
        assert bool(launches) is expected or DEVICE == "cuda"  # whose backward has a thread of its own


def test_inputs_of_every_kind(backend: str) -> None:
    model = build("plain")
    vit, images = SparseViT.from_timm(model), pixels(model)
    expected_logits, expected = gradient(vit, images)

    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    torch.testing.assert_close(gradient(vit, strided)[1], expected)
    spread = torch.stack((images, images), dim=1).flatten(0, 1)[::2]
    torch.testing.assert_close(gradient(vit, spread)[1], expected)

    leaf = images.clone().requires_grad_(True)  # not a leaf of the network's
    logits = vit(leaf * 1.0)
    assert logits.requires_grad and not vit(images).requires_grad
    with torch.no_grad():
        assert not vit(leaf).requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(vit(images), expected_logits)
    torch.testing.assert_close(vit(images.float()), expected_logits, rtol=1e-5, atol=1e-5)
    assert vit(images[:0]).shape == (0, CLASSES)
    empty = images[:0].clone().requires_grad_(True)
    assert torch.autograd.grad(vit(empty).sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("variant", ["plain", "no class token"])
def test_autocast_of_the_caller_changes_no_bit(variant: str, backend: str) -> None:
    """The precision is that of the folding, in the forward, the ranking and a backward in and behind the context."""
    model = build(variant).float()
    vit, images = SparseViT.from_timm(model), pixels(model, dtype=torch.float32)
    expected, rank = gradient(vit, images), vit(images, class_attention=True)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        inside, found = gradient(vit, images), vit(images, class_attention=True)[1]
        leaf = images.clone().requires_grad_(True)
        logits = vit(leaf)
    seen = (*inside, found, torch.autograd.grad(logits.double().square().sum(), leaf)[0])
    behind = images.clone().requires_grad_(True)
    again = torch.autograd.grad(vit(behind).double().square().sum(), behind)[0]
    for ours, theirs in zip(seen, (*expected, rank, again), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_without_a_gradient_nothing_is_kept_for_one(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, traces = build("plain"), []
    run = SparseViT.run
    monkeypatch.setattr(SparseViT, "run", lambda *args, **options: traces.append(run(*args, **options)) or traces[-1])
    with torch.set_grad_enabled(grad):
        logits = SparseViT.from_timm(model)(pixels(model).requires_grad_(True))
    assert logits.requires_grad is grad
    assert len(traces[0].saved) == (len(model.blocks) if grad else 0)


def test_no_weight_is_cut_by_tf32() -> None:
    """Matrix units read 10 bits of a mantissa and drop the other 13, which always errs to the same side."""
    model = build("plain").float()
    weights = SparseViT.from_timm(model, "tf32").weights
    patch = model.patch_embed.proj.weight.detach().flatten(1)
    for rounded in (weights.patch_weight, weights.blocks[0].qkv.weight, weights.heads_of_tokens[0].weight):
        assert not (rounded.view(torch.int32) & 0x1FFF).any()
    error_of = (weights.patch_weight - patch).abs() / patch.abs()
    assert error_of.max() <= 2**-11


@pytest.mark.parametrize("variant", ["plain", "norm before the blocks", "attention pooling", "turned neighbours"])
@pytest.mark.parametrize("class_attention", [False, True])
def test_torch_compile_takes_it_whole(class_attention: bool, variant: str) -> None:
    model = build(variant).float()
    vit, images = SparseViT.from_timm(model), pixels(model, dtype=torch.float32)
    keep = some_patches(2, 7, N)

    def loss(x: Tensor) -> Tensor:
        out = vit(x * 2, keep, class_attention=class_attention)
        return (out[0] if class_attention else out).square().sum()

    def both(function: Any) -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_(True)
        value = function(x)
        return value, torch.autograd.grad(value, x)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(both(compiled), both(loss), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": torch.zeros(2, 3, 16, 20)}, r"\(2, 3, 16, 20\); expected \(B, 3, 16, 16\)"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.int64)}, "int64; expected floating"),
        ({"keep": torch.zeros(3, 2, dtype=torch.int64)}, r"keep has shape \(3, 2\)"),
        ({"keep": torch.zeros(2, 17, dtype=torch.int64)}, "K from 1 to 16"),
        ({"keep": torch.zeros(2, 2, dtype=torch.int32)}, "int32; expected"),
        ({"jitter": torch.zeros(2, 2, dtype=torch.int64)}, r"jitter has shape \(2, 2\)"),
        ({"keep": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "keep is on meta"),
        ({"images": torch.zeros(2, 3, 16, 16, device="meta")}, "images are on meta"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], complaint: str) -> None:
    images = {"images": torch.zeros(2, 3, 16, 16)}
    inputs = {name: t if t.is_meta else t.to(DEVICE) for name, t in {**images, **change}.items()}
    with pytest.raises(ValueError, match=complaint):
        SparseViT.from_timm(tiny().to(DEVICE))(**inputs)


@pytest.mark.parametrize(
    ("model", "complaints"),
    [
        (nn.Linear(2, 2), ["VisionTransformer"]),
        (Eva(**EVA, qkv_fused=False, scale_mlp=True, scale_attn_inner=True), ["one square", "output has", "inside"]),
        pytest.param(
            QUERY_KEY_NORM and Eva(**EVA, use_rot_pos_emb=True, qk_norm=True, use_post_norm=False),
            ["before it turns them"],
            marks=pytest.mark.skipif(not QUERY_KEY_NORM, reason="this timm's Eva norms no queries and keys"),
        ),
        (Eva(**EVA, use_post_norm=True), ["EvaBlockPostNorm"]),
        (tiny(global_pool="max"), ["pools by 'max'"]),
        (tiny(global_pool="map", act_layer="silu"), ["in its attention pooling its activation is SiLU"]),
        (
            tiny(global_pool="map", norm_layer="rmsnorm", pre_norm=True),
            ["RmsNorm before the first", "found ['RmsNorm']"],
        ),
        (tiny(mlp_layer=GluMlp), ["not SiLU of the first half"]),
        (tiny(act_layer="silu", norm_layer="rmsnorm"), ["SiLU(), not GELU", "LayerNorm"]),
    ],
    ids=["linear", "eva", "eva qk", "eva post", "max", "map", "pre_norm", "glu", "silu"],
)
def test_models_are_refused_with_every_reason(model: nn.Module, complaints: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot run on the fused kernels") as caught:
        SparseViT.from_timm(model)
    assert all(complaint in str(caught.value) for complaint in complaints)


def test_supported_architectures_of_timm() -> None:
    import timm

    for name in (
        "vit_tiny_patch16_224", "deit_small_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
        "vit_base_patch16_224_miil", "vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224",
        "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224", "vit_base_patch32_siglip_256",
        "vit_base_patch16_clip_quickgelu_224", "vit_medium_patch16_gap_256",
    ):  # fmt: skip
        with torch.device("meta"):
            model = timm.create_model(name)
        assert isinstance(model, VisionTransformer)
        assert unsupported_reasons(model) == [], name


class Doubled(nn.Linear):
    """As layers with adapters or quantized weights, whose `weight` is not all there is to them."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(Tensor):
    pass


class Read(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("head", "its head is a Doubled, not a Linear"),
        ("blocks.1.attn.qkv", r"its query, key and value projection is a Doubled, not a Linear \(block 1\)"),
        ("blocks.0.attn.proj", "its attention's output projection is a Doubled"),
        ("blocks.0.mlp.fc1", "its MLP's first layer is a Doubled"),
        ("blocks.0.mlp.fc2", "its MLP's second layer is a Doubled"),
        ("attn_pool.kv", "in its attention pooling a projection is a Doubled"),
    ],
)
def test_layers_that_only_look_linear_are_refused(layer: str, reason: str) -> None:
    model = build("attention pooling")
    linear = model.get_submodule(layer)
    model.set_submodule(layer, Doubled(linear.in_features, linear.out_features, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match=reason):
        SparseViT.from_timm(model)
    model.set_submodule(layer, linear)
    plain, linear.weight = linear.weight, nn.Parameter(linear.weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match=reason.split(" is a")[0] + " has its weight in a Packed, not in a plain"):
        SparseViT.from_timm(model)
    linear.weight = plain
    nn.utils.parametrize.register_parametrization(linear, "weight", Read())  # another class, but of its own weight
    with torch.no_grad():
        torch.testing.assert_close(SparseViT.from_timm(model)(pixels(model)), model(pixels(model)))


def test_weights_are_folded_once_and_the_model_is_left_alone() -> None:
    model = build("layer scale, qk norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vit = SparseViT.from_timm(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    headless = build("no head, no qkv bias")
    drawn = torch.get_rng_state()
    SparseViT.from_timm(headless)
    assert torch.equal(torch.get_rng_state(), drawn)
    logits = vit(pixels(model))
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(vit(pixels(model)), logits)
    with pytest.raises(ValueError, match="'fp8'; expected one of"):
        SparseViT.from_timm(model, "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'tiny'; expected"):
        SparseViT.from_timm(model, memory="tiny")  # type: ignore[arg-type]
