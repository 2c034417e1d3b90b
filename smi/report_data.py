"""What a report says, gathered from finished batches one at a time: counts, agreements, costs and a few pictures.

Nothing here draws or writes; a pool of any size passes through in the memory of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smi.dataset import Fill, fill_dropped, patch_mask
from smi.errors import SmiError
from smi.modes import evaluating
from smi.pool import to_pixels
from smi.rebirth import taken_at

if TYPE_CHECKING:
    from smi.config import Config
    from smi.state import ModelInfo, Result

Array = NDArray[Any]
FILLS: tuple[Fill, ...] = ("as-is", "mean")
_JUDGE_BATCH = 64


@dataclass
class Frame:
    """One picture of one image: `pixels` (H, W, 3) uint8 and `live` (rows, columns) bool at `iteration`."""

    iteration: int
    pixels: Array
    live: Array


@dataclass
class Picture:
    """An image that is shown: its frames over the stages (the last is the result) and when its patches were dropped.

    Attributes:
        index, target, predicted: image number, its class, the teacher's argmax.
        probability: the teacher's softmax of the target.
        frames: at least one.
        dropped_at: (rows, columns) float64, NaN where the patch never was.
    """

    index: int
    target: int
    predicted: int
    probability: float
    frames: list[Frame]
    dropped_at: Array


@dataclass
class ClassTally:
    """Sums over the images of one class; `judge` counts agreements for each of `FILLS`."""

    images: int = 0
    teacher: int = 0
    probability: float = 0.0
    judge: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILLS, 0))


@dataclass
class PhaseTally:
    """Sums over the batches of one phase; `iterations` counts each batch's own, `stops` are their (half-open) ends."""

    start: int
    kept: int
    iterations: int = 0
    seconds: float = 0.0
    flops: int = 0
    tokens: int = 0
    stops: set[int] = field(default_factory=set)


class Curve:
    """Mean, lowest and highest batch at every iteration; batches that stopped early count as far as they go."""

    def __init__(self) -> None:
        self.total, self.count = np.zeros(0), np.zeros(0)
        self.low, self.high = np.zeros(0), np.zeros(0)

    def add(self, values: Array) -> None:
        """`values` (iterations,) float; non-finite ones are left out."""
        longer = max(0, len(values) - len(self.total))
        self.total, self.count = np.pad(self.total, (0, longer)), np.pad(self.count, (0, longer))
        self.low = np.pad(self.low, (0, longer), constant_values=np.inf)
        self.high = np.pad(self.high, (0, longer), constant_values=-np.inf)
        at = np.flatnonzero(np.isfinite(values))
        self.total[at] += values[at]
        self.count[at] += 1
        self.low[at] = np.minimum(self.low[at], values[at])
        self.high[at] = np.maximum(self.high[at], values[at])

    @property
    def mean(self) -> Array:
        """(iterations,) float64, NaN where no batch has a finite value."""
        return np.divide(self.total, self.count, out=np.full(len(self.total), np.nan), where=self.count > 0)

    @property
    def vanishes(self) -> bool:
        """True when no batch ever had anything but zero."""
        return not bool(np.any(self.low[self.count > 0]) or np.any(self.high[self.count > 0]))


class Tally:
    """Everything a report needs; call `add` for every finished batch.

    Args:
        info, config: of the pool.
        judge: a second classifier over the same classes, fed whole images, normalised with the mean and std of its
            ``pretrained_cfg`` (as timm sets it), without one as the model's own.
        max_images: of how many images pictures are kept.
    """

    def __init__(
        self, info: ModelInfo, config: Config, *, judge: nn.Module | None = None, max_images: int = 16
    ) -> None:
        self.info, self.config, self.judge, self.max_images = info, config, judge, max_images
        self.batches = 0
        self.peak_memory: int | None = None
        self.classes: dict[int, ClassTally] = {}
        self.phases: dict[tuple[int, int], PhaseTally] = {}
        self.tokens_dense = 0
        self.flops_dense: int | None = 0
        self.curves: dict[str, Curve] = {}
        self.losses: dict[str, float] = {}
        self.pictures: list[Picture] = []
        self.prunings: set[int] = set()
        n = info.num_patches
        self.survived, self.drop_sum, self.drop_count = np.zeros(n), np.zeros(n), np.zeros(n)

    def add(self, result: Result) -> None:
        """Count one finished batch.

        Raises:
            SmiError: the judge does not speak of the model's classes.
        """
        self.batches += 1
        self.peak_memory = max((n for n in (self.peak_memory, result.peak_memory) if n is not None), default=None)
        self._add_agreement(result)
        self._add_cost(result)
        self._add_drops(result)
        for name, values in result.history.items():
            self.curves.setdefault(name, Curve()).add(values.double().numpy())
        for name, values in result.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(values.double().sum())
        self._add_pictures(result)

    @property
    def images(self) -> int:
        return sum(c.images for c in self.classes.values())

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.phases.values())

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.phases.values())

    @property
    def seconds(self) -> float:
        return math.fsum(p.seconds for p in self.phases.values())

    def summary(self) -> dict[str, Any]:
        """The headline numbers, JSON-serialisable; shares lie in 0..1, ``None`` is "not known"."""
        images, classes = self.images, self.classes.values()
        judge = {fill: sum(c.judge[fill] for c in classes) / images for fill in FILLS}
        return {
            "model": self.info.name,
            "strategy": self.config.strategy,
            "semantics": self.config.semantics,
            "images": images,
            "classes": len(classes),
            "teacher_agreement": sum(c.teacher for c in classes) / images,
            "target_probability": _finite(math.fsum(c.probability for c in classes) / images),
            "judge_agreement": judge if self.judge is not None else None,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "tokens": self.tokens,
            "tokens_dense": self.tokens_dense,
            "tokens_ratio": self.tokens / self.tokens_dense if self.tokens_dense else None,
            "flops": self.flops,
            "flops_dense": self.flops_dense,
            "flops_ratio": self.flops / self.flops_dense if self.flops_dense else None,
            "losses": {name: _finite(total / images) for name, total in self.losses.items()},
        }

    def _add_agreement(self, result: Result) -> None:
        predicted = result.logits.argmax(1)
        probability = result.logits.double().softmax(1).gather(1, result.targets[:, None])[:, 0]
        judged = self._judge(result) if self.judge is not None else {}
        for i, target in enumerate(result.targets.tolist()):
            count = self.classes.setdefault(target, ClassTally())
            count.images += 1
            count.teacher += int(predicted[i] == target)
            count.probability += float(probability[i])
            for fill, agrees in judged.items():
                count.judge[fill] += int(agrees[i])

    def _judge(self, result: Result) -> dict[str, Tensor]:
        """Fill -> (B,) bool: does the judge's argmax equal the target?"""
        assert self.judge is not None
        mean, std = _normalisation(self.judge, self.info)
        agrees: dict[str, Tensor] = {}
        for fill in FILLS:
            filled = fill_dropped(result.images, result.keep, result.indices, self.info, self.config.seed, fill)
            agrees[fill] = classify(self.judge, renormalise(filled, self.info, mean, std), self.info) == result.targets
        return agrees

    def _add_cost(self, result: Result) -> None:
        prefix, patches = self.info.num_prefix_tokens, self.info.num_patches
        images, repeat = len(result.targets), self.config.images_per_trajectory
        iterations = sum(p.stop - p.start for p in result.phases)
        for phase in result.phases:
            tally = self.phases.setdefault((phase.start, phase.kept), PhaseTally(phase.start, phase.kept))
            tally.iterations += phase.stop - phase.start
            tally.seconds += phase.seconds
            tally.flops += phase.flops
            tally.tokens += (phase.stop - phase.start) * (images // repeat) * (phase.kept + prefix)
            tally.stops.add(phase.stop)
        self.tokens_dense += iterations * images * (patches + prefix)
        first = result.phases[0] if result.phases else None
        merged = self.config.strategy == "fusion"  # then what fed all patches did less than a dense iteration
        if first is None or first.kept != patches or first.flops == 0 or merged or self.flops_dense is None:
            self.flops_dense = None
        else:
            self.flops_dense += repeat * first.flops * iterations // (first.stop - first.start)

    def _add_drops(self, result: Result) -> None:
        dropped = drop_iterations(result)
        never = np.isnan(dropped)
        self.survived += never.sum(0)
        self.drop_count += (~never).sum(0)
        self.drop_sum += np.where(never, 0, dropped).sum(0)
        self.prunings.update(int(t) for t in np.unique(dropped[~never]))

    def _add_pictures(self, result: Result) -> None:
        """Images with snapshots tell more, so they come first; a pool made without any shows its results alone."""
        shot = result.snapshots.shape[1] if result.snapshots.ndim == 5 and len(result.snapshot_at) else 0
        available = shot or len(result.targets)
        dropped = drop_iterations(result).reshape(-1, *self.info.grid)
        kept = patch_mask(result.keep, self.info.num_patches).view(-1, *self.info.grid).numpy()
        for i in range(min(available, self.max_images - len(self.pictures))):
            frames = []
            own = taken_at(self.config, int(result.indices[i]))
            for stage, at in enumerate(result.snapshot_at if shot else []):
                last = stage == len(result.snapshot_at) - 1
                if at >= own and not last:  # of the trajectory that this image has left
                    continue
                # The result is shown with the mask that is stored with it, which re-ranking may have changed.
                live = kept[i] if last else ~(dropped[i] <= at)
                frames.append(Frame(min(at, own), _rgb(result.snapshots[stage, i]), live))
            if not frames:
                frames.append(Frame(iterations_done(result), _rgb(to_pixels(result.images[i], self.info)), kept[i]))
            target = int(result.targets[i])
            self.pictures.append(
                Picture(
                    index=int(result.indices[i]),
                    target=target,
                    predicted=int(result.logits[i].argmax()),
                    probability=float(result.logits[i].double().softmax(0)[target]),
                    frames=frames,
                    dropped_at=dropped[i],
                )
            )


def collect(
    results: Iterable[Result], info: ModelInfo, config: Config, *, judge: nn.Module | None = None, max_images: int = 16
) -> Tally:
    """The tally of `results`, each of which may be freed before the next is made.

    Raises:
        SmiError: `max_images` is negative; see `Tally.add`.
    """
    if max_images < 0:
        raise SmiError(f"max_images is {max_images}; expected 0 or more.")
    tally = Tally(info, config, judge=judge, max_images=max_images)
    for result in results:
        tally.add(result)
    return tally


def iterations_done(result: Result) -> int:
    """Iterations of this batch: what `dropped_at` holds for the patches that were never dropped."""
    return int(result.dropped_at.max())


def drop_iterations(result: Result) -> Array:
    """(B, N) float64: the iteration at which each patch was dropped, NaN if it never was."""
    dropped = result.dropped_at.double().numpy()
    return np.where(dropped < iterations_done(result), dropped, np.nan)


def renormalise(images: Tensor, info: ModelInfo, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, C, H, W) float32 in the model's normalised space -> the same pictures normalised with `mean` and `std`."""
    if (tuple(mean), tuple(std)) == (tuple(info.mean), tuple(info.std)):
        return images
    pictures = images * _columns(info.std) + _columns(info.mean)
    return (pictures - _columns(mean)) / _columns(std)


def _columns(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _rgb(picture: Tensor) -> Array:
    """(C, H, W) uint8, C = 1 or 3 -> (H, W, 3) uint8, a copy."""
    return picture.expand(3, -1, -1).permute(1, 2, 0).numpy().copy()


def _normalisation(judge: nn.Module, info: ModelInfo) -> tuple[tuple[float, ...], tuple[float, ...]]:
    data: Any = getattr(judge, "pretrained_cfg", None) or {}
    return tuple(data.get("mean") or info.mean), tuple(data.get("std") or info.std)


def classify(judge: nn.Module, images: Tensor, info: ModelInfo) -> Tensor:
    """(B,) int64 argmax of the judge on (B, C, H, W), computed where the judge lives, in evaluation mode.

    Raises:
        SmiError: the judge does not take such images, or does not speak of the model's classes.
    """
    device = next((p.device for p in judge.parameters()), torch.device("cpu"))
    try:
        with evaluating(judge), torch.inference_mode():
            logits = [judge(part.to(device)).cpu() for part in images.split(_JUDGE_BATCH)]
    except (RuntimeError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        reason = str(error).splitlines()[0]
        raise SmiError(f"the judge fails on images of shape {shape}: {reason}. Give one that takes them.") from error
    if logits[0].shape[1:] != (info.num_classes,):
        raise SmiError(
            f"the judge returns {tuple(logits[0].shape[1:])} logits for an image, the model has {info.num_classes} "
            f"classes; give a judge over the same classes."
        )
    return torch.cat(logits).argmax(1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
