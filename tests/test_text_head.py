"""Image towers with embeddings of texts as their classes, against the formula, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import one_thread, tiny  # noqa: F401
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import smi
import smi_kernels
from smi import SmiError

E, CLASSES = 6, 4


def texts() -> Tensor:
    return torch.randn(CLASSES, E, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.1], [1], [7], [50]])


def tower(**options: Any) -> Any:
    return tiny(num_classes=E, **options)


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_logits_are_scaled_cosines() -> None:
    model = tower()
    made = smi.with_text_head(model, texts(), logit_scale=20.0, bias=-3.0)
    found, embedding = made(pixels()).detach(), model(pixels()).detach()
    for image, label in ((0, 0), (1, 3), (1, 2)):
        x, t = embedding[image].double(), texts()[label].double()
        cosine = (x @ t) / ((x @ x) * (t @ t)).sqrt()
        assert found[image, label].item() == pytest.approx(20 * cosine.item() - 3, rel=1e-5)
    assert found.shape == (2, CLASSES) and made.num_classes == CLASSES and not made.training


def test_the_model_is_left_alone_and_shares_its_weights() -> None:
    model = tower()
    before = model(pixels())
    made: Any = smi.with_text_head(model, texts(), class_names=list("abcd"))
    assert isinstance(model.head, nn.Linear) and model.num_classes == E and torch.equal(model(pixels()), before)
    assert all(a is b for a, b in zip(model.parameters(), made.parameters(), strict=True))
    sparse = smi.SparseModel(made)
    assert sparse.info.class_names == tuple("abcd") and sparse.info.num_classes == CLASSES
    assert sparse.info.weights_sha256 != smi.SparseModel(smi.with_text_head(model, texts().flip(0))).info.weights_sha256


def test_a_tower_whose_output_is_its_pooled_features() -> None:
    model = tiny(num_classes=0)
    made = smi.with_text_head(model.double(), torch.eye(16), logit_scale=1.0)
    features = model(pixels().double())
    torch.testing.assert_close(made(pixels().double()), features / features.norm(dim=1, keepdim=True))


def test_inversion_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = smi.with_text_head(tower(), texts(), logit_scale=10.0)
    config = smi.Config(iterations=30, prune_at=(5, 10), prune_ratio=(0.3, 0.3), learning_rate=0.1)
    result = smi.invert(model, targets=[0, 3], config=config)
    cross_entropy = result.history["cross_entropy"]
    assert cross_entropy[-1] < 0.8 * cross_entropy[0]


def test_a_quantized_one_goes_on_comparing() -> None:
    from smi.adapters.timm_quantize import TokenModel

    model = smi.with_text_head(tower(), texts())
    torch.testing.assert_close(TokenModel(model)(pixels()), model(pixels()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"text_embeddings": torch.ones(3, 5)}, "the texts' embeddings have 5 numbers, the model's 6; take both from"),
        ({"text_embeddings": torch.ones(6)}, r"text_embeddings: embeddings have shape \(6,\)"),
        ({"text_embeddings": torch.ones(3, 6, dtype=torch.int64)}, "dtype torch.int64; expected one floating"),
        ({"text_embeddings": torch.ones(3, 6) * torch.tensor([[1], [0], [1]])}, "row 1 of the embeddings has length 0"),
        ({"text_embeddings": torch.full((2, 6), torch.nan)}, "row 0 of the embeddings has length nan"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0 .*give its exp"),
        ({"bias": float("inf")}, "bias inf; expected"),
        ({"class_names": ["a"]}, "class_names has 1 entries for 4 texts"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SmiError, match=complaint):
        smi.with_text_head(tower(), **{"text_embeddings": texts(), **arguments})


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(SmiError, match="Linear has no single head to follow"):
        smi.with_text_head(nn.Linear(2, 2), texts())
    distilled = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=E)
    with pytest.raises(SmiError, match="VisionTransformerDistilled has no single head"):
        smi.with_text_head(distilled, texts())


def test_the_classifier_alone() -> None:
    classifier = smi_kernels.CosineClassifier(texts().double(), 2.0)
    assert torch.allclose(classifier.weight.norm(dim=1), torch.full((CLASSES,), 2.0, dtype=torch.float64))
    assert not list(classifier.parameters())
    torch.testing.assert_close(classifier(3 * texts().double()).diagonal(), torch.full((CLASSES,), 2.0).double())
