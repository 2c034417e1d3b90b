"""The inversion loop: Hu et al., "Sparse Model Inversion", ICML 2024, algorithm 1.

Each iteration: prune if it is time, augment, feed the surviving patches, take the gradient of the loss with respect to
the pixels, step Adam, clamp. The host stays a little ahead, so that the device never waits: losses remain there until
somebody asks.
"""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import smi_kernels
from smi.adapters.timm import SparseModel
from smi.augment import NOISE, draw_offsets, normal_images
from smi.checks import check_fit, check_indices, check_targets
from smi.config import Config
from smi.errors import SmiError, reason
from smi.flops import count_flops
from smi.objectives import BUILT_IN, Context, Objective, Objectives, OwnTerms
from smi.rankings import gradient_input
from smi.rebirth import Part, interleaved, trajectories, without
from smi.resumption import restore, state_of
from smi.shard import DAMAGE
from smi.state import Phase, Result
from smi.strategies import STRATEGIES

_LOOK_EVERY = 64  # iterations on the device between two looks of the host, for progress and Ctrl-C

Loss = Objective | Callable[[Context], Tensor]


class Inversion:
    """One batch on its way from noise to images; step it yourself, or `run` it.

    Args:
        model: a supported timm model (not modified) or a `SparseModel`.
        targets: B class indices, or (B, classes) probabilities; under rebirth each `Config.division` times in a row,
            and what follows has one row for each trajectory, but for the result.
        config: what to compute; `Config.resolved` of it is what counts.
        indices: image numbers, which key the random streams; default 0..B-1.
        objectives: further loss terms: any ``callable(context) -> tensor``, or an `Objective` to weigh and name it.
        device: where to run if `model` is a plain module; default where it is.
        backend: what to run on if `model` is a plain module, see `SparseModel`.

    Attributes:
        iteration: iterations done.
        resumed_at: of them, those that came with `load_state_dict`.
        images: (B, C, H, W) float32 (float64 for a float64 model), the pixels, normalised.
        keep: (B, K) int64, surviving patches in grid order.
        offsets: (T, B or 1, 3) int64, the augmentation of every iteration: rows of (dy, dx, flip).
        schedule: pruning iteration -> patches kept from it on.
        fused: whether whole iterations run on fused kernels, objectives of your own among them; False if one of those
            asks for features, which only the model's own modules have.

    Raises:
        SmiError: targets out of range, a schedule that leaves no patch, an unsupported model, ...
    """

    def __init__(
        self,
        model: nn.Module | SparseModel,
        targets: Tensor | Sequence[int],
        config: Config | None = None,
        *,
        indices: Sequence[int] | None = None,
        objectives: Sequence[Loss] = (),
        device: str | torch.device | None = None,
        backend: str = "auto",
    ) -> None:
        self.config = (config or Config()).resolved()
        if not isinstance(model, SparseModel):
            model = SparseModel(
                model,
                device=device,
                precision=self.config.precision,
                ranking=self.config.model_ranking,
                backend=backend,
                merge_to=self.config.model_merge_to,
            )
        check_fit(model, self.config)
        self.model = model
        info = model.info
        self.targets = check_targets(targets, info.num_classes).to(model.device)
        B = self.targets.shape[0]
        self.indices = list(range(B)) if indices is None else check_indices(indices)
        if len(self.indices) != B:
            raise SmiError(f"there are {B} targets and {len(self.indices)} image numbers; give one for each.")
        self._numbers, self._parts = self.indices, list[Part]()
        if self.config.strategy == "rebirth":
            self.indices, self.targets = trajectories(self.indices, self.targets, self.config.division)
            B = len(self.indices)
        self.objectives = Objectives(self.config, objectives)
        model.watch(self.objectives.features)
        # Others that share the model may watch it, and shall change nothing here.
        self._feed = functools.partial(model.feed, watched=bool(self.objectives.features))
        self.strategy = STRATEGIES[self.config.strategy](self.config, self.indices, info.num_patches)
        self.schedule = self.strategy.schedule

        size = (info.input_size[1], info.input_size[2])
        self.images = normal_images(self.config.seed, NOISE, self.indices, info.input_size).to(
            model.device, model.dtype
        )
        offsets = draw_offsets(self.config, self.indices, size, info.patch_size, self.strategy.still)
        self.offsets = offsets.to(model.device)
        self._mean, self._std = self.images.new_tensor(info.mean), self.images.new_tensor(info.std)
        self._low, self._high = -self._mean / self._std, (1 - self._mean) / self._std
        T, N = self.config.iterations, info.num_patches
        self._lr_factors = self.config.lr_factors()
        self.iteration = self.resumed_at = 0
        self._torn = False
        self.keep = torch.arange(N, device=model.device).repeat(B, 1)
        self._dropped_at = torch.full((B, N), T, dtype=torch.int32, device=model.device)
        self._live_pixels: Tensor | None = None
        self._scores: Tensor | None = None
        names = [term.name for term in self.objectives.terms] + ["total"]
        self._history = {name: torch.full((T,), torch.nan, device=model.device) for name in names}
        self._own: OwnTerms | None = None
        self._descent: smi_kernels.PixelDescent | None = None
        needs_autograd = bool(self.objectives.features) or any(term.differentiates for term in self.objectives.extra)
        self.fused = model.vit is not None and not needs_autograd and model.vit.weights.wide == model.dtype
        if self.fused:
            self._descent = self._start_descent()
            self.images = self._descent.images  # the very tensor that moves
        else:
            self._exp_avg, self._exp_avg_sq = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self._snapshots: list[tuple[int, Tensor]] = []
        self._phases: list[Phase] = []
        self._phase_start = (0, 0.0)
        self._seconds = 0.0
        self._launched = torch.cuda.Event(blocking=True) if self.images.is_cuda else None
        self._best: tuple[Tensor, Tensor] | None = None
        self._converged = False

    @property
    def done(self) -> bool:
        """Whether all iterations are done, or the batch converged."""
        return self._converged or self.iteration >= self.config.iterations

    @property
    def between(self) -> bool:
        """Whether no iteration is half done, as it may be where an exception came in the middle of one."""
        descent = self._descent
        return not self._torn and (descent is None or (descent.between and descent.iteration == self.iteration))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from: tensors, which go on changing, and what JSON can hold.

        Raises:
            SmiError: an iteration is half done, see `between`.
        """
        if not self.between:
            raise SmiError(f"iteration {self.iteration} is half done; a state is of whole iterations alone.")
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another inversion of the same arguments was.

        On a device of the same kind the result is the one that the other would have had, bit for bit, unless an
        objective of your own keeps a state.

        Raises:
            SmiError: iterations were done here already, or `state` is damaged or of other arguments.
        """
        if self.iteration:
            raise SmiError(f"this inversion has done {self.iteration} iterations; load a state into a new one.")
        try:
            with torch.no_grad():
                restore(self, state)
        except DAMAGE as error:
            raise SmiError(f"the state is not of an inversion with these arguments: {reason(error)}.") from error

    def step(self) -> None:
        """One iteration."""
        if self.done:
            raise SmiError(f"this inversion is done after {self.iteration} iterations; ask it for its result().")
        self._advance(1)

    def _advance(self, iterations: int) -> None:
        """So many iterations, among which nothing but the last has to be looked at."""
        t = self.iteration
        if self.keep.shape[1] != self.schedule.get(t, self.keep.shape[1]):  # else pruned by a step that was cut short
            self._torn = True
            self._prune(t)
            self._torn = False
        began = time.perf_counter()  # after the records of the last phase, which take their own time
        if self._descent is None:
            with smi_kernels.use_backend(self.model.operations):
                self._iterate(t)
            self.iteration += 1
        else:
            with smi_kernels.use_backend(self.model.backend):
                if self.strategy.wants_scores(t):
                    self._scores = self._rank_fused(self._descent)
                try:
                    self._descent.advance(iterations)
                finally:  # a loss may fail halfway
                    self._torn = self._descent.iteration == t + iterations  # to which belongs what follows here
                    self.iteration = self._descent.iteration
        past_prunings = self.iteration > max(self.schedule, default=0)
        if self.config.tolerance and past_prunings and self.iteration % self.config.patience == 0:
            self._converged = self._stalled()
        if self.config.best and past_prunings and (self.iteration % self.config.best_every == 0 or self.done):
            self._track_best()
        self._torn = False
        self._seconds += time.perf_counter() - began

    @torch.enable_grad()  # the caller's torch.no_grad() stops no fused iteration either
    def _iterate(self, t: int) -> None:
        """Iteration `t`: forward, any losses, autograd, Adam."""
        wants = self.strategy.wants_scores(t)
        in_passing = wants and self.config.ranking == self.config.model_ranking
        self._scores = self._rank(self.images, self.keep) if wants and not in_passing else None
        self.images.requires_grad_(True)
        offsets = None if t in self.strategy.still else self.offsets[t]
        context, scores = self._forward(offsets, scores=in_passing)
        loss, means = self.objectives(context)
        (grad,) = torch.autograd.grad(loss, self.images)
        self.images.requires_grad_(False)
        self._torn = True
        smi_kernels.adam_clamp_(
            self.images,
            grad,
            self._exp_avg,
            self._exp_avg_sq,
            step=t + 1,
            lr=self.config.learning_rate * (1.0 if self._lr_factors is None else self._lr_factors[t]),
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            low=self._low,
            high=self._high,
            live=self._live_pixels,
        )
        for name, value in means.items():
            self._history[name][t] = value
        if in_passing:
            self._scores = scores

    def _stride(self) -> int:
        """Iterations until something has to be looked at."""
        t, config = self.iteration, self.config
        if self._descent is None or self.strategy.wants_scores(t) or not self._descent.in_graphs:
            return 1
        stops = [config.iterations, t + _LOOK_EVERY, *self.schedule, *(at - 1 for at in self.schedule)]
        for every, wanted in ((config.patience, config.tolerance), (config.best_every, config.best)):
            if wanted:
                stops.append((t // every + 1) * every)
        return min(stop for stop in stops if stop > t) - t

    def run(self, progress: Callable[[Inversion], None] | None = None) -> Result:
        """All remaining iterations; `progress` is called with this object after each, in CUDA graphs more seldom."""
        while not self.done:
            self._advance(self._stride())
            if self._launched is not None:
                # The host stays one stride ahead: else it launches all within moments, and then waits deaf to signals.
                self._launched.synchronize()
                self._launched.record(torch.cuda.current_stream(self.model.device))
            if progress is not None:
                progress(self)
        return self.result()

    def latest(self) -> dict[str, float]:
        """Means over the batch of each objective at the last iteration; waits for the device."""
        if not self.iteration:
            return {}
        return {name: values[-1] for name, values in self.losses(self.iteration - 1).items()}

    def losses(self, start: int = 0) -> dict[str, list[float]]:
        """As `latest`, of the iterations done from `start` on, waiting for the device once."""
        curves = self._curves()
        values = torch.stack([curve[start : self.iteration].float() for curve in curves.values()]).tolist()
        return dict(zip(curves, values, strict=True))

    @torch.no_grad()
    def result(self) -> Result:
        """The images as they are now, with their masks, logits, losses and history.

        Raises:
            SmiError: rebirth, before the last image but one of each trajectory is detached.
        """
        if self.strategy.detaches and len(self._parts) < len(self.schedule):
            raise SmiError(
                f"after {self.iteration} iterations {len(self._parts)} of {self.config.division} images of each "
                f"trajectory are detached; go on to iteration {max(self.schedule)} at least."
            )
        images = self.images if self._best is None else self._best[0]
        keep = self.keep
        if self.config.result_mask == "reranked" and self.schedule:
            keep = self._rerank(images)
        parts = [Part(self.iteration, images, keep)]
        if self.strategy.detaches:
            parts = [*self._parts, Part(self.iteration, images, self._last_part())]
        with self.model.unmerged():  # merging serves the making of images; what they show is for the teacher to say
            fed = [self._feed(part.images, part.keep if self.schedule else None)[0] for part in parts]
        losses = [
            {
                name: term(Context(part.taken_at, part.images, logits, self.targets, part.keep, None))
                for name, term in BUILT_IN.items()
            }
            for part, logits in zip(parts, fed, strict=True)
        ]
        images = interleaved([part.images for part in parts])
        pictures = [picture.repeat_interleave(len(parts), 0) for _, picture in self._snapshots]
        snapshots = [*(one[: self.config.snapshots] for one in pictures), self._picture(images)]
        targets = self.targets if self.targets.ndim == 1 else self.targets.argmax(1)
        return Result(
            images=images.float().cpu().clone(),
            keep=interleaved([part.keep for part in parts]).cpu(),
            dropped_at=interleaved([self._stopped_at(part) for part in parts]).cpu(),
            targets=targets.repeat_interleave(len(parts)).cpu(),
            indices=torch.tensor(self._numbers),
            logits=interleaved(fed).float().cpu(),
            losses={name: interleaved([one[name] for one in losses]).float().cpu() for name in BUILT_IN},
            history={name: values[: self.iteration].float().cpu() for name, values in self._curves().items()},
            snapshots=torch.stack(snapshots).cpu(),
            snapshot_at=[*(t for t, _ in self._snapshots), self.iteration],
            phases=[*self._phases, *self._phase()],
            info=self.model.info,
            config=self.config,
        )

    def _stopped_at(self, part: Part) -> Tensor:
        """(b, N) int32: `Result.dropped_at` of one part."""
        stopped = self._dropped_at.clamp_max(part.taken_at)
        return stopped.scatter(1, part.keep, self.iteration) if self.strategy.detaches else stopped

    def _last_part(self) -> Tensor:
        """The patches of a trajectory's last image: all that are left, or the highest ranked if they are more."""
        count = self.model.info.num_patches // self.config.division
        if self.keep.shape[1] == count:
            return self.keep
        return smi_kernels.select_tokens(self._rank(self.images, self.keep), self.keep, count)

    def _curves(self) -> dict[str, Tensor]:
        """Name -> (T,), the mean over the batch of each objective at every iteration done."""
        if self._descent is None:
            return self._history
        found = {"cross_entropy": self._descent.cross_entropies.mean(1)}
        found.update(zip(("tv1", "tv2", "l2"), self._descent.priors.mean(1).unbind(1), strict=True))
        found.update((term.name, self._history[term.name]) for term in self.objectives.extra)
        curves = {term.name: found[term.name] for term in self.objectives.terms}
        curves["total"] = torch.stack([term.weight * curves[term.name] for term in self.objectives.terms]).sum(0)
        return curves

    def _start_descent(self) -> smi_kernels.PixelDescent:
        config = self.config
        assert self.model.vit is not None
        if self.objectives.extra:
            self._own = OwnTerms(self.objectives, self.targets, self.keep, self.strategy.still, self._history)
        with smi_kernels.use_backend(self.model.backend):
            descent = smi_kernels.PixelDescent(
                self.model.vit,
                self.images,
                self.targets,
                self.offsets,
                low=self._low,
                high=self._high,
                cross_entropy=config.cross_entropy,
                tv1=config.tv1,
                tv2=config.tv2,
                l2=config.l2,
                learning_rate=config.learning_rate,
                lr_factors=None if self._lr_factors is None else self.images.new_tensor(self._lr_factors),
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                group=1 if config.norm == "image" else len(self.targets),
                frozen=config.stopped == "frozen",
                loss=self._own,
                around_loss=self._own.around_loss if self._own is not None else "",
            )
        if self._own is not None:
            proxy = weakref.proxy(descent)  # a cycle would keep the memory of a whole batch until it is found
            self._own.iteration = lambda: proxy.iteration
        return descent

    def _forward(self, offsets: Tensor | None, scores: bool = False) -> tuple[Context, Tensor | None]:
        """Feed the surviving patches of the images under one augmentation."""
        logits, found = self._feed(self.images, self._fed(self.keep), offsets, scores)
        context = self._context(self.images, self.keep, logits, offsets)
        return context, None if found is None else found.detach()

    def _fed(self, keep: Tensor) -> Tensor | None:
        """`keep`, or None if it is all patches."""
        return keep if keep.shape[1] < self.model.info.num_patches else None

    def _context(self, images: Tensor, keep: Tensor, logits: Tensor, offsets: Tensor | None) -> Context:
        return Context(
            step=self.iteration,
            images=images,
            logits=logits,
            targets=self.targets,
            keep=keep,
            offsets=offsets,
            features=self.model.features,
            per_image=self.objectives.per_image,
        )

    def _rank_fused(self, descent: smi_kernels.PixelDescent) -> Tensor:
        """(B, K) scores of the surviving patches, from the fused kernels where they know the signal."""
        assert self.model.vit is not None
        if self.config.model_ranking == self.config.ranking and self.model.info.ranking == self.model.vit.ranking:
            return descent.rank(self.keep.shape[1])[1]
        return self._rank(self.images, self.keep)

    def _rank(self, images: Tensor, keep: Tensor) -> Tensor:
        """(B, K) scores of the patches `keep` (B, K) of the un-augmented `images`."""
        if self.config.ranking == "random":
            return self.strategy.draw(self.iteration + 1, keep)
        if self.config.ranking == "gradient_input":
            with torch.enable_grad():
                images = images.detach().clone().requires_grad_()
                logits, _ = self._feed(images, self._fed(keep))
                loss, _ = self.objectives(self._context(images, keep, logits, None))
                return gradient_input(loss, images, keep, self.model.info.patch_size)
        with torch.no_grad():
            _, scores = self._feed(images, self._fed(keep), scores=True)
        assert scores is not None
        return scores

    def _prune(self, t: int) -> None:
        self._snapshots.append((t, self._picture(self.images)))
        self._phases += self._phase()
        self._phase_start = (t, self._seconds)
        before, fed = self._alive(), self.keep
        self.keep = self.strategy.select(t, self.keep, self._scores)
        if self.strategy.detaches:
            self._parts.append(Part(t, self.images.detach().clone(), without(fed, self.keep)))
        live = self._alive()
        self._dropped_at = torch.where(before & ~live, t, self._dropped_at)
        if self._own is not None:
            self._own.keep = self.keep
        if self._descent is not None:
            self._descent.prune(self.keep)
        elif self.config.stopped == "frozen":
            self._live_pixels = smi_kernels.patch_mask(live, self.model.info.grid, self.model.info.patch_size)

    def _alive(self) -> Tensor:
        """(B, N) bool, whether each patch survives."""
        return torch.zeros_like(self._dropped_at, dtype=torch.bool).scatter(1, self.keep, True)

    def _rerank(self, images: Tensor) -> Tensor:
        """The published result mask: the top floor((N + prefix) prod(1 - r)) of a dense pass over the final images."""
        info = self.model.info
        share = math.prod((1 - Fraction(repr(ratio)) for ratio in self.config.prune_ratio), start=Fraction(1))
        count = max(1, min(math.floor((info.num_patches + info.num_prefix_tokens) * share), info.num_patches))
        everything = torch.arange(info.num_patches, device=images.device).repeat(images.shape[0], 1)
        return smi_kernels.select_tokens(self._rank(images, everything), everything, count)

    @torch.no_grad()
    def _track_best(self) -> None:
        context, _ = self._forward(None)
        value = self.objectives.each(context)
        if self._best is None:
            self._best = (self.images.clone(), value)
            return
        images, lowest = self._best
        better = (value < lowest) | lowest.isnan()
        self._best = (torch.where(better.view(-1, 1, 1, 1), self.images, images), torch.where(better, value, lowest))

    def _stalled(self) -> bool:
        """Whether the last `patience` iterations lowered the mean objective by less than `tolerance` of it."""
        patience, t = self.config.patience, self.iteration
        if t - 2 * patience < max(self.schedule, default=0):
            return False
        total = self._curves()["total"]
        before, after = (total[t - k * patience : t - (k - 1) * patience].mean() for k in (2, 1))
        return bool(before - after < self.config.tolerance * before.abs())

    def _phase(self) -> list[Phase]:
        """The phase that ends now; nothing if it has no iterations."""
        start, seconds = self._phase_start
        if start == self.iteration:
            return []
        if self.model.device.type == "cuda":  # what was launched in this phase belongs to it
            began = time.perf_counter()
            torch.cuda.synchronize(self.model.device)
            self._seconds += time.perf_counter() - began
        kept = self.keep.shape[1]
        flops = count_flops(self.model, kept) * self.images.shape[0] * (self.iteration - start)
        return [Phase(start, self.iteration, kept, self._seconds - seconds, flops)]

    def _picture(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 of the first images, still on their device."""
        shown = images[: self.config.snapshots].detach()
        shown = shown * self._std.view(-1, 1, 1) + self._mean.view(-1, 1, 1)
        return (shown * 255).round().clamp(0, 255).to(torch.uint8)


def invert(
    model: nn.Module | SparseModel,
    targets: Tensor | Sequence[int],
    config: Config | None = None,
    *,
    objectives: Sequence[Loss] = (),
    indices: Sequence[int] | None = None,
    progress: Callable[[Inversion], None] | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
) -> Result:
    """Invert one batch: images that `model` takes for `targets`, and the patches that were inverted to get there.

    Arguments as for `Inversion`; `progress` as for `Inversion.run`.

    Example::

        teacher = timm.create_model("deit_base_patch16_224.fb_in1k", pretrained=True)
        result = smi.invert(teacher, targets=[1, 207, 281], config=smi.preset("fast"))
        result.images, result.keep  # (3, 3, 224, 224) normalised, (3, 46) patch indices
    """
    inversion = Inversion(
        model, targets, config, objectives=objectives, indices=indices, device=device, backend=backend
    )
    return inversion.run(progress)
