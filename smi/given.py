"""Images that nobody inverted, real ones, drawn ones or noise, in the form of those that were: the controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smi.augment import NOISE, normal_images
from smi.errors import SmiError
from smi.evaluation import DATASETS, open_dataset
from smi.pool import Pool, PoolWriter
from smi.state import Result
from smi.workers import Workers

if TYPE_CHECKING:
    from smi.adapters.timm import SparseModel
    from smi.config import Config
    from smi.state import ModelInfo, WorkPlan

_CLASS_APART = 1_000_003  # how far the seeds lie apart that pictures are drawn with


@torch.no_grad()
def as_inverted(images: Tensor, targets: Tensor, numbers: range, model: SparseModel, iterations: int) -> Result:
    """A batch with all patches kept, and what the teacher says of it.

    Args:
        images: (B, C, H, W) float32, normalised.
        targets: (B,) int64.
        numbers: of the images in their plan.
        iterations: that an inversion would have had.
    """
    patches = model.info.num_patches
    logits, _ = model(images.to(model.device, model.dtype))
    return Result(
        images=images,
        keep=torch.arange(patches).repeat(len(images), 1),
        dropped_at=torch.full((len(images), patches), iterations, dtype=torch.int32),
        targets=targets,
        indices=torch.tensor(numbers),
        logits=logits.float().cpu(),
        losses={},
        history={},
        snapshots=torch.zeros(0, 0, *model.info.input_size, dtype=torch.uint8),
        snapshot_at=[],
    )


def given_pool(
    path: str | Path, model: SparseModel, config: Config, plan: WorkPlan, images: Callable[[range], Tensor]
) -> Pool:
    """The pool at `path` of images that are given, made as far as it is missing.

    Args:
        config: of the inversion that the images stand in for, in which no patch is dropped.
        images: numbers in the plan -> (B, C, H, W) float32, normalised.

    Raises:
        SmiError: as `smi.pool.PoolWriter`.
    """
    with Workers(Path(path)):
        writer = PoolWriter(path, model.info, config, plan, device=model.where)
        for batch in writer.missing:
            numbers = plan.batch(batch)
            targets = torch.tensor([plan.targets[i] for i in numbers])
            writer.write(batch, as_inverted(images(numbers), targets, numbers, model, config.iterations))
    return Pool(path)


def noise_images(info: ModelInfo, seed: int) -> Callable[[range], Tensor]:
    """Gaussian noise, N(0, 1) in the model's normalised space, for `given_pool`."""
    return lambda numbers: normal_images(seed, NOISE, numbers, info.input_size)


class RealImages:
    """Pictures of a folder of classes: of each class others for every image number and seed.

    Args:
        folder: with one folder of images for each class, taken as `smi.evaluation.open_dataset` takes them.
        transform: from a picture to what the model wants.
        tests: the test images that go with it, as for `open_dataset`.

    Raises:
        SmiError: the test images themselves, no such folder, other classes.
    """

    def __init__(
        self, folder: str, transform: Callable[[Any], Tensor], info: ModelInfo, *, tests: str | None = None
    ) -> None:
        check_real(folder, tests)
        self.folder, self._info = folder, info
        self._items = open_dataset(folder, transform, num_classes=info.num_classes, class_names=info.class_names)
        number = self._items.target_transform or int  # targets are numbered as folders are, not as classes
        self._places: list[list[int]] = [[] for _ in range(info.num_classes)]
        for place, target in enumerate(self._items.targets):
            self._places[number(target)].append(place)

    def check(self, plan: WorkPlan) -> None:
        """Raises `SmiError` where a class has fewer pictures than the plan has images of it."""
        for target, wanted in Counter(plan.targets).items():
            if len(self._places[target]) < wanted:
                raise SmiError(
                    f"{self.folder!r} has {len(self._places[target])} pictures of class {self._info.label(target)}, "
                    f"and {wanted} are wanted; add some, or use fewer images than {len(plan.targets)}."
                )

    def images(self, targets: Sequence[int], seed: int) -> Callable[[range], Tensor]:
        """For `given_pool`: the pictures of a plan with these `targets`."""
        orders = {}
        for target in {*targets}:
            draw = torch.Generator().manual_seed(_CLASS_APART * seed + target)
            orders[target] = iter(torch.randperm(len(self._places[target]), generator=draw).tolist())
        chosen = [self._places[target][next(orders[target])] for target in targets]
        return lambda numbers: torch.stack([self._items[chosen[number]][0] for number in numbers])


def check_real(folder: str, tests: str | None) -> None:
    """Raises `SmiError` where the folder's images are the test images, by which everything is judged."""
    name, colon, place = (tests or "").partition(":")
    known = Path(place, "val") if (name, colon) == ("imagenet", ":") else Path(tests or "")
    if folder.partition(":")[0] in DATASETS or (tests is not None and Path(folder).resolve() == known.resolve()):
        raise SmiError(
            f"the real images {folder!r} would be the test images; name a folder of others, e.g. for training."
        )
