"""What the library sees in a model and in this installation, and every reason why something is not to be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from smi.adapters.timm import SparseModel
from smi.config import Precision
from smi.errors import SmiError
from smi.flops import count_flops
from smi.predict import saved_bytes
from smi_kernels import backends


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `doctor`.

    Attributes:
        name: of the model.
        supported: whether it can be inverted.
        reason: why not; empty if it can.
        facts: label -> plain value (number, text or list), empty if it cannot.
        backends: implementations of the operations, live or not, with the reason.
    """

    name: str
    supported: bool
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)
    backends: list[backends.Backend] = field(default_factory=list)


def doctor(
    model: nn.Module | str,
    *,
    name: str | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    backend: str = "auto",
) -> Diagnosis:
    """Examine a model, or the model of that name. An unsupported one is a finding, not an error.

    Raises:
        SmiError: no model of that name, or its weights are not to be had.
    """
    if isinstance(model, str):
        from smi.models import load_model

        name, model = name or model, load_model(model)
    name = name or type(model).__name__
    try:
        sparse = SparseModel(model, name=name, device=device, precision=precision, backend=backend)
    except SmiError as error:
        return Diagnosis(name, False, str(error), backends=backends.status())

    info = sparse.info
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    facts = {
        "architecture": type(model).__name__,
        "device": str(sparse.device),
        "backend": sparse.backend,
        "against kernels": sparse.against_kernels,
        "input size": list(info.input_size),
        "patch size": list(info.patch_size),
        "grid": list(info.grid),
        "patches": info.num_patches,
        "tokens": info.num_patches + info.num_prefix_tokens,
        "prefix tokens": info.num_prefix_tokens,
        "classes": info.num_classes,
        "ranking": info.ranking,
        "mean": list(info.mean),
        "std": list(info.std),
        "weights sha256": info.weights_sha256,
        "weights bytes": weights,
        "activation bytes per image": saved_bytes(sparse, info.num_patches)[1],
        "flops per image and iteration": count_flops(sparse, info.num_patches),
        "difference from timm": sparse.difference,
    }
    return Diagnosis(name, True, "", facts, backends.status())
