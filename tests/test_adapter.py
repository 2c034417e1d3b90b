"""The timm adapter against timm itself: its patch dropout, its autograd, its unfused attention; and what it refuses."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from small import one_thread, randomise, tiny  # noqa: F401
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi
from benchmarks.models import CLASSES, FAMILIES, create
from smi import SmiError, SparseModel
from smi.adapters.timm import unsupported_reasons
from smi.devices import resolve_device
from smi.weights import weights_hash


def build(key: str, drop: float = 0.0) -> Any:
    if not timm.is_model(FAMILIES[key].name):
        pytest.skip(f"timm {timm.__version__} has no {FAMILIES[key].name}")
    return create(key, drop)


def pixels(model: Any, images: int = 2, seed: int = 1) -> Tensor:
    shape = (images, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(model.patch_embed.proj.weight.dtype)


def drop_patches(model: Any, images: Tensor, seed: int = 5) -> tuple[Callable[[], Tensor], Tensor]:
    """timm's own forward with its patch dropout on, and the patches that it keeps, (B, K) in timm's random order."""
    count, kept = model.patch_embed.num_patches, []
    model.patch_drop.train()
    model.patch_drop.num_prefix_tokens = model.num_prefix_tokens  # timm's distilled DeiT would drop its second token

    def forward() -> Tensor:
        torch.manual_seed(seed)
        return model(images)

    draw = torch.argsort

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        order = draw(*args, **kwargs)
        kept.append(order)
        return order

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "argsort", recording)
        forward()
    (order,) = kept
    return forward, order[:, : max(1, int(count * (1 - model.patch_drop.prob)))]


def sparse_model(model: Any, **options: Any) -> SparseModel:
    grey = {"mean": (0.5,), "std": (0.25,)} if model.patch_embed.proj.in_channels == 1 else {}
    return SparseModel(model, **grey, **options)


def relative(value: Tensor, exact: Tensor) -> float:
    assert exact.norm() > 1e-3, "nothing to compare"
    return ((value - exact).norm() / exact.norm()).item()


# ---- the same function as timm's


@pytest.mark.parametrize("key", FAMILIES)
def test_sparse_forward_and_pixel_gradient_are_timms(key: str) -> None:
    model = build(key, drop=0.4)
    images = pixels(model).requires_grad_()
    sparse = sparse_model(model)
    weights = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(2))

    with torch.no_grad():
        dense = model(images)
        assert relative(sparse(images)[0], dense) < 1e-5

    forward, kept = drop_patches(model, images)
    assert 1 < kept.shape[1] < sparse.info.num_patches and not torch.equal(kept, kept.sort(1).values)
    expected = forward()
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), images)
    logits, scores = sparse(images, kept, scores=True)
    (grad,) = torch.autograd.grad((logits * weights).sum(), images)
    assert relative(expected, dense) > 1e-2, "dropping patches made no difference"
    assert relative(logits, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-5
    assert torch.equal(grad == 0, expected_grad == 0), "a pixel of a patch that was not fed got a gradient"
    assert scores.shape == kept.shape and (scores > 0).all() and not scores.requires_grad

    again = kept.flip(1)  # the order of the cells is nothing but the order of the scores
    other, reversed_scores = sparse(images, again, scores=True)
    assert relative(other, logits) < 1e-5
    torch.testing.assert_close(reversed_scores, scores.flip(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["deit-distilled", "siglip", "dinov3", "rope-mixed", "perception-encoder"])
def test_double_precision_stays_double(key: str) -> None:
    if key == "rope-mixed" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip(f"timm {timm.__version__} rotates by float32 in a float64 model of its own accord, and fails")
    model = build(key, drop=0.4).double()
    images, sparse = pixels(model).requires_grad_(), sparse_model(model)
    forward, kept = drop_patches(model, images)
    (expected,) = torch.autograd.grad(forward().square().sum(), images)
    logits, scores = sparse(images, kept, scores=True)
    (grad,) = torch.autograd.grad(logits.square().sum(), images)
    assert logits.dtype == scores.dtype == grad.dtype == sparse.dtype == torch.float64
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)

    direction = pixels(model, seed=9)
    with torch.no_grad():
        ahead, behind = (sparse(images + h * direction, kept)[0].square().sum() for h in (1e-5, -1e-5))
    assert ((ahead - behind) / 2e-5).item() == pytest.approx((grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("key", ["deit", "rectangular-patches", "eva02-dynamic", "rope-axial"])
def test_cells_are_those_of_the_augmented_image(key: str) -> None:
    """Against timm with patch dropout, shown an image that was rolled and flipped by torch."""
    model = build(key, drop=0.4)
    images, offsets = pixels(model), torch.tensor([[3, -20, 1], [-16, 5, 0]])
    seen = torch.stack([images[0].roll((3, -20), (1, 2)).flip(2), images[1].roll((-16, 5), (1, 2))])
    forward, kept = drop_patches(model, seen)
    sparse = sparse_model(model)
    with torch.no_grad():
        assert relative(sparse(images, kept, offsets)[0], forward()) < 1e-5
        model.patch_drop.eval()
        assert relative(sparse(images, None, offsets)[0], model(seen)) < 1e-5
        assert relative(sparse(images[:1], None, offsets[:1])[0], model(seen[:1])) < 1e-5


def test_half_precision_runs_and_stays_close() -> None:
    model = build("deit")
    images, cells = pixels(model).requires_grad_(), torch.tensor([[0, 3, 8, 9], [1, 2, 6, 15]])
    exact, _ = SparseModel(model)(images, cells)
    logits, scores = SparseModel(model, precision="bf16")(images, cells, scores=True)
    (grad,) = torch.autograd.grad(logits.sum(), images)
    assert logits.dtype == scores.dtype == grad.dtype == torch.float32
    assert 1e-5 < relative(logits, exact) < 0.05
    assert next(model.parameters()).dtype == torch.float32


def test_features_are_timms() -> None:
    model = build("deit", drop=0.4)
    images, seen = pixels(model), []
    sparse = SparseModel(model)
    sparse.watch(["blocks.0", "norm"])
    sparse.watch(["norm"])
    hook = model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    forward, kept = drop_patches(model, images)
    seen.clear()
    with torch.no_grad():
        forward()
    sparse(images.requires_grad_(), kept)
    hook.remove()
    assert sorted(sparse.features) == ["blocks.0", "norm"]
    assert relative(sparse.features["blocks.0"], seen[0]) < 1e-5
    assert sparse.features["norm"].requires_grad
    sparse(images)
    assert sparse.features["norm"].shape[1] == 17
    with pytest.raises(SmiError, match=r"no submodule 'blocks\.9'"):
        sparse.watch(["blocks.9"])


# ---- rankings


def softmax(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.max(-1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def explicit_attention(model: Any, forward: Callable[[], Tensor]) -> Tensor:
    """(B, H, N, N) of the last block, where timm itself computes it step by step."""
    seen: list[Tensor] = []
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        forward()
    hook.remove()
    return seen[-1]


RANKED = ["deit", "deit-distilled", "deit3", "dinov2-registers", "dinov3", "clip", "eva02", "rope-axial", "rope-mixed"]


@pytest.mark.parametrize("key", RANKED)
def test_class_attention(key: str) -> None:
    model = build(key, drop=0.4)
    sparse, images = SparseModel(model), pixels(model)
    assert sparse.info.ranking == "class_attention"
    forward, kept = drop_patches(model, images)
    prefix = sparse.info.num_prefix_tokens
    expected = explicit_attention(model, forward)[:, :, 0, prefix:].mean(1)
    scores = sparse(images, kept, scores=True)[1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert (scores.max(1).values > 1.5 * scores.min(1).values).all(), "attention is too even to rank by"
    model.patch_drop.eval()
    expected = explicit_attention(model, lambda: model(images))[:, :, 0, prefix:].mean(1)
    torch.testing.assert_close(sparse(images, scores=True)[1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["gap", "rope-registers-gap", "deit", "siglip"])
def test_received_attention(key: str) -> None:
    model = build(key, drop=0.4)
    ranking = "auto" if "gap" in key else "received_attention"
    sparse, images = SparseModel(model, ranking=ranking), pixels(model)
    assert sparse.info.ranking == "received_attention"
    forward, kept = drop_patches(model, images)
    expected = explicit_attention(model, forward).mean((1, 2))[:, sparse.info.num_prefix_tokens :]
    torch.testing.assert_close(sparse(images, kept, scores=True)[1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["siglip", "perception-encoder"])
def test_attention_pool(key: str) -> None:
    model = build(key, drop=0.4)
    sparse, images = SparseModel(model), pixels(model)
    assert sparse.info.ranking == "attention_pool"
    forward, kept = drop_patches(model, images)
    pool, seen = model.attn_pool, []
    hook = pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        forward()
        tokens = seen[0]
        query, key_value = pool.q(pool.latent), pool.kv(tokens)
    hook.remove()
    rows = []
    for head in range(pool.num_heads):
        part = slice(head * pool.head_dim, (head + 1) * pool.head_dim)
        rows.append(softmax(query[:, 0, part] @ key_value[:, :, part].transpose(1, 2) * pool.head_dim**-0.5))
    expected = torch.stack(rows).mean(0)[:, 0, tokens.shape[1] - kept.shape[1] :]
    torch.testing.assert_close(sparse(images, kept, scores=True)[1], expected, rtol=1e-4, atol=1e-6)


def test_rankings_on_request() -> None:
    clip, siglip = build("clip"), build("siglip")
    assert SparseModel(clip, ranking="received_attention").info.ranking == "received_attention"
    with pytest.raises(SmiError, match=r"'attention_pool' needs attention pooling.*'class_attention', 'received_att"):
        SparseModel(clip, ranking="attention_pool")
    with pytest.raises(SmiError, match=r"'class_attention' needs a class token.*use 'attention_pool'"):
        SparseModel(siglip, ranking="class_attention")


@pytest.mark.parametrize("ranking", ["class_attention", "received_attention"])
def test_parallel_attentions_count_alike(ranking: str) -> None:
    model = build("parallel-blocks", drop=0.4)
    sparse, images = SparseModel(model, ranking=ranking), pixels(model)
    forward, kept = drop_patches(model, images)
    seen: list[Tensor] = []
    for part in model.blocks[-1].attns:
        part.attn.fused_attn = False
        part.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        forward()
    heads = torch.cat(seen, dim=1)
    expected = heads[:, :, 0].mean(1) if ranking == "class_attention" else heads.mean((1, 2))
    torch.testing.assert_close(sparse(images, kept, scores=True)[1], expected[:, 1:], rtol=1e-4, atol=1e-6)


def test_differential_attention_is_refused() -> None:
    block = getattr(timm.models.vision_transformer, "DiffParallelScalingBlock", None)
    if block is None:
        pytest.skip(f"timm {timm.__version__} has no differential attention")
    refused(tiny(block_fn=block), "its attention is the difference of two")


class OwnAttention(nn.Module):
    """Makes no fused call that could be listened to."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.qkv, self.heads = inner.qkv, inner.num_heads

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        B, T, D = x.shape
        query, key, value = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return (softmax(query @ key.transpose(2, 3)) @ value).transpose(1, 2).reshape(B, T, D)


def test_a_last_block_that_cannot_be_asked_is_refused() -> None:
    model = tiny()
    model.blocks[-1].attn = OwnAttention(model.blocks[-1].attn)
    refused(model, "'class_attention' is not to be had: the last block makes no fused attention call")


def test_pooling_without_a_latent_query_is_not_an_attention_pool() -> None:
    try:
        model = tiny(class_token=False, global_pool="prr")
    except AssertionError:
        pytest.skip(f"timm {timm.__version__} has no such pooling")
    assert SparseModel(model).info.ranking == "received_attention"


# ---- the caller's model


def fingerprint(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [
        [(name, id(value), value.data_ptr(), value.requires_grad) for name, value in model.named_parameters()],
        [(name, id(value), value.data_ptr()) for name, value in model.named_buffers()],
        [value.clone().numpy().tobytes() for value in model.state_dict().values()],
        [(name, id(part), type(part), part.training) for name, part in model.named_modules()],
        [dict(getattr(part, hook)) for part in model.modules() for hook in hooks],
        [getattr(part, "fused_attn", None) for part in model.modules()],
        [(id(value), None if value.grad is None else value.grad.clone().tolist()) for value in model.parameters()],
    ]


@pytest.mark.parametrize("key", ["deit-distilled", "siglip", "eva02"])
def test_the_callers_model_is_not_touched(key: str) -> None:
    model = build(key, drop=0.4)
    model.train()
    model.norm.eval()
    model.blocks[0].requires_grad_(False)
    model.blocks[-1].attn.fused_attn = False
    model.blocks[0].register_forward_hook(lambda module, args, output: None)
    before = fingerprint(model)
    sparse = SparseModel(model)
    assert fingerprint(model) == before
    sparse.watch(["blocks.0"])
    inversion = smi.Inversion(sparse, [1, 2], smi.Config(iterations=3, prune_at=(1,), prune_ratio=(0.5,)))
    inversion.step()
    assert fingerprint(model) == before
    inversion.run()
    assert fingerprint(model) == before
    assert sparse.restore() is model
    assert fingerprint(model) == before


def test_weights_are_shared_not_copied() -> None:
    for key in ("deit", "eva02", "siglip"):
        model = build(key)
        ours = {weight.data_ptr() for weight in SparseModel(model).weights()}
        assert ours == {weight.data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    twin = SparseModel(build("deit"))
    assert not any(weight.requires_grad for weight in twin.weights())
    model = build("deit")
    half = {weight.data_ptr() for weight in SparseModel(model, precision="bf16").weights()}
    assert not half & {weight.data_ptr() for weight in model.parameters()}


def test_restored_twice_and_used_afterwards() -> None:
    model = tiny()
    sparse = SparseModel(model)
    assert sparse.restore() is model and sparse.restore() is model
    with pytest.raises(SmiError, match="restored"):
        sparse(pixels(model))


def test_an_adapter_that_nobody_holds_is_gone() -> None:
    """At once, and its copy of the weights with it, not when the garbage collector comes round."""
    gc.disable()
    try:
        sparse = SparseModel(tiny())
        sparse.watch(["norm"])
        gone = weakref.ref(sparse)
        del sparse
        assert gone() is None
    finally:
        gc.enable()


# ---- what it knows about the model


def test_info() -> None:
    model = build("rectangular-patches")
    info = SparseModel(model, name="mine", class_names=[str(i) for i in range(CLASSES)]).info
    assert (info.name, info.label(3), info.num_classes) == ("mine", "3", CLASSES)
    assert (info.input_size, info.patch_size, info.grid, info.num_patches) == ((3, 32, 48), (8, 16), (4, 3), 12)
    assert (info.mean, info.std) == ((0.5,) * 3, (0.5,) * 3)
    assert SparseModel(model).info.name == "vit_tiny_patch16_224"
    assert SparseModel(build("dinov2-registers")).info.num_prefix_tokens == 5
    assert SparseModel(model, mean=[0.1], std=(0.2, 0.3, 0.4)).info.mean == (0.1,) * 3


def test_classes_of_imagenet_have_their_names() -> None:
    """Against names that everybody knows, and only where card and head say that they are ImageNet's."""
    small = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 3}
    names = SparseModel(timm.create_model("deit_tiny_patch16_224.fb_in1k", **small)).info.class_names
    assert len(names) == 1000
    assert (names[1], names[2], names[207], names[281]) == (
        "goldfish",
        "great white shark",
        "golden retriever",
        "tabby",
    )
    assert [number for number, name in enumerate(names) if name == "crane"] == [134, 517]
    wide = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **small)
    assert len(SparseModel(wide).info.class_names) == wide.num_classes == 21843
    other = timm.create_model("deit_tiny_patch16_224.fb_in1k", num_classes=10, **small)
    assert SparseModel(other).info.class_names == ()
    unknown = timm.create_model("deit_tiny_patch16_224.fb_in1k", **small)
    unknown.pretrained_cfg = {**unknown.pretrained_cfg, "tag": "mine"}
    assert SparseModel(unknown).info.class_names == ()
    assert SparseModel(unknown, class_names=[f"my {n}" for n in range(1000)]).info.label(3) == "my 3"


def test_hash_sees_every_bit_and_nothing_else() -> None:
    model = build("deit")
    first = weights_hash(model)
    assert len(first) == 64 and weights_hash(build("deit")) == first == SparseModel(model).info.weights_sha256
    assert weights_hash(model.train().requires_grad_(False)) == first
    with torch.no_grad():
        model.head.bias[0] = torch.nextafter(model.head.bias[0], torch.tensor(9.0))
    assert weights_hash(model) != first
    same_bytes = [nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)]
    for layer in same_bytes:
        nn.init.ones_(layer.weight)
    assert weights_hash(same_bytes[0]) != weights_hash(same_bytes[1])


# ---- refusals


def refused(model: Any, message: str, **options: Any) -> None:
    with pytest.raises(SmiError, match=message):
        SparseModel(model, **options)


def test_other_families_are_refused() -> None:
    swin = SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    refused(swin, "SwinTransformer is not supported: expected a timm VisionTransformer or Eva")
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    refused(convnext, "ConvNeXt is not supported: .*windowed, convolutional and hierarchical")
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1, embed_dim=16, num_heads=2)
    refused(hybrid, "HybridEmbed is not timm's PatchEmbed")
    assert unsupported_reasons(hybrid) and not unsupported_reasons(tiny())
    refused("vit", "expected a torch.nn.Module, got str")


def test_geometry_is_checked() -> None:
    refused(tiny(img_size=18), "18 x 18 pixels is not a multiple of its patch of 4 x 4; choose an img_size")
    refused(tiny(img_size=(16, 18)), "16 x 18 pixels")
    refused(tiny(depth=0), "it has no blocks")
    refused(tiny(global_pool=""), "not supported")
    overlapping = tiny()
    overlapping.patch_embed.proj = nn.Conv2d(3, 16, 6, 4, padding=1)
    refused(overlapping, "its patches overlap")
    sparse = SparseModel(tiny())
    for shape in ((1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(SmiError, match=r"expected \(B, 3, 16, 16\)"):
            sparse(torch.zeros(shape))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_weights_have_to_be_finite(poison: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 2] = poison
    refused(model, r"not finite: 1 of 1024 values of 'blocks\.1\.mlp\.fc1\.weight'")


class Stubborn(VisionTransformer):
    """Goes its own way at one step of the forward pass."""

    def __init__(self, way: str) -> None:
        super().__init__(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5)
        self.way = way

    def forward_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        if self.way != "never drops":
            x = self.patch_drop(x)
        if self.way == "counts tokens":
            x = x + torch.arange(x.shape[1]).view(1, -1, 1) * torch.linspace(-1, 1, 16)
        return self.norm(self.blocks(x))


def test_a_forward_that_depends_on_the_order_is_refused() -> None:
    assert SparseModel(randomise(Stubborn("none"))).info.num_patches == 16
    refused(randomise(Stubborn("counts tokens")), r"differs from timm's own forward by .* \(relative")


def test_a_forward_that_drops_no_patch_is_refused() -> None:
    refused(randomise(Stubborn("never drops")), "not supported")


def test_mean_and_std_are_checked() -> None:
    model = tiny()
    refused(model, "mean has 2 values; expected one for each of the 3 channels", mean=(0.5, 0.5))
    refused(model, "std has 4 values", std=(0.5,) * 4)
    refused(model, "expected positive numbers", std=(0.5, 0.0, 0.5))
    refused(model, "expected positive numbers", std=(0.5, -1.0, 0.5))


@pytest.mark.parametrize("values", [{"std": (math.nan,) * 3}, {"mean": (math.nan,) * 3}, {"std": (math.inf,)}])
def test_mean_and_std_are_finite(values: dict[str, tuple[float, ...]]) -> None:
    refused(tiny(), "expected", **values)


def test_a_grey_model_needs_no_help() -> None:
    assert len(SparseModel(build("grey")).info.mean) == 1


def test_devices() -> None:
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert resolve_device("cpu").type == SparseModel(tiny(), device="cpu").device.type == "cpu"
    for device in ("gpu", "cuda:x", "meta"):
        refused(tiny(), f"device is '{device}'; expected auto, cpu, cuda or cuda:N", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu() -> None:
    for device in ("cuda", "cuda:3"):
        refused(tiny(), f"device is '{device}', but no CUDA GPU is visible; use cpu or auto", device=device)
