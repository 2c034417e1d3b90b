"""What is compared, and how many images of each method that makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

from smi.dataset import Fill
from smi.errors import SmiError, did_you_mean
from smi.flops import count_flops
from smi.schedules import phases
from smi.strategies import STRATEGIES

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.quantizer import Observer

Equal = Literal["flops", "seconds", "images"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared and how it is judged.

    Attributes:
        strategies: methods, by the names of `Config.strategy`.
        equal: what a point of a curve has the same of for all methods: ``flops`` (counted), ``seconds`` (predicted
            from a few iterations before anything is made, and measured while it is made), or the number of ``images``.
        images: how many the most expensive method makes, and every method where the number is to be the same.
        points: shares of that cost, or of that number, at which quality is looked at; the last is 1.
        seeds: each gives a curve of its own.
        classes: to make images of, in turns; None is all.
        fill: what stands in dropped patches where whole images are looked at or learnt from.
        weights, activations, observer: of the quantized teacher, see `smi.quantize`; weights 0 leaves it out.
        limit: test images at most; None is all.
        quick: only whether it runs is asked, so the page warns of its own verdicts.
    """

    strategies: tuple[str, ...] = tuple(STRATEGIES)
    equal: Equal = "flops"
    images: int = 80
    points: tuple[float, ...] = (0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (1,)
    classes: tuple[int, ...] | None = None
    fill: Fill = "mean"
    weights: int = 4
    activations: int = 4
    observer: Observer = "mse"
    limit: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for name in self.strategies:
            if name not in STRATEGIES:
                raise SmiError(f"unknown strategy {name!r}.{did_you_mean(name, STRATEGIES)}")
        for field, allowed in (("equal", get_args(Equal)), ("fill", get_args(Fill))):
            value = getattr(self, field)
            if value not in allowed:
                raise SmiError(f"{field} is {value!r}.{did_you_mean(str(value), allowed)}")
        for field in ("strategies", "seeds", "points"):
            values = getattr(self, field)
            if not values or len({*values}) < len(values):
                raise SmiError(f"{field} are {list(values)}; expected at least one, none of them twice.")
        for field in ("images", "limit"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SmiError(f"{field} is {value}; expected at least 1.")
        if min(self.seeds) < 0:
            raise SmiError(f"seeds are {list(self.seeds)}; expected numbers from 0.")
        if not all(0 < point <= 1 for point in self.points) or list(self.points) != sorted(self.points):
            raise SmiError(f"points are {list(self.points)}; expected increasing shares above 0 up to 1.")
        if self.points[-1] != 1:
            raise SmiError(f"the last point is {self.points[-1]:g}; expected 1, the whole budget.")


@dataclass(frozen=True)
class Allotment:
    """How many images of a method are made and looked at.

    Attributes:
        per_image: cost of one, in operations or seconds; None where images are what is equal.
        at_points: images at every one of `CompareConfig.points`.
        counted: images where the number is to be the same for all.
    """

    per_image: float | Fraction | None
    at_points: tuple[int, ...]
    counted: int

    @property
    def looked_at(self) -> tuple[int, ...]:
        return tuple(sorted({*self.at_points, self.counted}))


def flops_per_image(model: SparseModel, config: Config) -> Fraction:
    """Operations for one image that is handed out: those of its trajectory over the images that come out of it."""
    found = phases(config, model.info.num_patches)
    spent = sum((stop - start) * count_flops(model, kept) for start, stop, kept in found)
    return Fraction(spent, config.images_per_trajectory)


def allot(
    how: CompareConfig, rates: Mapping[str, Fraction | float] | None, repeats: dict[str, int]
) -> dict[str, Allotment]:
    """Images of every method.

    The budget is what `how.images` images cost the most expensive method; a share s of it buys another one
    floor(s budget / rate), rounded down to whole trajectories.

    Args:
        rates: method -> cost of one image; None if the number of images is what is equal.
        repeats: method -> images of one trajectory.

    Raises:
        SmiError: a number of images that is none of whole trajectories, or a point that buys none.
    """
    for method, repeat in repeats.items():
        if how.images % repeat:
            raise SmiError(
                f"images is {how.images}, but {method} makes {repeat} of every trajectory; use "
                f"{-(-how.images // repeat) * repeat}."
            )
    exact = None if rates is None else {method: Fraction(rate) for method, rate in rates.items()}
    found = {}
    for method, repeat in repeats.items():
        bought = []
        for point in how.points:
            worth = 1 if exact is None else max(exact.values()) / exact[method]
            most = math.floor(Fraction(str(point)) * how.images * worth)
            bought.append(most // repeat * repeat)
        if not bought[0]:
            raise SmiError(
                f"a share of {how.points[0]:g} is less than one trajectory of {method}; use more images than "
                f"{how.images}, or larger points."
            )
        found[method] = Allotment(None if rates is None else rates[method], tuple(bought), how.images)
    return found
