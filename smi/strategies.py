"""Which patches an inversion goes on with: the one thing in which dense, sparse and random inversion differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import smi_kernels
from smi.augment import RANKING, stream
from smi.config import Config
from smi.rebirth import without


class Strategy:
    """Decides, per iteration, which patches are fed; the engine knows nothing else of it.

    Attributes:
        schedule: pruning iteration -> patches kept from it on.
        still: iterations that must not be augmented: each pruning and the one whose forward ranks the patches for it.
        ranks_from_model: whether `select` wants the model's scores.
        detaches: whether the patches that do not go on are images of their own.
    """

    ranks_from_model = True
    detaches = False

    def __init__(self, config: Config, indices: Sequence[int], num_patches: int) -> None:
        self.config = config
        self.indices = indices
        self.num_patches = num_patches
        self.schedule = config.schedule(num_patches)
        self.still = frozenset(t - lead for t in self.schedule for lead in (0, 1))

    def wants_scores(self, iteration: int) -> bool:
        """Whether the forward of this iteration has to yield ranking scores, for the pruning that follows it."""
        return self.ranks_from_model and iteration + 1 in self.schedule

    def draw(self, iteration: int, keep: Tensor) -> Tensor:
        """(B, K) float32 uniform scores of the patches `keep`, from each image's own stream.

        Args:
            iteration: one of `schedule`, or later for one more draw.
        """
        count = len(self.schedule) + 1
        number = list(self.schedule).index(iteration) if iteration in self.schedule else count - 1
        priorities = np.stack(
            [
                stream(self.config.seed, RANKING, i).random((count, self.num_patches), dtype=np.float32)
                for i in self.indices
            ]
        )[:, number]
        return torch.from_numpy(priorities).to(keep.device).gather(1, keep)

    def select(self, iteration: int, keep: Tensor, scores: Tensor | None) -> Tensor:
        """The patches that go on: (B, K') int64 out of `keep` (B, K), both in grid order.

        Args:
            iteration: one of `schedule`.
            scores: (B, K), of the previous iteration; None unless the model ranks.
        """
        if scores is None:
            raise ValueError(f"iteration {iteration} prunes by the model's ranking, but the one before gave no scores.")
        return smi_kernels.select_tokens(scores, keep, self.schedule[iteration])


class Dense(Strategy):
    """All patches, always: Yin et al., "Dreaming to Distill", CVPR 2020."""

    ranks_from_model = False


class Fusion(Dense):
    """All patches, always; the network merges alike tokens: Bolya et al., "Token Merging", ICLR 2023."""


class Sparse(Strategy):
    """The highest-ranked patches go on: Hu et al., "Sparse Model Inversion", ICML 2024, section 3.2."""


class Random(Strategy):
    """As many patches as `Sparse`, chosen uniformly from each image's own stream: the control."""

    ranks_from_model = False

    def select(self, iteration: int, keep: Tensor, scores: Tensor | None) -> Tensor:
        drawn = self.draw(iteration, keep)
        return smi_kernels.select_tokens(drawn, keep, self.schedule[iteration])


class Rebirth(Strategy):
    """The highest-ranked patches are detached as a finished image, the rest go on: see `smi.rebirth`."""

    detaches = True

    def select(self, iteration: int, keep: Tensor, scores: Tensor | None) -> Tensor:
        if scores is None:
            raise ValueError(
                f"iteration {iteration} detaches by the model's ranking, but the one before gave no scores."
            )
        best = smi_kernels.select_tokens(scores, keep, self.num_patches // self.config.division)
        return without(keep, best)


STRATEGIES: dict[str, type[Strategy]] = {
    "dense": Dense,
    "sparse": Sparse,
    "random": Random,
    "rebirth": Rebirth,
    "fusion": Fusion,
}
