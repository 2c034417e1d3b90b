"""What goes into an inversion and what comes out of it, as plain values that files and reports can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smi.errors import SmiError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smi.config import Config
    from smi.dataset import Fill


@dataclass(frozen=True)
class ModelInfo:
    """Identity and geometry of the model that was inverted; two runs on one pool must agree on all but class names.

    Attributes:
        name: what the user asked for (timm name with tag, path, ``embedded:teacher``).
        weights_sha256: hash over all parameters and persistent buffers, by name, as the caller's model holds them.
        input_size: (C, H, W) in pixels.
        mean, std: per channel, of the model's own data config.
        patch_size, grid: (height, width), in pixels and in patches.
        num_prefix_tokens: class, distillation and register tokens.
        num_classes: length of the logits.
        ranking: resolved ranking signal.
        class_names: one per logit where known, else empty; they may repeat. Infos that differ in them alone are equal.
    """

    name: str
    weights_sha256: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    num_classes: int
    ranking: str
    class_names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def label(self, target: int) -> str:
        """Readable name of a class index: the class name, else the number."""
        return self.class_names[target] if self.class_names else str(target)


@dataclass(frozen=True)
class Phase:
    """A stretch of iterations with one number of fed patches.

    Attributes:
        start, stop: iterations, half open.
        kept: patches fed for each image.
        seconds: wall-clock time.
        flops: floating-point operations of the network's forward and input-only backward, whole batch, all iterations.
    """

    start: int
    stop: int
    kept: int
    seconds: float
    flops: int


@dataclass
class Result:
    """One finished batch; every tensor on the CPU.

    Attributes:
        images: (B, C, H, W) float32 in the model's normalised space; stopped patches hold whatever they held.
        keep: (B, K) int64, surviving patches of each image in grid order, 0-based, prefix tokens not counted.
        dropped_at: (B, N) int32, iteration at which each patch was stopped; if it never was, the iterations done. For
            an image of a rebirth trajectory: at which it left for an earlier image, or this one left without it.
        targets: (B,) int64 class indices.
        indices: (B,) int64 image numbers within the work plan.
        logits: (B, classes) float32, the teacher's on the kept patches, un-augmented, no tokens merged.
        losses: name -> (B,) float32: the built-in objectives of each final image, unweighted.
        history: name -> (iterations,) float32: mean over the batch of each objective, unweighted, and ``total``.
        snapshots: (S, n, C, H, W) uint8 pictures of the first n images at `snapshot_at`, the last being the result.
        snapshot_at: S iterations.
        phases: in order.
        tries: seeds that it took to get finite images, see `smi.run.invert_batch`; 1 is the config's own.
        peak_memory: bytes of the process at the most, from its start to the end of the batch: of tensors on a GPU, else
            resident; None where nobody measured.
        info, config: what it was made of, and how; None where it was read from a pool, which has them itself.
    """

    images: Tensor
    keep: Tensor
    dropped_at: Tensor
    targets: Tensor
    indices: Tensor
    logits: Tensor
    losses: dict[str, Tensor]
    history: dict[str, Tensor]
    snapshots: Tensor
    snapshot_at: list[int]
    phases: list[Phase] = field(default_factory=list)
    tries: int = 1
    peak_memory: int | None = None
    info: ModelInfo | None = field(default=None, repr=False)
    config: Config | None = field(default=None, repr=False)

    def save(self, folder: str | Path, *, fill: Fill = "as-is", overwrite: bool = False) -> Path:
        """Write the images to the new folder as PNG files, by class, with a line each in ``metadata.jsonl``.

        It is the ``imagefolder`` of `smi.export.export_pool`, which says what `fill` and `overwrite` are.

        Returns:
            the folder, absolute.

        Raises:
            SmiError: as `smi.export.export_pool`; a result that was read from a pool.
        """
        from smi.export import save_result

        return save_result(self, folder, fill=fill, overwrite=overwrite)


def joined(parts: Sequence[Result], snapshots: int) -> Result:
    """One result of the images of all parts, which were made one after the other by one config of so many snapshots."""
    import torch

    sizes = [len(part.images) for part in parts]
    history = {
        name: sum(part.history[name] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
        for name in parts[0].history
    }
    rows: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in ROWS}
    stages = zip(*(part.phases for part in parts), strict=True)
    phases = [
        Phase(same[0].start, same[0].stop, same[0].kept, sum(p.seconds for p in same), sum(p.flops for p in same))
        for same in stages
    ]
    return Result(
        **rows,
        losses={name: torch.cat([part.losses[name] for part in parts]) for name in parts[0].losses},
        history=history,  # type: ignore[arg-type]
        snapshots=torch.cat([part.snapshots for part in parts], 1)[:, :snapshots],
        snapshot_at=parts[0].snapshot_at,
        phases=phases,
        tries=max(part.tries for part in parts),
        info=parts[0].info,
        config=parts[0].config,
    )


MAX_IMAGES = 10**8  # numbered with eight digits in packed pools; the plan of more would not fit into memory
ROWS = ("images", "keep", "dropped_at", "targets", "indices", "logits")


@dataclass(frozen=True)
class WorkPlan:
    """Which images are made: image i always has target ``targets[i]`` and belongs to batch ``i // batch_size``."""

    targets: tuple[int, ...]
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def batch(self, number: int) -> range:
        """Image numbers of batch `number`; the last batch may be short."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.targets)))

    @classmethod
    def balanced(
        cls, classes: Sequence[int], num_images: int, batch_size: int, num_classes: int, *, repeat: int = 1
    ) -> WorkPlan:
        """`num_images` images whose targets go round and round through `classes`.

        Args:
            repeat: images in a row of one target, see `Config.images_per_trajectory`; a batch has so many times
                `batch_size` images.

        Raises:
            SmiError: no class, a class outside ``range(num_classes)``, no image, or more than fit into a pool.
        """
        if not classes:
            raise SmiError("no class was given; name at least one, e.g. 0.")
        for target in classes:
            if not 0 <= target < num_classes:
                raise SmiError(f"class {target} does not exist; the model has classes 0 to {num_classes - 1}.")
        if not 1 <= num_images <= MAX_IMAGES:
            bound = "at least 1" if num_images < 1 else f"at most {MAX_IMAGES:,} in one pool"
            raise SmiError(f"{num_images} images were asked for; expected {bound}.")
        if num_images % repeat:
            raise SmiError(
                f"{num_images} images were asked for, and every trajectory makes {repeat}; ask for "
                f"{-(-num_images // repeat) * repeat}."
            )
        return cls(tuple(classes[i // repeat % len(classes)] for i in range(num_images)), batch_size * repeat)
