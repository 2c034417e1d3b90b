"""Schedules: at which iterations how many patches are stopped, by target sparsity or by a budget of operations.

    config = smi.schedules.scheduled(smi.Config(), "cosine", num_patches=196, sparsity=0.8)

A schedule is nothing but `Config.prune_at` and `Config.prune_ratio`, so whatever comes out has passed the config's own
checks and is stored with every pool.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from smi.config import PRESETS, Config, keep_count
from smi.errors import SmiError, did_you_mean

PRUNINGS = 4  # as published
UNTIL = Fraction(1, 4)  # of the iterations, by which uniform and cosine have stopped their last patches
_PAPER = PRESETS["paper-quant"]


def _geometric(u: float, end: float) -> float:
    return end**u


def _linear(u: float, end: float) -> float:
    return 1 + (end - 1) * u


def _cosine(u: float, end: float) -> float:
    return end + (1 - end) * (1 + math.cos(math.pi * u)) / 2


# Share of the patches kept after a share u of the prunings, where `end` is the share kept in the end.
SCHEDULES: dict[str, Callable[[float, float], float]] = {"paper": _geometric, "uniform": _linear, "cosine": _cosine}


def scheduled(
    config: Config,
    name: str,
    num_patches: int,
    *,
    sparsity: float | None = None,
    budget: float | None = None,
    flops: Callable[[int], float] | None = None,
) -> Config:
    """`config` with the prunings of the schedule `name`, scaled to its number of iterations T.

    ``paper`` prunes at T/80, T/40, T/20 and 3T/40, each time the same share of what is left: Hu et al., ICML 2024,
    section 4.1 (50, 100, 200 and 300 of 4000, 0.3 each). ``uniform`` prunes at four equally spaced iterations up to
    T/4, equally many patches each time. ``cosine`` prunes there too, few patches at first and at last: N times
    e + (1 - e)(1 + cos(pi i / 4)) / 2 are left after pruning i, where e is the share left in the end (the annealing
    of Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, on patches). A pruning that would stop no whole patch is left
    out. Without a target every schedule ends with as many patches as the paper's.

    Args:
        num_patches: N, of the model.
        sparsity: share of the patches stopped in the end, in (0, 1); floor(N (1 - sparsity)) are left.
        budget: most operations of all iterations together, as a share of dense inversion's, in (0, 1). The schedule
            ends with the most patches that keep to it.
        flops: operations of one iteration with so many patches, for a budget: ``lambda k: count_flops(model, k)``
            with `smi.flops.count_flops`.

    Raises:
        SmiError: an unknown schedule, a strategy that has no use for one, both targets, a target out of range or out of
            reach, too few iterations.
    """
    if name not in SCHEDULES:
        raise SmiError(f"unknown schedule {name!r}.{did_you_mean(name, SCHEDULES)}")
    if not config.scheduled:
        raise SmiError(f"strategy {config.strategy!r} takes no schedule; use sparse or random.")
    if sparsity is not None and budget is not None:
        raise SmiError("sparsity and budget exclude each other; each of them decides how many patches are left.")
    for option, value in (("sparsity", sparsity), ("budget", budget)):
        if value is not None and not 0 < value < 1:
            raise SmiError(f"{option} is {value}; expected a share strictly between 0 and 1 (0.25 is a quarter).")
    make = functools.partial(_ending_with, config, name, num_patches)
    if budget is not None:
        if flops is None:
            raise SmiError("a budget needs flops=, the operations of one iteration with so many patches.")
        return _within(budget, make, num_patches, flops)
    if sparsity is None and name == "paper":
        return _as_published(config, num_patches)
    last = _published_end(num_patches) if sparsity is None else keep_count(num_patches, sparsity)
    if last < 1:
        raise SmiError(f"sparsity {sparsity} leaves none of {num_patches} patches; use a smaller one.")
    return make(last)


def share_of_flops(config: Config, num_patches: int, flops: Callable[[int], float]) -> float:
    """Operations of all iterations of `config`, as a share of what they would be with all patches."""
    spent = sum((stop - start) * flops(kept) for start, stop, kept in phases(config, num_patches))
    return spent / (config.iterations * flops(num_patches))


def phases(config: Config, num_patches: int) -> list[tuple[int, int, int]]:
    """(first iteration, the one after the last, patches fed) of every phase between prunings."""
    schedule = config.schedule(num_patches)
    starts = [0, *schedule]
    return list(zip(starts, [*starts[1:], config.iterations], [num_patches, *schedule.values()], strict=True))


def _published_end(num_patches: int) -> int:
    return max(1, functools.reduce(keep_count, _PAPER.prune_ratio, num_patches))


def _iterations(name: str, iterations: int) -> list[int]:
    if name == "paper":
        shares = [Fraction(t, _PAPER.iterations) for t in _PAPER.prune_at]
    else:
        shares = [UNTIL * Fraction(i, PRUNINGS) for i in range(1, PRUNINGS + 1)]
    return [round(share * iterations) for share in shares]


def _times(config: Config, name: str) -> list[int]:
    """Iterations of the prunings."""
    at = _iterations(name, config.iterations)
    if at[0] < 1 or any(later - earlier < 2 for earlier, later in itertools.pairwise(at)):
        raise SmiError(
            f"schedule {name!r} would prune at {at} of {config.iterations} iterations, where each pruning needs one "
            f"iteration before it to rank in. Use more iterations, or give prune_at."
        )
    return at


def _as_published(config: Config, num_patches: int) -> Config:
    changed = config.replace(prune_at=_times(config, "paper"), prune_ratio=_PAPER.prune_ratio)
    changed.schedule(num_patches)  # refuses what leaves no patch
    return changed


def _ending_with(config: Config, name: str, num_patches: int, last: int) -> Config:
    """The schedule that leaves `last` patches in the end."""
    at = _times(config, name)
    curve = SCHEDULES[name]
    counts = [round(num_patches * curve(i / len(at), last / num_patches)) for i in range(1, len(at))]
    return _with_counts(config, num_patches, at, [*counts, last])


def _with_counts(config: Config, num_patches: int, at: Sequence[int], counts: Sequence[int]) -> Config:
    """Ratios that leave exactly `counts`: rounded down, so that what floor takes off is less than a patch."""
    kept, times, ratios = num_patches, [], []
    for t, count in zip(at, counts, strict=True):
        if count < kept:
            times.append(t)
            ratios.append(math.floor(Fraction(kept - count, kept) * 10**6) / 10**6)
            kept = count
    return config.replace(prune_at=times, prune_ratio=ratios)


def _within(budget: float, make: Callable[[int], Config], num_patches: int, flops: Callable[[int], float]) -> Config:
    """The schedule that ends with the most patches among those within `budget`; operations grow with patches."""
    flops = functools.cache(flops)

    def spends(last: int) -> float:
        return share_of_flops(make(last), num_patches, flops)

    if spends(1) > budget:
        raise SmiError(
            f"budget {budget} is out of reach: with a single patch left in the end, this schedule still takes "
            f"{spends(1):.3f} of the operations. Use a larger budget, the schedule 'paper', which prunes early, or "
            f"give prune_at."
        )
    low, high = 1, num_patches  # `low` is within the budget, `high` is dense inversion
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spends(middle) <= budget else (low, middle)
    return make(low)
