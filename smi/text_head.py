"""Image towers of CLIP, SigLIP and their kin as classifiers: their classes are frozen embeddings of texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import smi_kernels
from smi.errors import SmiError


def with_text_head(
    model: nn.Module,
    text_embeddings: Tensor,
    logit_scale: float = 100.0,
    bias: float = 0.0,
    *,
    class_names: Sequence[str] = (),
) -> nn.Module:
    """A copy of an image tower whose logits compare its embedding with those of texts.

        tower = timm.create_model("vit_base_patch32_clip_224.openai", pretrained=True)     # 512 features
        model = smi.with_text_head(tower.eval(), text_embeddings, class_names=prompts)     # of the same checkpoint
        result = smi.invert(model, targets=[0, 1, 2])

    ``logits = logit_scale * x / |x| . t / |t| + bias`` (Radford et al., ICML 2021, figure 3; the bias is that of Zhai
    et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023).

    Args:
        model: a timm image tower whose output is the embedding x, (B, E); not modified, and its weights are shared.
        text_embeddings: (classes, E) floating, as the checkpoint's own text tower gives them; any length above 0.
        logit_scale: the factor itself: ``model.logit_scale.exp()`` of the checkpoint, 100 for most of CLIP's.
        bias: ``logit_bias`` of a SigLIP checkpoint.
        class_names: of the texts, for people; they become ``model.pretrained_cfg['label_names']``.

    Returns:
        the model with ``head`` followed by a frozen `smi_kernels.CosineClassifier`, and as many classes as texts.

    Raises:
        SmiError: no model with one head, embeddings that cannot be used or are longer or shorter than the model's, or
            not as many names as texts.
    """
    width = getattr(model, "num_classes", None) or getattr(model, "num_features", None)
    head = getattr(model, "head", None)
    if width is None or not isinstance(head, nn.Module) or hasattr(model, "head_dist"):
        raise SmiError(f"{type(model).__name__} has no single head to follow; expected a timm image tower.")
    try:
        classifier = smi_kernels.CosineClassifier(text_embeddings, logit_scale, bias)
    except ValueError as error:
        raise SmiError(f"text_embeddings: {error}") from None
    classes, length = text_embeddings.shape
    if length != width:
        raise SmiError(
            f"the texts' embeddings have {length} numbers, the model's {width}; take both from one checkpoint, the "
            f"model with its projection (num_classes={length})."
        )
    if class_names and len(class_names) != classes:
        raise SmiError(f"class_names has {len(class_names)} entries for {classes} texts; give one for each.")
    first = next(model.parameters())
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made: Any = copy.deepcopy(model, shared)
    made.head = nn.Sequential(made.head, classifier.to(first.device, first.dtype))
    made.head.train(model.training)
    made.num_classes = classes
    card = getattr(model, "pretrained_cfg", None)
    if class_names:
        made.pretrained_cfg = {**(card or {}), "label_names": list(class_names)}
    return made
