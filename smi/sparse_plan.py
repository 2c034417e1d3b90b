"""Sparse inversion inside a loop of your own: which patches go on, and under what augmentation, as in `smi.invert`.

Losses, optimizer and images stay yours; Hu et al., "Sparse Model Inversion", ICML 2024, call the method plug-and-play.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import smi_kernels
from smi.adapters.timm import SparseModel
from smi.augment import draw_offsets
from smi.checks import check_fit, check_indices
from smi.config import Config
from smi.errors import SmiError
from smi.strategies import STRATEGIES


class SparsePlan:
    """Feeds a model the patches that still count; call it for the model, and `step` it after the optimizer.

    Example::

        images = torch.randn(8, 3, 224, 224, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
        plan = smi.SparsePlan(teacher, images, smi.preset("fast"))
        while not plan.done:
            loss = my_loss(plan(images), targets) + my_prior(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
        images, plan.keep  # and the patches that were inverted to the end

    Args:
        model: a supported timm model (not modified, and frozen) or a `SparseModel`.
        images: (B, C, H, W), the leaf that the optimizer moves, normalised as the model wants it.
        config: `strategy` (dense, sparse or random), schedule, `ranking`, augmentation, `stopped` and `seed`; its
            losses, learning rate and number of images are yours to choose and not read.
        indices: image numbers, which key the random streams; default 0..B-1.

    Attributes:
        iteration: iterations done.
        keep: (B, K) int64, surviving patches in grid order.
        live: (B, 1, H, W) bool, the pixels of these patches.

    Raises:
        SmiError: images that are not the model's or no leaf, a strategy or ranking that needs the loop of
            `smi.Inversion`, a schedule that leaves no patch, an unsupported model.
    """

    def __init__(
        self,
        model: nn.Module | SparseModel,
        images: Tensor,
        config: Config | None = None,
        *,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.config = config = (config or Config()).resolved()
        if config.strategy not in ("dense", "sparse", "random"):
            raise SmiError(f"strategy is {config.strategy!r}; a plan follows dense, sparse or random. Use smi.invert.")
        if config.ranking == "gradient_input":
            raise SmiError("ranking 'gradient_input' wants your loss once more; a plan ranks by what the model tells.")
        if not isinstance(model, SparseModel):
            ranking = config.model_ranking
            model = SparseModel(model, device=images.device, precision=config.precision, ranking=ranking)
        check_fit(model, config.replace(cross_entropy=0.0))
        size = model.info.input_size
        if images.shape[1:] != size or not images.is_leaf or images.device != model.device:
            made = "" if images.is_leaf else ", made by an operation"
            raise SmiError(
                f"images are {tuple(images.shape)} on {images.device}{made}; expected (B, {', '.join(map(str, size))}) "
                f"on {model.device}, the leaf that is optimised."
            )
        self.model, self._images = model, images
        numbers = list(range(len(images))) if indices is None else check_indices(indices)
        if len(numbers) != len(images):
            raise SmiError(f"there are {len(images)} images and {len(numbers)} image numbers; give one for each.")
        self._strategy = STRATEGIES[config.strategy](config, numbers, model.info.num_patches)
        still = self._strategy.still
        self._offsets = draw_offsets(config, numbers, (size[1], size[2]), model.info.patch_size, still).to(
            images.device
        )
        self.iteration = 0
        self.keep = torch.arange(model.info.num_patches, device=images.device).repeat(len(images), 1)
        self.live = self._pixels()
        self._held: Tensor | None = None
        self._scores: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all iterations of the config are done."""
        return self.iteration >= self.config.iterations

    @property
    def offsets(self) -> Tensor:
        """(B or 1, 3) int64, how this iteration rolls and flips: rows of (dy, dx, flip)."""
        self._check_left()
        return self._offsets[self.iteration]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the surviving patches of `images`, rolled and flipped as this iteration is.

        Args:
            images: those of the plan, or what you make of them in their shape, differentiable. Of several calls in the
                iteration before a pruning the last one ranks.
        """
        self._check_left()
        if images.shape != self._images.shape:
            raise SmiError(
                f"the plan was called with {tuple(images.shape)}; expected {tuple(self._images.shape)}, a row for each "
                f"of its images. Feed what else you have to the model itself."
            )
        wants = self._strategy.wants_scores(self.iteration) and self.config.ranking != "random"
        fed = self.keep if self.keep.shape[1] < self.model.info.num_patches else None
        offsets = None if self.iteration in self._strategy.still else self.offsets
        logits, scores = self.model.feed(images, fed, offsets, scores=wants, watched=False)
        self._scores = None if scores is None else scores.detach()
        return logits

    @torch.no_grad()
    def step(self) -> None:
        """The optimizer has stepped: put back what has moved in stopped patches, and prune if it is time.

        Raises:
            SmiError: it is time, and the plan was not called in this iteration.
        """
        self._check_left()
        t = self.iteration + 1
        prunes = t in self._strategy.schedule
        if prunes and self.config.ranking == "random":
            self._scores = self._strategy.draw(t, self.keep)
        if prunes and self._strategy.ranks_from_model and self._scores is None:
            raise SmiError(f"iteration {t} prunes by what the one before ranks, in which the plan was not called.")
        if self._held is not None:
            self._images.copy_(torch.where(self.live, self._images, self._held))
        self.iteration = t
        if not prunes:
            return
        self.keep, self._scores = self._strategy.select(t, self.keep, self._scores), None
        self.live = self._pixels()
        if self.config.stopped == "frozen":
            self._held = self._images.detach().clone()

    def _check_left(self) -> None:
        if self.done:
            raise SmiError(f"all {self.iteration} iterations of the plan are done; raise iterations in its config.")

    def _pixels(self) -> Tensor:
        info = self.model.info
        alive = torch.zeros(len(self.keep), info.num_patches, dtype=torch.bool, device=self.keep.device)
        return smi_kernels.patch_mask(alive.scatter(1, self.keep, True), info.grid, info.patch_size)
