"""Several sparse images out of one trajectory: Heo & Choi, "Patch Rebirth", arXiv 2509.23235.

The patches of an image that matter most are done first: `Config.division` = v times, the N/v highest-ranked of those
still in play are detached, with the pixels that they have by then, as a sparse image of their own, and the rest go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi.config import Config
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.state import Result


@dataclass(frozen=True)
class Part:
    """A sparse image of every trajectory of a batch.

    Attributes:
        taken_at: iterations done by then.
        images: (b, C, H, W), the pixels of then.
        keep: (b, N/v) int64, its patches in grid order.
    """

    taken_at: int
    images: Tensor
    keep: Tensor


def without(keep: Tensor, taken: Tensor) -> Tensor:
    """The entries of `keep` (b, K) that are not among `taken` (b, k), its subset: (b, K - k), in the same order."""
    gone = torch.isin(_rowwise(keep), _rowwise(taken))
    order = gone.byte().argsort(dim=1, stable=True)  # no mask as an index: that would wait for the device
    return keep.gather(1, order[:, : keep.shape[1] - taken.shape[1]])


def _rowwise(keep: Tensor) -> Tensor:
    """Patch numbers that differ between rows."""
    return keep + torch.arange(len(keep), device=keep.device)[:, None] * 2**32


def taken_at(config: Config, index: int) -> int:
    """Iterations of image `index`: of a part of a trajectory those done when it left, of others all."""
    every, part = config.iterations // config.division, index % config.division
    return (part + 1) * every if config.strategy == "rebirth" and part < config.division - 1 else config.iterations


def updates(result: Result, config: Config) -> Tensor:
    """(B, N) int64: iterations in which each patch of each image was fed and moved.

    Those of an image of a rebirth trajectory are counted until it is taken out; its trajectory's are those of the last
    image. Under official semantics stopped patches go on moving under the priors, which is not counted.
    """
    until = torch.tensor([taken_at(config, index) for index in result.indices.tolist()])
    return result.dropped_at.long().minimum(until[:, None])


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """v tensors (b, ...), one for each part -> (b v, ...): all images of the first trajectory, then of the second."""
    return torch.stack(list(parts), 1).flatten(0, 1)


def trajectories(indices: Sequence[int], targets: Tensor, division: int) -> tuple[list[int], Tensor]:
    """Image numbers and targets of a batch -> those of its trajectories, whose first images they are.

    Raises:
        SmiError: the images of one trajectory are not together, or want different things.
    """
    if len(targets) % division:
        raise SmiError(
            f"there are {len(targets)} targets; rebirth makes {division} images of every trajectory, so give a "
            f"multiple of {division} of them, or another division."
        )
    groups = targets.view(-1, division, *targets.shape[1:])
    if not (groups == groups[:, :1]).all():
        wrong = next(i for i, group in enumerate(groups) if not (group == group[:1]).all())
        raise SmiError(
            f"images {wrong * division} to {wrong * division + division - 1} come out of one trajectory and want "
            f"different targets; give every target {division} times in a row."
        )
    for start in range(0, len(indices), division):
        numbers = list(indices[start : start + division])
        if numbers[0] % division or numbers != list(range(numbers[0], numbers[0] + division)):
            raise SmiError(
                f"image numbers {numbers} are not those of one trajectory; expected {division} in a row, the first a "
                f"multiple of {division}."
            )
    return list(indices[::division]), groups[:, 0]
