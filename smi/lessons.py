"""What a student is taught: images with what the teacher says of them, out of a pool or made while it learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smi.dataset import Fill, fill_dropped, open_filled
from smi.errors import SmiError
from smi.objectives import Objective, Objectives
from smi.pool import Pool, PoolWriter
from smi.run import invert_batch
from smi.state import ModelInfo, Result, WorkPlan

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.inversion import Inversion


@dataclass(frozen=True)
class Lessons:
    """Images of one epoch.

    Attributes:
        images: (M, C, H, W) float32, normalised, dropped patches filled.
        keep: (M, K) int64.
        logits: (M, classes) float32, the teacher's.
        taught, held: (., ) int64, which are trained on, and which only choose the best student.
    """

    images: Tensor
    keep: Tensor
    logits: Tensor
    taught: Tensor
    held: Tensor


@dataclass(frozen=True)
class Synthesis:
    """Images made while a student learns, a fresh batch for every round: Hu et al., ICML 2024, section 4.2.

    The batches lie in ``pool`` of the student's folder, where an interrupted run finds them again. The first one is
    never trained on; the best student is chosen by it.

    Attributes:
        teacher: what is inverted.
        config: of the inversion; its batch size is the images of a round.
        on_iteration: called as that of `smi.run.run`, with the number of the batch.
        objectives: further terms of the loss, as for `smi.run.run`. Of a student that is on its device already,
            `smi.losses.adversarial` sees what it has learnt before each batch.
    """

    teacher: SparseModel
    config: Config
    on_iteration: Callable[[int, Inversion], None] | None = field(default=None, compare=False)
    objectives: Sequence[Objective | Callable[..., Any]] = ()


class Stored:
    """All images of a pool, split once and for all into those trained on and those held out.

    Raises:
        SmiError: too few images to split.
    """

    def __init__(self, pool: Pool | str | Path, fill: Fill, holdout: float, seed: int) -> None:
        self._pool = pool = open_filled(pool, fill)
        self.info = pool.info
        # Images of one trajectory go together: they have grown out of the same pixels.
        repeat = pool.config.images_per_trajectory
        total, share = len(pool), holdout * len(pool)
        held = repeat * max(round(share / repeat), min(1, round(share)))
        if held < 1 or held >= total:
            raise SmiError(
                f"the pool has {total} images, of which a share of {holdout:g} held out leaves {held} to choose a "
                f"student by and {total - held} to train on; make more images or change holdout."
            )
        order = torch.randperm(total // repeat, generator=torch.Generator().manual_seed(seed))
        order = (order[:, None] * repeat + torch.arange(repeat)).flatten()
        split = order[held:].sort().values, order[:held].sort().values
        self._lessons = Lessons(*_collect(pool, pool.info, pool.config.seed, fill), *split)

    def identity(self) -> dict[str, Any]:
        return {"pool": _digest(self._pool.manifest), "images": len(self._pool)}

    def lessons(self, number: int) -> Lessons:
        """The same for every epoch."""
        return self._lessons


class Live:
    """A `Synthesis` at work: the images of an epoch are there when it is asked for them."""

    def __init__(self, synthesis: Synthesis, folder: Path, fill: Fill, epochs: int) -> None:
        self._synthesis, self._fill, self._folder = synthesis, fill, folder
        self.info: ModelInfo = synthesis.teacher.info
        self._terms = Objectives(synthesis.config, synthesis.objectives).identity
        config, classes = synthesis.config, self.info.num_classes
        repeat = config.images_per_trajectory
        trajectories = (epochs + 1) * config.batch_size
        # Every class as often as any other, each time round in another order, so that no batch is of few neighbours.
        draw = torch.Generator().manual_seed(config.seed)
        rounds = [torch.randperm(classes, generator=draw).tolist() for _ in range(-(-trajectories // classes))]
        targets = [target for one in rounds for target in one][:trajectories]
        self._plan = WorkPlan(tuple(t for t in targets for _ in range(repeat)), config.batch_size * repeat)

    def identity(self) -> dict[str, Any]:
        made: dict[str, Any] = {"made": "meanwhile", "config": self._synthesis.config.resolved().to_dict()}
        return {"pool": _digest({**made, "objectives": self._terms} if self._terms else made)}

    def lessons(self, number: int) -> Lessons:
        """Epoch `number` is trained on batch ``number + 1``; batch 0 is held out."""
        batches = [self._batch(0), self._batch(number + 1)]
        size = self._plan.batch_size
        split = torch.arange(size, 2 * size), torch.arange(size)
        return Lessons(*_collect(batches, self.info, self._synthesis.config.seed, self._fill), *split)

    def _batch(self, batch: int) -> Result:
        """A batch out of the pool, where it is made if it is missing."""
        asked = self._synthesis
        teacher, config = asked.teacher, asked.config
        writer = PoolWriter(self._folder, self.info, config, self._plan, device=teacher.where, objectives=self._terms)
        if batch in writer.missing:
            made = invert_batch(teacher, self._plan, config, batch, asked.objectives, asked.on_iteration)
            writer.write(batch, made)
        return Pool(self._folder).load(batch)


def _collect(results: Iterable[Result], info: ModelInfo, seed: int, fill: Fill) -> tuple[Tensor, Tensor, Tensor]:
    """Images, kept patches and logits of all results."""
    parts = [(fill_dropped(r.images, r.keep, r.indices, info, seed, fill), r.keep, r.logits) for r in results]
    images, keep, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return images, keep, logits


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
