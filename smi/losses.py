"""Losses that plug in: factories of `smi.Objective`, to give to ``smi.invert(..., objectives=[...])``.

    from smi import losses
    smi.invert(model, targets, objectives=[losses.margin(), losses.low_pass(weight=0.1)])

Terms of the image or the logits run with fused iterations; those that read features (`embedding`,
`patch_similarity_entropy`, `head_similarity`) take the model's own modules. Soft labels need no loss of their own: give
an `Inversion` targets of shape (B, classes), and cross-entropy is taken with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from smi.adapters.timm import SparseModel, unsupported_reasons
from smi.adapters.timm_slots import frozen_twin
from smi.errors import SmiError
from smi.objectives import Context, Objective, described
from smi.state import ModelInfo
from smi.token_losses import head_similarity, patch_similarity_entropy
from smi.weights import weights_hash

__all__ = [
    "adversarial",
    "batch_norm_statistics",
    "bce",
    "embedding",
    "head_similarity",
    "low_pass",
    "margin",
    "patch_similarity_entropy",
]


def margin(confidence: float | None = None, *, weight: float = 1.0) -> Objective:
    """By how much the best other class beats the target: max_{j != y} z_j - z_y, (B,).

    Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, section V-A, f_6; as an
    inversion loss: Yuan et al., "Pseudo Label-Guided Model Inversion Attack", AAAI 2023, section 3.3. Its gradient does
    not fade as the target's probability nears 1, as that of cross-entropy does. Of soft targets y is the most probable.

    Args:
        confidence: the term is not pushed below -`confidence`, >= 0; None is without a limit.

    Raises:
        SmiError: a confidence below 0; during the inversion, a model of one class.
    """
    if confidence is not None and not confidence >= 0:
        raise SmiError(f"confidence is {confidence}; expected a number >= 0, or None.")

    def term(context: Context) -> Tensor:
        logits, targets = context.logits, context.targets
        if logits.shape[1] < 2:
            raise SmiError("the margin loss compares classes, but the model has only one; use losses.bce.")
        classes = (targets if targets.ndim == 1 else targets.argmax(1))[:, None]
        others = logits.scatter(1, classes, -math.inf).amax(1)
        value = others - logits.gather(1, classes)[:, 0]
        return value if confidence is None else value.clamp_min(-confidence)

    return Objective(term, weight, "margin", description=described("margin", confidence=confidence))


def bce(labels: Tensor | Sequence[Any], *, weight: float = 1.0) -> Objective:
    """Binary cross-entropy of every class apart, for targets of several labels, (B,).

    -1/C sum_c [ y_c log s(z_c) + (1 - y_c) log(1 - s(z_c)) ] with the sigmoid s: Bishop, "Pattern Recognition and
    Machine Learning", 2006, section 5.2, for independent binary classes. Set `Config.cross_entropy` to 0, or it goes on
    asking for the single class among the targets.

    Args:
        labels: (B, classes) in 0..1, or (classes,) for all images.

    Raises:
        SmiError: labels outside 0..1; during the inversion, another number of images or classes.
    """
    given = _numbers("labels", labels)
    if not ((given >= 0) & (given <= 1)).all():
        raise SmiError(f"labels reach from {given.min():g} to {given.max():g}; expected 0 (absent) to 1 (present).")
    wanted = _Constant(given)

    def term(context: Context) -> Tensor:
        goal = _broadcast("labels", wanted, context.logits)
        return F.binary_cross_entropy_with_logits(context.logits, goal, reduction="none").mean(1)

    return Objective(term, weight, "bce", description=described("bce", labels=given))


def embedding(
    target: Tensor | Sequence[Any],
    *,
    distance: Literal["cosine", "l2"] = "cosine",
    feature: str = "fc_norm",
    weight: float = 1.0,
) -> Objective:
    """Distance of the model's pooled features f to an embedding g, (B,).

    ``cosine`` is 1 - f.g / (|f| |g|), ``l2`` is |f - g|. Matching a representation in place of a class is Mahendran &
    Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015, equation 1 with its loss 4 (there
    squared and relative to |g|). Set `Config.cross_entropy` to 0 where the embedding alone is wanted.

    Args:
        target: (B, D), or (D,) for all images.
        feature: the submodule whose output (B, D) is compared; timm's ``fc_norm`` gives what the head sees. Of
            tokens (B, T, D), as from ``norm``, the first is compared.

    Raises:
        SmiError: an unknown distance; during the inversion, another number of images or features.
    """
    if distance not in ("cosine", "l2"):
        raise SmiError(f"distance is {distance!r}; expected 'cosine' or 'l2'.")
    given = _numbers("target", target)
    wanted = _Constant(given)

    def term(context: Context) -> Tensor:
        found = context.features[feature]
        found = found[:, 0] if found.ndim == 3 else found
        found = found.to(context.images.dtype)
        goal = _broadcast("target", wanted, found)
        return 1 - F.cosine_similarity(found, goal) if distance == "cosine" else (found - goal).norm(dim=1)

    description = described("embedding", target=given, distance=distance, feature=feature)
    return Objective(term, weight, "embedding", features=(feature,), description=description)


def low_pass(cutoff: float = 0.25, *, weight: float = 1.0) -> Objective:
    """Energy of the image above a spatial frequency, (B,): 1/(C H W) sum over |f| > cutoff of |F x(f)|^2.

    F is the orthonormal discrete Fourier transform, so by Parseval's theorem this is the mean square of what a low-pass
    filter takes away. Penalising high frequencies is Olah, Mordvintsev & Schubert, "Feature Visualization", Distill
    2017, "frequency penalization".

    Args:
        cutoff: cycles per pixel, 0 <= cutoff < sqrt(1/2); 0.5 is the finest frequency along a row or a column.

    Raises:
        SmiError: a cut-off above which no frequency lies, or below 0.
    """
    if not 0 <= cutoff < math.sqrt(0.5):
        raise SmiError(f"cutoff is {cutoff}; expected 0 to 0.7 cycles per pixel (0.25 is half the finest).")

    def term(context: Context) -> Tensor:
        images = context.images
        height, width = (torch.fft.fftfreq(n, device=images.device, dtype=images.dtype) for n in images.shape[2:])
        above = height[:, None].square() + width.square() > cutoff**2
        spectrum = torch.fft.fft2(images, norm="ortho")
        return ((spectrum.real.square() + spectrum.imag.square()) * above).mean((1, 2, 3))

    return Objective(term, weight, "low_pass", description=described("low_pass", cutoff=cutoff))


def batch_norm_statistics(
    network: nn.Module,
    info: ModelInfo,
    *,
    per_image: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    weight: float = 1.0,
) -> Objective:
    """Batch-norm statistics of a second network as image prior.

    sum_l |mean_l(x) - m_l| + sum_l |var_l(x) - v_l|, Euclidean norms over the channels of layer l, where m_l and v_l
    are the running statistics its batch norm stores: Yin et al., "Dreaming to Distill", CVPR 2020, equation 4. The
    published term takes mean_l and var_l (biased) over the batch and all positions, a scalar that couples the images.
    Under strict semantics they are taken over the positions of each image, (B,), so that an image does not depend on
    its batch; `per_image` chooses otherwise.

    Args:
        network: with at least one `nn.BatchNorm2d` that stores statistics, for images of as many channels; not
            modified. It runs in evaluation mode, in its own dtype.
        info: of the inverted model, ``SparseModel(model).info``: how its pixels are normalised.
        per_image: one value for each image, or one for the batch; None follows the semantics.
        mean, std: of `network`, per channel; default its timm data config.
        size: height and width in pixels that `network` sees; default those of the images.

    Raises:
        SmiError: a network without batch-norm statistics.
    """
    twin = frozen_twin(network).eval()
    layers = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not layers:
        raise SmiError(
            f"{type(network).__name__} has no BatchNorm2d with running statistics, so it is no image prior; use a "
            f"convolutional network with batch norm, such as a ResNet."
        )
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    view = _View(network, info, mean, std, size)

    def term(context: Context) -> Tensor:
        apart = context.per_image if per_image is None else per_image
        seen.clear()
        try:
            view.run(twin, context.augmented)
            return torch.stack([_distance_of_statistics(layer, x, apart) for layer, x in seen]).sum(0)
        finally:
            seen.clear()  # or the graph of this iteration would outlive it

    description = described(
        "batch_norm_statistics", network=weights_hash(network)[:16], per_image=per_image, **view.says
    )
    return Objective(term, weight, "batch_norm_statistics", description=description)


def _distance_of_statistics(layer: nn.BatchNorm2d, x: Tensor, per_image: bool) -> Tensor:
    """(B,) or a scalar: |mean - m| + |var - v| of (B, C, H, W) `x`."""
    assert layer.running_mean is not None and layer.running_var is not None
    axes = (2, 3) if per_image else (0, 2, 3)
    var, mean = torch.var_mean(x, axes, correction=0)
    return (mean - layer.running_mean).norm(dim=-1) + (var - layer.running_var).norm(dim=-1)


def adversarial(
    student: nn.Module,
    info: ModelInfo,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    weight: float = 1.0,
) -> Objective:
    """Competition with a student: images on which it disagrees with the inverted model, (B,) in 1 - log 2 to 1.

    1 - JS(p, q) for the probabilities p of the inverted model and q of the student, where
    JS(p, q) = 1/2 (KL(p | m) + KL(q | m)) and m = (p + q) / 2: R_compete of Yin et al., "Dreaming to Distill", CVPR
    2020, section 3.3 (Adaptive DeepInversion), in natural logarithms.

    A student that can be fed patches of the same grid is fed the kept ones; any other sees the augmented image. It is
    taken as it is at each iteration, in evaluation mode: its weights are shared, so training in place is seen here. It
    is described by the weights that it has when the loss is made.

    Args:
        student: with the classes of the inverted model; not modified.
        info: of the inverted model, ``SparseModel(model).info``.
        mean, std: of the student, per channel; default its timm data config.
        size: height and width in pixels that a student sees which is not fed patches; default those of the images.

    Raises:
        SmiError: a patch-fed student that cannot be used; during the inversion, other classes than the model's.
    """
    view = _View(student, info, mean, std, size)
    twin = frozen_twin(student).eval()
    sparse: SparseModel | None = None
    if size is None and not unsupported_reasons(student) and _same_patches(student, info):
        sparse = SparseModel(student, ranking="received_attention", backend="reference")

    def term(context: Context) -> Tensor:
        if sparse is None:
            logits = view.run(twin, context.augmented)
        else:
            keep = context.keep if context.keep.shape[1] < info.num_patches else None
            logits, _ = sparse.feed(view.normalise(context.images), keep, context.offsets)
        if logits.shape != context.logits.shape:
            raise SmiError(
                f"the student has {logits.shape[-1]} classes and the inverted model {context.logits.shape[1]}; create "
                f"the student with num_classes={context.logits.shape[1]}."
            )
        return 1 - _jensen_shannon(context.logits, logits.to(context.logits.dtype))

    description = described("adversarial", student=weights_hash(student)[:16], **view.says)
    return Objective(term, weight, "adversarial", description=description)


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """(B,) divergence of the distributions that (B, classes) logits stand for, in nats."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def _same_patches(student: Any, info: ModelInfo) -> bool:
    """Whether `student` takes images of the same size in the same patches."""
    embed = student.patch_embed
    theirs = (embed.proj.in_channels, *embed.img_size), tuple(embed.patch_size)
    return theirs == (info.input_size, info.patch_size)


class _View:
    """How another network sees the pixels of the inverted model: in its own normalisation, size and dtype.

    Attributes:
        says: mean, std and size, for a description.
    """

    def __init__(
        self,
        network: nn.Module,
        info: ModelInfo,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: tuple[int, int] | None,
    ) -> None:
        data = resolve_model_data_config(network)
        theirs = {"mean": data["mean"] if mean is None else mean, "std": data["std"] if std is None else std}
        channels = info.input_size[0]
        for name, values in theirs.items():
            if len(values) != channels:
                raise SmiError(
                    f"{name} of {type(network).__name__} has {len(values)} values; expected one for each of the "
                    f"{channels} channels. Give {name}=."
                )
        if size is not None and min(size) < 1:
            raise SmiError(f"size is {tuple(size)}; expected height and width in pixels, such as (224, 224).")
        scale = [ours / other for ours, other in zip(info.std, theirs["std"], strict=True)]
        triples = zip(info.mean, theirs["mean"], theirs["std"], strict=True)
        shift = [(ours - other) / std for ours, other, std in triples]
        self._scale, self._shift = (
            _Constant(torch.tensor(v, dtype=torch.float64).view(-1, 1, 1)) for v in (scale, shift)
        )
        self._size = size
        self.says = {**{name: tuple(map(float, values)) for name, values in theirs.items()}, "size": size}

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) as the network normalises; differentiable."""
        return images * self._scale.like(images) + self._shift.like(images)

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """What `network` gives for (B, C, H, W) `images` of the inverted model; differentiable."""
        seen = self.normalise(images)
        if self._size is not None and seen.shape[2:] != self._size:
            seen = F.interpolate(seen, self._size, mode="bilinear", antialias=True, align_corners=False)
        first = next(network.parameters())
        if first.device != seen.device:
            raise SmiError(
                f"{type(network).__name__} is on {first.device} and the images are on {seen.device}; move it there "
                f"before making the loss."
            )
        result: Tensor = network(seen.to(first.dtype))
        return result


def _numbers(name: str, values: Tensor | Sequence[Any]) -> Tensor:
    """(D,) or (B, D) finite floating-point numbers."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise SmiError(f"{name} are not numbers: {error}; expected (B, D), or (D,) for all images.") from None
    if tensor.ndim not in (1, 2) or not tensor.numel() or not torch.isfinite(tensor).all():
        raise SmiError(
            f"{name} have shape {tuple(tensor.shape)}; expected finite numbers (B, D), or (D,) for all images."
        )
    return tensor.detach() if tensor.is_floating_point() else tensor.float()


class _Constant:
    """Numbers that stay where they were used: what has to come from the host cannot be captured in a CUDA graph."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def shape(self) -> torch.Size:
        return self._values.shape

    def like(self, other: Tensor) -> Tensor:
        """In the dtype and on the device of `other`."""
        place = other.device, other.dtype
        if place not in self._placed:
            self._placed[place] = self._values.to(other)
        return self._placed[place]


def _broadcast(name: str, values: _Constant, like: Tensor) -> Tensor:
    """`values` as (B, D), the shape, dtype and device of `like`."""
    shape = values.shape
    if shape[-1] != like.shape[1] or (len(shape) == 2 and shape[0] != len(like)):
        raise SmiError(
            f"{name} have shape {tuple(shape)}; expected {tuple(like.shape)}, or ({like.shape[1]},) for all images."
        )
    return values.like(like).expand_as(like)
