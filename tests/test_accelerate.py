"""The drop-in: loops written for timm, unchanged but for one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernels import DEVICE
from small import CLASSES, tiny
from torch.nn import functional as F

import smi_kernels
from smi import with_text_head
from smi_kernels import accelerate


def invert(model: Any, steps: int = 5) -> torch.Tensor:
    """A dense inversion as people write it: Adam on the image, cross-entropy and a prior, through timm's call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_(True)
    targets = torch.tensor([1, 3], device=DEVICE)
    optimizer = torch.optim.Adam([images], lr=0.01, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets) + 1e-3 * images.square().mean()
        loss.backward()
        optimizer.step()
    return images.detach()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_somebodys_loop_gives_the_same_images(backend: str) -> None:
    model = tiny().double().to(DEVICE)
    expected = invert(model)
    with smi_kernels.use_backend(backend):
        found = invert(accelerate(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_saliency_of_single_logits_through_a_compiled_loop() -> None:
    model = tiny().to(DEVICE)
    images = torch.randn(2, 3, 16, 16, device=DEVICE)

    def saliency(network: Any) -> torch.Tensor:
        x = images.clone().requires_grad_(True)
        network(x).max(1).values.sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(saliency(accelerate(model)), saliency(model), rtol=1e-4, atol=1e-5)


def test_what_was_visible_stays_visible() -> None:
    model = tiny().to(DEVICE)
    fast = accelerate(model)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    assert fast.num_classes == CLASSES and fast.patch_embed is model.patch_embed
    assert fast.restore() is model
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_gradients_reach_images_and_no_weight() -> None:
    model = tiny().to(DEVICE)
    images = torch.randn(2, 3, 16, 16, device=DEVICE, requires_grad=True)
    accelerate(model)(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_changed_weights_are_folded_again() -> None:
    model = tiny().to(DEVICE)
    fast, images = accelerate(model), torch.randn(1, 3, 16, 16, device=DEVICE)
    folded, before = fast.vit, fast(images)
    assert fast.vit is folded
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast(images), before)
    model.double()
    assert fast(images).dtype == torch.float64
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        fast(images)


def other_head(model: Any) -> None:
    model.head = torch.nn.Linear(16, CLASSES).to(DEVICE)


def other_bias(model: Any) -> None:
    model.blocks[1].mlp.fc1.bias = None


def one_step(model: Any) -> None:
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    torch.optim.SGD([model.norm.weight], lr=0.5).step()


def loaded(model: Any) -> None:
    model.load_state_dict(tiny(seed=8).state_dict())


def assigned(model: Any) -> None:
    model.load_state_dict(tiny(seed=8).to(DEVICE).state_dict(), assign=True)


def one_block_more(model: Any) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


@pytest.mark.parametrize("change", [other_head, other_bias, one_step, loaded, assigned, one_block_more])
def test_whatever_changes_is_noticed_and_no_module_is_visited_otherwise(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tiny().to(DEVICE), torch.randn(1, 3, 16, 16, device=DEVICE)
    fast = accelerate(model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "named_modules", lambda *_, **__: pytest.fail("walks through the modules"))
        before = fast(images)
    change(model)
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast(images), before, rtol=1e-3, atol=1e-4)
    folded, twin = fast.vit, copy.deepcopy(fast)
    assert torch.equal(fast(images), twin(images)) and fast.vit is folded
    change(twin.model)
    torch.testing.assert_close(twin(images), twin.model(images), rtol=1e-4, atol=1e-5)


def test_weights_are_folded_again_wherever_they_lie() -> None:
    model = tiny().to(DEVICE)
    fast, images = accelerate(model), torch.randn(1, 3, 16, 16, device=DEVICE)
    parameters = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(parameters * 1.5, model.parameters())  # sets ``parameter.data``
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        model = tiny(seed=8).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model)(images), model(images), rtol=1e-4, atol=1e-5)


def test_other_texts_are_folded_again() -> None:
    generator = torch.Generator().manual_seed(3)
    texts, others = torch.randn(2, 5, 70, generator=generator)
    model = with_text_head(tiny(num_classes=70, depth=1), texts, logit_scale=4.0).to(DEVICE)
    fast, images = accelerate(model), torch.randn(1, 3, 16, 16, device=DEVICE)
    model.head[1].load_state_dict(with_text_head(tiny(num_classes=70, depth=1), others).head[1].state_dict())
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_compiled_call_follows_an_ordinary_one() -> None:
    model = tiny().to(DEVICE)
    fast, images = accelerate(model), torch.randn(1, 3, 16, 16, device=DEVICE)
    compiled = torch.compile(fast, backend="eager")
    compiled(images)
    with torch.no_grad():
        model.head.weight.mul_(2)
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_keep_and_jitter_ride_along() -> None:
    fast = accelerate(tiny().to(DEVICE), "fp16", memory="small", batch_invariant=True)
    keep, images = torch.tensor([[1, 5, 6]], device=DEVICE), torch.randn(1, 3, 16, 16, device=DEVICE)
    logits, attention = fast(images, keep=keep, jitter=torch.tensor([[1, -2, 1]], device=DEVICE), class_attention=True)
    assert logits.shape == (1, CLASSES) and attention.shape == (1, 3)
    assert torch.equal(fast(images, keep=keep), fast.vit(images, keep))


def test_networks_move_but_do_not_change_precision() -> None:
    vit = smi_kernels.SparseViT.from_timm(tiny().to(DEVICE))
    with pytest.raises(ValueError, match=r"folded for fp32; fold the model again"):
        vit.half()
    assert vit.to("meta").weights.patch_weight.is_meta


def test_a_precision_that_is_refused_leaves_the_model_alone() -> None:
    model = tiny().to(DEVICE)
    fast, images, before = (
        accelerate(model),
        torch.randn(1, 3, 16, 16, device=DEVICE),
        copy.deepcopy(model.state_dict()),
    )
    for change in (fast.half, fast.double, lambda: fast.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"folded for fp32; fold the model again"):
            change()
        now = model.state_dict()
        assert all(now[name].dtype == old.dtype and torch.equal(now[name], old) for name, old in before.items())
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    assert fast.to("meta").patch_embed.proj.weight.is_meta and fast.vit.weights.patch_weight.is_meta
