"""What an inversion minimises: weighted terms, each a plain function of a `Context`, built in or the user's.

A term sees the same things whatever the strategy, so a loss written for dense inversion runs unmodified.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import smi_kernels
from smi.config import Config
from smi.errors import SmiError


@dataclass
class Context:
    """One iteration as a loss sees it.

    Attributes:
        step: iteration t, from 0. Reading it while a CUDA graph is captured raises RuntimeError, because the graph
            would repeat that number for ever; an inversion then runs the loss outside of graphs.
        images: (B, C, H, W) the pixels being optimised, un-augmented; differentiable.
        logits: (B, classes) of the fed patches; differentiable.
        targets: (B,) int64 classes, or (B, classes) probabilities.
        keep: (B, K) int64 surviving patches, un-augmented positions.
        offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip), or None when this iteration is not augmented; in a CUDA
            graph rows of zeros mean the same.
        features: outputs of the submodules the objective asked for by name; tokens are prefix, then fed patches.
        per_image: whether norms are taken image by image (strict semantics) or over the batch.
    """

    step: int
    images: Tensor
    logits: Tensor
    targets: Tensor
    keep: Tensor
    offsets: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)
    per_image: bool = True

    @cached_property
    def augmented(self) -> Tensor:
        """(B, C, H, W) the images as the network saw them, before patches were left out; differentiable."""
        return self.images if self.offsets is None else smi_kernels.augment(self.images, self.offsets)


def _get_step(context: Context) -> int:
    if capturing():
        raise RuntimeError("the loss reads context.step, a number that a CUDA graph would repeat for ever")
    step: int = context.__dict__["step"]
    return step


def _set_step(context: Context, step: int) -> None:
    context.__dict__["step"] = step


Context.step = property(_get_step, _set_step)  # type: ignore[assignment]  # after dataclass has seen a plain field


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Objective:
    """A weighted term of the loss.

    Attributes:
        function: ``function(context)`` gives one value for each image, (B,), or a scalar: their mean.
        weight: factor, finite.
        name: key in histories; default the function's own name.
        features: submodules of the model (``blocks.3``) whose outputs `function` reads from ``context.features``.
        capturable: whether it may be captured in a CUDA graph, which repeats its work on the device and does not run
            its Python code again; False for a function of anything else on the host that changes from call to call.
            What waits for the device, or reads ``context.step``, is found out and runs outside of graphs, with a note.
        differentiates: whether it asks autograd for derivatives of the logits itself, as a gradient penalty does. The
            network then runs through autograd, which fused iterations do without.
        description: what `function` computes, in words that change when that does, such as ``margin(confidence=5.0)``;
            see `identity`. Those of `smi.losses` describe themselves.
    """

    function: Callable[[Context], Tensor]
    weight: float = 1.0
    name: str = ""
    features: tuple[str, ...] = ()
    capturable: bool = True
    differentiates: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise SmiError(f"the weight of an objective is {self.weight}; expected a finite number.")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def identity(self) -> str:
        """What a pool remembers of this term, and asks for when it is resumed: the weight and the description.

        A function without a description is known by its name alone, and the text says so: two functions of one name
        are then taken for the same.
        """
        return f"{self.weight!r} * {self.description or f'{self.name} (known by its name alone)'}"


def described(name: str, **settings: Any) -> str:
    """``name(key=value, ...)`` for `Objective.description`; of a tensor, the hash of its shape, dtype and bytes."""
    return f"{name}({', '.join(f'{key}={_written(value)}' for key, value in settings.items())})"


def _written(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    held = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(held.shape)} {held.dtype}\n".encode())
    digest.update(held.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"


def cross_entropy(context: Context) -> Tensor:
    """(B,) cross-entropy with hard (B,) or soft (B, classes) targets."""
    return F.cross_entropy(context.logits, context.targets, reduction="none")


def tv1(context: Context) -> Tensor:
    """Total variation, mean absolute differences; (B,) or, over the batch, a scalar."""
    return smi_kernels.tv_l1(context.images, per_image=context.per_image)


def tv2(context: Context) -> Tensor:
    """Total variation, Frobenius norms; (B,) or, over the batch, a scalar."""
    return smi_kernels.tv_l2(context.images, per_image=context.per_image)


def l2(context: Context) -> Tensor:
    """Euclidean norm of the pixels; (B,) or, over the batch, a scalar."""
    return smi_kernels.l2_norm(context.images, per_image=context.per_image)


BUILT_IN = {"cross_entropy": cross_entropy, "tv1": tv1, "tv2": tv2, "l2": l2}


class Objectives:
    """The built-in terms with the config's weights, and the user's, as one differentiable scalar.

    With per-image norms the total is the sum over images of per-image losses, so that one image's gradient does not
    depend on how many others are in its batch; a scalar term then counts once for each image. With batch norms it is
    the batch mean of per-image terms plus the scalars, as published.
    """

    def __init__(self, config: Config, extra: Sequence[Objective | Callable[[Context], Tensor]] = ()) -> None:
        weights = {name: getattr(config, name) for name in BUILT_IN}
        self.terms = [Objective(BUILT_IN[name], weight, name) for name, weight in weights.items() if weight]
        self.extra = [term if isinstance(term, Objective) else Objective(term) for term in extra]
        self.terms += self.extra
        self.per_image = config.norm == "image"
        names = [term.name for term in self.terms]
        for name in names:
            if names.count(name) > 1 or name == "total":
                raise SmiError(f"two objectives are called {name!r}; give one of them another name=.")
        if not self.terms:
            raise SmiError("every objective has weight 0, so there is nothing to minimise; give one a positive weight.")

    @property
    def identity(self) -> tuple[str, ...]:
        """`Objective.identity` of each term that the config does not hold, in order."""
        return tuple(term.identity for term in self.extra)

    @property
    def features(self) -> tuple[str, ...]:
        """Submodules that some term wants to see."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.features))

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and the detached mean over images of each unweighted term and of ``total``."""
        total, means = self.add_up(self.terms, context)
        means["total"] = total.detach() / len(context.images) if self.per_image else total.detach()
        return total, means

    def add_up(self, terms: Sequence[Objective], context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the scalar that `terms` contribute, and the detached mean over images of each, unweighted."""
        B = context.images.shape[0]
        total = context.images.new_zeros(())
        means: dict[str, Tensor] = {}
        for term in terms:
            value = self._evaluate(term, context)
            # A sum, not B times the mean: its gradient is the weight to the last bit, however many images there are.
            total = total + term.weight * (value.expand(B).sum() if self.per_image else value.mean())
            means[term.name] = value.detach().mean()
        return total, means

    def each(self, context: Context) -> Tensor:
        """(B,) weighted objective of each image; terms that only exist for the batch count equally for all."""
        B = context.images.shape[0]
        return torch.stack([term.weight * self._evaluate(term, context).expand(B) for term in self.terms]).sum(0)

    @staticmethod
    def _evaluate(term: Objective, context: Context) -> Tensor:
        try:
            value = term.function(context)
        except RuntimeError as error:
            if "not have been used in the graph" not in str(error) or term.differentiates:
                raise
            raise SmiError(
                f"objective {term.name!r} differentiates something itself and found it unconnected; if that is the "
                f"logits, wrap it in smi.Objective(..., differentiates=True)."
            ) from error
        if not isinstance(value, Tensor) or value.shape not in ((), (context.images.shape[0],)):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SmiError(
                f"objective {term.name!r} returned {got}; expected a scalar tensor or one value for each of the "
                f"{context.images.shape[0]} images."
            )
        return value


class OwnTerms:
    """The user's terms as the loss of a `smi_kernels.PixelDescent`; their means go to `history` on the device.

    Attributes:
        keep: (B, K) int64, surviving patches; set a new one at every pruning.
        iteration: gives the iterations done.
        around_loss: why they must not be captured; empty if that may be tried.
    """

    def __init__(
        self, objectives: Objectives, targets: Tensor, keep: Tensor, still: Container[int], history: dict[str, Tensor]
    ) -> None:
        self.keep = keep
        self.iteration: Callable[[], int] = lambda: 0
        refusing = [term.name for term in objectives.extra if not term.capturable]
        self.around_loss = f"objective {refusing[0]!r} is not capturable" if refusing else ""
        self._objectives, self._targets, self._still, self._history = objectives, targets, still, history

    def __call__(self, images: Tensor, logits: Tensor, offsets: Tensor, step: Tensor) -> Tensor:
        t = self.iteration()
        context = Context(
            step=t,
            images=images,
            logits=logits,
            targets=self._targets,
            keep=self.keep,
            offsets=None if t in self._still and not capturing() else offsets,
            per_image=self._objectives.per_image,
        )
        total, means = self._objectives.add_up(self._objectives.extra, context)
        for name, mean in means.items():
            history = self._history[name]
            history.index_copy_(0, step, mean.to(history.dtype).view(1))
        return total
