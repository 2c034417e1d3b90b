"""Short quantization-aware training on the calibration images: what few bits lose, weights and ranges learn back.

The exported network is prepared by torchao's ``prepare_qat_pt2e`` with the same sites, and imitates the float network's
logits (Hinton et al., 2015, section 2). Rounding passes gradients straight through (Bengio et al., 2013); the step of
each activation is learned (Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1) from where calibration
put it, and weights are rounded to nearest at each step, as conversion rounds them afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smi.errors import SmiError
from smi.transfer import divergence

if TYPE_CHECKING:
    from smi.adapters.timm_quantize import TokenModel
    from smi.calibration import Calibration

# A step of an activation moves by its own share where a weight moves by the learning rate.
_RANGE_RATE = 10.0


@dataclass(frozen=True)
class Refinement:
    """How long to train, and how fast.

    Attributes:
        steps: of Adam, each on `batch_size` of the images that calibrate.
        learning_rate: of the weights at first; it falls to zero along a cosine.
        batch_size: images of one step.
        seed: of the order of the images.

    Raises:
        SmiError: steps or batch size below 1, a learning rate that is not positive and finite, a negative seed.
    """

    steps: int = 200
    learning_rate: float = 1e-4
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SmiError(f"{name} of the refinement is {value!r}; expected a whole number of at least {least}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise SmiError(
                f"learning_rate of the refinement is {self.learning_rate}; expected a positive number, such as 1e-4."
            )


@dataclass(frozen=True)
class Divergences:
    """KL(float || quantized) of the classes' probabilities, in nats, mean over images.

    Attributes:
        calibration: (before, after), of the images trained on, as they were fed.
        held_out: (before, after), of the images that were not, whole.
    """

    calibration: tuple[float, float]
    held_out: tuple[float, float]


def refine(
    tokens: TokenModel,
    prepared: Any,
    activations: dict[str, Any],
    calibration: Calibration,
    options: Refinement,
    on_step: Callable[[int, int], None] | None = None,
) -> Divergences:
    """Train the weights of `prepared` and the steps of its activations, in place; then copy the weights into `tokens`.

    Args:
        tokens: the float network, which is imitated.
        prepared: its graph with fake quantization, from ``prepare_qat_pt2e``; of images and cells where the calibration
            is sparse.
        activations: by name of the site, the learnable fake quantization of `prepared`.

    Raises:
        SmiError: a loss or its gradient is not finite.
    """
    images, cells = _all(calibration)
    held = calibration.held_out
    whole = torch.arange(tokens.vit.patch_embed.num_patches).expand(len(held), -1) if calibration.sparse else None
    wanted, wanted_held = _logits(tokens, images, cells, options), _logits(tokens, held, whole, options)

    def losses() -> tuple[float, float]:
        pairs = (
            (_logits(prepared, images, cells, options), wanted),
            (_logits(prepared, held, whole, options), wanted_held),
        )
        first, second = (divergence(logits, target, 1.0).item() for logits, target in pairs)
        return first, second

    before = losses()
    _train(prepared, activations, images, cells, wanted, options, on_step)
    after = losses()
    if not math.isfinite(sum(after)):
        raise _not_finite(options)
    trained = dict(prepared.named_parameters())
    with torch.no_grad():
        for name, value in tokens.named_parameters():
            value.copy_(trained[name])
    return Divergences((before[0], after[0]), (before[1], after[1]))


def _train(
    prepared: Any,
    activations: dict[str, Any],
    images: Tensor,
    cells: Tensor | None,
    wanted: Tensor,
    options: Refinement,
    on_step: Callable[[int, int], None] | None,
) -> None:
    steps = [module.scale for module in activations.values()]
    ranges = {id(step) for step in steps}
    weights = [value for value in prepared.parameters() if id(value) not in ranges and value.is_floating_point()]
    groups = [{"params": weights, "lr": options.learning_rate}]
    groups += [{"params": [step], "lr": options.learning_rate * _RANGE_RATE * float(step)} for step in steps]
    for value in (*weights, *steps):
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(groups)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / options.steps)))
    draw = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.int64)
    size = min(options.batch_size, len(images))
    for step in range(options.steps):
        if len(order) < size:
            order = torch.cat((order, torch.randperm(len(images), generator=draw)))
        chosen, order = order[:size], order[size:]
        loss = divergence(_run(prepared, images, cells, chosen), wanted[chosen], 1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        slope = torch.nn.utils.get_total_norm([value.grad for value in (*weights, *steps) if value.grad is not None])
        if not math.isfinite(loss.item() + slope.item()):  # observers fail on what such a step would leave
            raise _not_finite(options)
        optimizer.step()
        fall.step()
        if on_step is not None:
            on_step(step + 1, options.steps)
    for value in (*weights, *steps):
        value.requires_grad_(False)


def _all(calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    """All images that calibrate, and their cells; an image is fed many times here, so they stay in memory."""
    batches = list(calibration.read())
    cells = [one for _, one in batches if one is not None]
    return torch.cat([images for images, _ in batches]), torch.cat(cells) if cells else None


def _logits(run: Any, images: Tensor, cells: Tensor | None, options: Refinement) -> Tensor:
    with torch.no_grad():
        parts = torch.arange(len(images)).split(options.batch_size)
        return torch.cat([_run(run, images, cells, part) for part in parts])


def _run(run: Any, images: Tensor, cells: Tensor | None, chosen: Tensor) -> Tensor:
    logits: Tensor = run(images[chosen]) if cells is None else run(images[chosen], cells[chosen])
    return logits


def _not_finite(options: Refinement) -> SmiError:
    return SmiError(
        f"the loss of the refinement is not finite; use a lower learning_rate than {options.learning_rate:g}."
    )
