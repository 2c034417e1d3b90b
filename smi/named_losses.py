"""Those of `smi.losses` that can be named in a line of text: ``margin:confidence=5,weight=0.1``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smi.errors import SmiError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

    from smi.adapters.timm import SparseModel
    from smi.objectives import Objective

WITNESS = "embedded:judge"


def _yes(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+"))


def _size(text: str) -> tuple[int, int]:
    height, width = (int(part) for part in text.split("x"))
    return height, width


@dataclass(frozen=True)
class Setting:
    """One ``key=value``: how the value is read, and an example of it."""

    read: Callable[[str], Any]
    example: str


_NETWORK = {
    "model": Setting(str, "resnet18"),
    "checkpoint": Setting(str, "weights.pth"),
    "num_classes": Setting(int, "10"),
    "size": Setting(_size, "224x224"),
}
_BLOCKS = Setting(_numbers, "0+5+11")
_WEIGHT = Setting(float, "0.1")


@dataclass(frozen=True)
class Named:
    """A loss that can be named.

    Attributes:
        about: one line.
        settings: what can be set beside ``weight``.
    """

    about: str
    settings: Mapping[str, Setting]

    @property
    def needs_network(self) -> bool:
        """Whether it looks through a second network, which ``model=`` has to name."""
        return "model" in self.settings


NAMED = {
    "margin": Named("how far the best other class is ahead of the target", {"confidence": Setting(float, "5")}),
    "low_pass": Named("energy of the image above a spatial frequency", {"cutoff": Setting(float, "0.25")}),
    "patch_similarity_entropy": Named(
        "negative entropy of how alike patches are in attention blocks (PSAQ-ViT)",
        {"blocks": _BLOCKS, "bandwidth": Setting(float, "0.1")},
    ),
    "head_similarity": Named("how unlike the heads of a block attend (MimiQ)", {"blocks": _BLOCKS}),
    "batch_norm_statistics": Named(
        "distance from the batch-norm statistics of a second network (DeepInversion)",
        {**_NETWORK, "per_image": Setting(_yes, "true")},
    ),
    "adversarial": Named("agreement with a student, to be lowered (Adaptive DeepInversion)", _NETWORK),
}
IN_PYTHON = {
    "bce": "binary cross-entropy of every class apart; takes labels",
    "embedding": "distance of pooled features to an embedding; takes the embedding",
}


@dataclass(frozen=True)
class LossSpec:
    """A loss as it was named: key of `NAMED`, and its settings, ``weight`` among them."""

    name: str
    settings: Mapping[str, Any]


def parse_loss(text: str) -> LossSpec:
    """``NAME`` or ``NAME:key=value,...``; lists are written 0+5+11, sizes 224x224.

    Raises:
        SmiError: no such loss or setting, a value that cannot be read, a second network that is not named.
    """
    name, _, rest = text.partition(":")
    name = name.strip().replace("-", "_")
    if name in IN_PYTHON:
        raise SmiError(f"--loss {text!r}: {name} cannot be named in a line ({IN_PYTHON[name]}); use smi.losses.{name}.")
    if name not in NAMED:
        raise SmiError(f"--loss {text!r}: unknown loss {name!r}.{did_you_mean(name, NAMED)}")
    allowed = {**NAMED[name].settings, "weight": _WEIGHT}
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key = key.replace("-", "_")
        if not equals:
            raise SmiError(f"--loss {text!r}: {part!r} is not KEY=VALUE; write e.g. {name}:weight=0.1.")
        if key not in allowed:
            raise SmiError(f"--loss {text!r}: {name} has no setting {key!r}.{did_you_mean(key, allowed)}")
        if key in settings:
            raise SmiError(f"--loss {text!r}: {key} is given twice; leave one of them out.")
        settings[key] = _read(text, key, value, allowed[key])
    if NAMED[name].needs_network:
        _check_network(text, name, settings)
    return LossSpec(name, settings)


def _read(text: str, key: str, value: str, setting: Setting) -> Any:
    try:
        return setting.read(value)
    except (KeyError, ValueError):
        raise SmiError(f"--loss {text!r}: {key} is {value!r}; expected e.g. {key}={setting.example}.") from None


def _check_network(text: str, name: str, settings: Mapping[str, Any]) -> None:
    if "model" not in settings:
        raise SmiError(f"--loss {text!r}: {name} looks through a second network; name it with model=NAME.")
    if settings["model"] == WITNESS:
        raise SmiError(
            f"--loss {text!r}: {WITNESS} says afterwards whether the images show their classes, and could no longer "
            f"be believed; name another network."
        )


def make_losses(specs: Sequence[LossSpec], model: SparseModel) -> list[Objective]:
    """The objectives of `specs`, for inverting `model`. Second networks are loaded to its device.

    Raises:
        SmiError: a network that cannot be had or used, see `smi.load_model` and `smi.losses`; one loss named twice.
    """
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise SmiError(
                f"--loss {name} is given {names.count(name)} times; give it once, with the weight it is to have."
            )
    return [_make(spec, model) for spec in specs]


def _make(spec: LossSpec, model: SparseModel) -> Objective:
    from smi import losses

    factory: Callable[..., Objective] = getattr(losses, spec.name)
    settings = dict(spec.settings)
    if NAMED[spec.name].needs_network:
        network = _load(settings, model.device)
        return factory(network, model.info, **settings)
    if "blocks" in NAMED[spec.name].settings:
        return factory(model.original, **settings)
    return factory(**settings)


def _load(settings: dict[str, Any], device: torch.device) -> nn.Module:
    """The second network, whose settings are taken out."""
    from smi.models import load_model

    given = {key: settings.pop(key) for key in ("checkpoint", "num_classes") if key in settings}
    return load_model(settings.pop("model"), **given).to(device)


def usage(name: str) -> str:
    """``name:key=example,...``, as `parse_loss` takes it."""
    settings = {**NAMED[name].settings, "weight": _WEIGHT}
    return f"{name}:{','.join(f'{key}={setting.example}' for key, setting in settings.items())}"
