"""What the classes of a timm model are called."""

from __future__ import annotations

import functools
import re
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset


def known_names(model: Any) -> tuple[str, ...]:
    """Names of the classes: ``label_names`` of the model's card, else those of ImageNet where that tells; or none.

    They may repeat: two classes of ImageNet are cranes, a bird and a machine.
    """
    card = getattr(model, "pretrained_cfg", None) or {}
    if card.get("label_names"):
        return tuple(card["label_names"])
    # The tag tells what the published head was trained on, the number that this head is like it.
    published = model.num_classes == card.get("num_classes") and re.search(r"in\d+k", card.get("tag") or "")
    subset = infer_imagenet_subset(card) if published else None
    return () if subset is None else _imagenet(subset)


@functools.cache
def _imagenet(subset: str) -> tuple[str, ...]:
    """The first synonym of each class."""
    return tuple(synonyms.split(",")[0] for synonyms in ImageNetInfo(subset).label_descriptions())
