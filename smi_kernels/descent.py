"""Whole iterations of gradient descent on pixels, with every kernel of an iteration in one CUDA graph.

An iteration is: augment, feed the kept patches, cross-entropy, gradient of the patches' pixels, image priors, Adam,
clamp. Nothing in it is decided by the host: step counter, augmentations and losses live on the device. A loss of the
caller's is captured with the rest, or, if it cannot be, runs between a graph that feeds and a graph that moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import smi_kernels.ops  # noqa: F401  defines torch.ops.smi
from smi_kernels.graphs import Graph, NoWaiting
from smi_kernels.marks import span
from smi_kernels.patch_embed.reference import slot_table
from smi_kernels.vit import SparseViT, Trace

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Fed(NamedTuple):
    """What the first half of an iteration leaves to the second."""

    offsets: Tensor
    bias_correction: Tensor
    coefficients: Tensor
    trace: Trace
    logits: Tensor


class _Halves(NamedTuple):
    """Two graphs of one iteration, and the tensors between them; None for gradients that the loss does not give."""

    feed: Graph
    move: Graph
    fed: list[_Fed]
    gradients: tuple[Tensor | None, Tensor | None]


class PixelDescent:
    """A batch of images under descent; `advance` it, `prune` it.

    The loss of each group of `group` consecutive images is the mean of their weighted cross-entropies plus the weighted
    priors, whose norms run over the group. Groups do not meet, so several reference batches run in one launch.

    `loss(images, logits, offsets, step)` is a further term, differentiable in images (B, C, H, W), un-augmented, and
    logits (B, classes) of the fed patches; `offsets` (B, 3) or (1, 3) int64 is this iteration's row of the table, and
    `step` (1,) int64 the iterations done, on the device. It gives a scalar, which is added to the sum over groups. In a
    graph its Python code is not run again: what it reads on the host stays as it was at the capture.

    Args:
        vit: the network.
        images: (B, C, H, W) in the network's wide dtype, the start; not modified.
        targets: (B,) int64 classes or (B, classes) probabilities.
        table: (T, B, 3) or (T, 1, 3) int64, the augmentation of every iteration: rows of (dy, dx, flip).
        low, high: (C,), bounds of each channel.
        cross_entropy, tv1, tv2, l2: weights.
        learning_rate, beta1, beta2, eps: Adam without weight decay.
        lr_factors: (T,) in the dtype of `images`, above 0: what each iteration multiplies `learning_rate` by; None: 1.
        group: images a group, 1 to B; the last group may be short.
        frozen: whether patches that were pruned stay bit for bit what they are; else priors and Adam go on moving them.
        micro_batch: feed at most so many images at once, which lowers the peak of memory and changes nothing else; not
            with a `loss`, in which images may meet.
        unroll: iterations in one graph; on a CPU there are no graphs.
        loss: further term, or None.
        around_loss: why `loss` must not be captured; empty if that may be tried.

    Attributes:
        iteration: iterations done.
        between: whether no iteration is half done, as it may be where an exception came in the middle of one.
        in_graphs: whether iterations are captured in CUDA graphs, so that the host only starts several at once.
        images: as they are now; may be written to in place between calls.
        exp_avg, exp_avg_sq: Adam's moments, like `images`.
        keep: (B, K) int64, or None while no patch was pruned.
        cross_entropies: (T, B), of every iteration done.
        priors: (T, G, 3), unweighted tv1, tv2 and l2 of each group before every iteration done.
        around_loss: why graphs, where there are any, go around `loss`; empty as long as nothing speaks against capture.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, classes or sizes out of range; here, in `prune`, and in
            `advance` more iterations than the table has, or a `loss` under `torch.inference_mode`.
    """

    def __init__(
        self,
        vit: SparseViT,
        images: Tensor,
        targets: Tensor,
        table: Tensor,
        *,
        low: Tensor,
        high: Tensor,
        cross_entropy: float = 1.0,
        tv1: float = 0.0,
        tv2: float = 0.0,
        l2: float = 0.0,
        learning_rate: float = 0.25,
        lr_factors: Tensor | None = None,
        beta1: float = 0.5,
        beta2: float = 0.99,
        eps: float = 1e-8,
        group: int = 1,
        frozen: bool = True,
        micro_batch: int | None = None,
        unroll: int = 8,
        loss: Loss | None = None,
        around_loss: str = "",
    ) -> None:
        B, T = images.shape[0], table.shape[0]
        if not 1 <= group <= max(B, 1):
            raise ValueError(f"group is {group}; expected 1 to {B}, the number of images.")
        _check(vit, images, targets, table, low, high, lr_factors)
        for name, value in (("micro_batch", micro_batch), ("unroll", unroll)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if images.dtype != vit.weights.wide:
            raise ValueError(f"images are {images.dtype}; expected {vit.weights.wide}, which the network sums in.")
        if loss is not None and micro_batch is not None and micro_batch < B:
            raise ValueError(f"micro_batch is {micro_batch}; expected None or {B}, because images may meet in a loss.")
        self.vit = vit
        self.iteration, self.between = 0, True
        self.images = images.detach().clone(memory_format=torch.contiguous_format)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.keep: Tensor | None = None
        self.cross_entropies = images.new_full((T, B), torch.nan)
        self.priors = images.new_full((T, -(-B // group), 3), torch.nan)
        self._targets, self._table, self._low, self._high = targets, table.contiguous(), low, high
        self._weights = (tv1, tv2, l2)
        self._adam = (learning_rate, beta1, beta2, eps)
        # Steps are learning_rate / bias_correction[0].
        self._slower = None if lr_factors is None else torch.stack((1 / lr_factors, torch.ones_like(lr_factors)), 1)
        self._group, self._frozen, self._unroll = group, frozen, unroll
        self._micro_batch = micro_batch or max(B, 1)
        self._slots: Tensor | None = None
        members = torch.full((-(-B // group),), group, device="cpu")
        if B % group:
            members[-1] = B % group
        # In float16 the gradient of the logits starts where there is room below it, and is put back in the end.
        lift = 256.0 if vit.weights.low == torch.float16 else 1.0
        self._lift = images.new_full((B,), lift) if lift != 1 else None
        self._scale = (cross_entropy / lift / members.double()).repeat_interleave(members).to(images)
        self._share = (cross_entropy / members.double()).repeat_interleave(members).to(images)
        self._loss, self.around_loss = loss, around_loss if loss is not None else ""
        self._step = torch.zeros(1, dtype=torch.int64, device=images.device)
        self._sums = torch.ops.smi.prior_sums(self.images)
        self._colsum = torch.stack([head.colsum for head in vit.weights.classifiers])
        self._bias = torch.stack([head.bias for head in vit.weights.classifiers])
        self._ran = 0  # iterations since the last change of shapes
        self.in_graphs = self.images.is_cuda
        self._whole: Graph | None = None
        self._halves: _Halves | None = None
        self._given = (True, True)  # whether the loss gave gradients of logits and of images, when last launched
        self._captured = vit.weights, vit.merge_to
        self._version = _version(self.images)  # that `_sums` are of

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """So many iterations; the host does not wait for them."""
        if not 0 <= iterations <= self._table.shape[0] - self.iteration:
            raise ValueError(
                f"{iterations} iterations were asked for; expected 0 to {self._table.shape[0] - self.iteration}, what "
                f"is left of the table's {self._table.shape[0]}."
            )
        if self._loss is not None and torch.is_inference_mode_enabled():
            raise ValueError("a loss has no gradient under torch.inference_mode(); use torch.no_grad() in its place.")
        weights, merge_to = self._captured
        if weights is not self.vit.weights or merge_to != self.vit.merge_to:  # a graph knows addresses and shapes
            self._forget()
            self._captured = self.vit.weights, self.vit.merge_to
        if iterations:
            self._renew()
        while iterations:
            done = 1
            if self.in_graphs and self._ran:
                self._capture(iterations)
            if self._whole is not None and iterations >= self._unroll:
                self.between = False
                self._whole.replay()
                done = self._unroll
            elif self._halves is not None:
                self._replay(self._halves)
            else:
                self._iterate(1)
            self._ran += done
            self.iteration += done
            self.between = True
            iterations -= done

    @torch.no_grad()
    def rank(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` patches with most class attention, un-augmented: (B, count) int64, and (B, K) the attention.

        Raises:
            ValueError: `count` is outside 1..K.
        """
        trace = self.vit.run(self.images, self.keep, None, trace=False)
        keep = self.keep
        if keep is None:
            keep = torch.arange(self.vit.weights.position.shape[0], device=self.images.device)
            keep = keep.repeat(self.images.shape[0], 1)
        return self.vit.rank(trace, keep, count)

    def prune(self, keep: Tensor) -> None:
        """Go on with the patches `keep` (B, K) int64 alone, each at most once a row."""
        self.vit.check(self.images, keep, None)
        self.keep = keep.contiguous()
        self._slots = slot_table(self.keep, self.vit.weights.position.shape[0])
        self._forget()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """What the iterations to come depend on, and the history of those done: the very tensors, which go on changing.

        ``images``, ``exp_avg``, ``exp_avg_sq`` (B, C, H, W), ``sums`` (B, C, 9) of the priors, ``cross_entropies``
        (t, B) and ``priors`` (t, groups, 3) of t iterations, and after a pruning ``keep`` (B, K) int64. To be asked for
        only while `between`.
        """
        self._renew()
        t = self.iteration
        state = {"images": self.images, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "sums": self._sums}
        state |= {"cross_entropies": self.cross_entropies[:t], "priors": self.priors[:t]}
        return state if self.keep is None else {**state, "keep": self.keep}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the `state_dict` of a descent that was begun with the same arguments, bit for bit as that would.

        Raises:
            KeyError, ValueError: a tensor is missing, or of another shape or dtype than this descent's.
        """
        t = len(state["cross_entropies"])
        places = {"images": self.images, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "sums": self._sums}
        places |= {"cross_entropies": self.cross_entropies[:t], "priors": self.priors[:t]}
        for name, place in places.items():
            value = state[name]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; expected {tuple(place.shape)} and "
                    f"{place.dtype}, as in a descent of the same arguments."
                )
        if "keep" in state:
            self.prune(state["keep"].to(self.images.device))
        else:
            self.keep = self._slots = None
            self._forget()
        for name, place in places.items():
            place.copy_(state[name])
        self._step.fill_(t)
        self.iteration = t
        self._version = _version(self.images)

    def _renew(self) -> None:
        """The sums of images that somebody else wrote to."""
        if _version(self.images) != self._version:
            self._store(self.images, torch.ops.smi.prior_sums(self.images))

    def _forget(self) -> None:
        """Graphs of other shapes or addresses; the first iteration after this compiles what the next ones capture."""
        self._whole = self._halves = None
        self._ran = 0

    def _capture(self, iterations: int) -> None:
        """Graphs of what has run in these shapes, if there are none and `iterations` are worth one."""
        device = self.images.device
        if not self.around_loss and self._whole is None and iterations >= self._unroll:
            try:
                self._whole = Graph(self._unrolled, device)
            except Exception as error:
                if self._loss is None:
                    raise
                self.around_loss = f"{type(error).__name__}: {error}".strip().split("\n")[0]
                warnings.warn(
                    f"the loss cannot be captured, so it runs between two CUDA graphs ({self.around_loss}). To have "
                    f"whole iterations in one graph, compute it from its tensors, on their device, without .item(), "
                    f"masks as indices, or numbers of the host that change.",
                    stacklevel=4,
                )
        # At once, for a capture that succeeds also clears what a spoilt one leaves behind in PyTorch's generators.
        if self.around_loss and self._halves is None:
            fed: list[_Fed] = []
            # Only what the launched iteration had: kernels for more would be loaded in the capture, which CUDA forbids.
            logits_given, images_given = self._given
            d_logits = self._bias.new_zeros(self.images.shape[0], self._bias.shape[1]) if logits_given else None
            d_images = torch.zeros_like(self.images) if images_given else None

            def feed() -> None:
                fed[:] = [self._feed(self.images, self._sums)]

            def move() -> None:
                self._store(*self._move(self.images, fed[0], d_logits, d_images))

            self._halves = _Halves(Graph(feed, device), Graph(move, device), fed, (d_logits, d_images))

    def _unrolled(self) -> None:
        with NoWaiting():
            self._iterate(self._unroll)

    def _replay(self, halves: _Halves) -> None:
        """One iteration, with the loss between two graphs."""
        halves.feed.replay()
        fed = halves.fed[0]
        gradients = self._judge(self.images, fed.logits, fed.offsets)
        pairs = list(zip(halves.gradients, gradients, strict=True))
        if any(static is None and gradient is not None for static, gradient in pairs):  # it gives more than before
            self._store(*self._move(self.images, fed, *gradients))
            self._halves = None
            return
        for static, gradient in pairs:
            if static is not None:
                static.zero_() if gradient is None else static.copy_(gradient)
        self.between = False
        halves.move.replay()

    def _iterate(self, iterations: int) -> None:
        images, sums = self.images, self._sums
        for _ in range(iterations):
            images, sums = self._once(images, sums)
        self._store(images, sums)

    def _store(self, images: Tensor, sums: Tensor) -> None:
        if self.in_graphs:  # which know addresses
            self.images.copy_(images)
            self._sums.copy_(sums)
        else:
            self.images.set_(images)  # type: ignore[call-overload]
            self._sums = sums
        self._version = _version(self.images)

    def _once(self, images: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        if self._loss is None:
            offsets, *begun = self._begin(sums)
            return self._step_pixels(images, self._d_patches(images, offsets), None, offsets, *begun)
        fed = self._feed(images, sums)
        return self._move(images, fed, *self._judge(images, fed.logits, fed.offsets))

    def _feed(self, images: Tensor, sums: Tensor) -> _Fed:
        """The first half of an iteration, up to the logits."""
        offsets, bias_correction, coefficients = self._begin(sums)
        trace = self.vit.run(images, self.keep, offsets)
        return _Fed(offsets, bias_correction, coefficients, trace, trace.parts.sum(0))

    def _judge(self, images: Tensor, logits: Tensor, offsets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the loss with respect to logits and images; None where it does not depend on them."""
        assert self._loss is not None
        with torch.enable_grad():
            images, logits = images.detach().requires_grad_(), logits.detach().requires_grad_()
            value = self._loss(images, logits, offsets, self._step)
            d_logits, d_images = None, None
            if value.requires_grad:
                d_logits, d_images = torch.autograd.grad(value, (logits, images), allow_unused=True)
        self._given = d_logits is not None, d_images is not None
        return d_logits, d_images

    def _move(
        self, images: Tensor, fed: _Fed, d_logits: Tensor | None, d_images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The second half of an iteration: cross-entropy, the network's backward, the pixel step."""
        _, gradient, _ = torch.ops.smi.cross_entropy_head(
            fed.trace.parts, self._targets, self._colsum, self._bias, self._share, images.dtype, self.cross_entropies,
            self._step,
        )  # fmt: skip
        d_patches = self.vit.backward_of(fed.trace, gradient if d_logits is None else gradient + d_logits)
        return self._step_pixels(images, d_patches, d_images, fed.offsets, fed.bias_correction, fed.coefficients)

    def _begin(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, bias corrections and coefficients of the priors for this iteration."""
        H, W = self.images.shape[2:]
        offsets, bias_correction, coefficients = torch.ops.smi.begin_step(
            self._step, self._table, sums, *self._weights, self._group, H, W, *self._adam[1:3], self.priors
        )
        if self._slower is not None:
            bias_correction = bias_correction * self._slower.index_select(0, self._step).view(2)
        return offsets, bias_correction, coefficients

    def _step_pixels(
        self,
        images: Tensor,
        d_patches: Tensor,
        d_images: Tensor | None,
        offsets: Tensor,
        bias_correction: Tensor,
        coefficients: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """New images and the sums of their priors; the iteration then counts as done on the device."""
        self.between = False
        with span("pixel step"):
            images_new, rows = torch.ops.smi.pixel_step(
                images, self.exp_avg, self.exp_avg_sq, d_patches, d_images, self._slots, offsets, coefficients,
                self._group, bias_correction, *self._adam, self._low, self._high, self._frozen,
                *self.vit.weights.patch_size,
            )  # fmt: skip
            return images_new, torch.ops.smi.finish_prior_sums(images_new, rows, self._step)

    def _d_patches(self, images: Tensor, offsets: Tensor) -> Tensor:
        """(B, K, C * height * width), and the cross-entropies to their place in the history."""
        B, size = images.shape[0], self._micro_batch
        made = []
        for start in range(0, max(B, 1), size):
            part = slice(start, start + size)
            keep = None if self.keep is None else self.keep[part]
            trace = self.vit.run(images[part], keep, offsets if offsets.shape[0] == 1 else offsets[part])
            _, d_logits, dstats = torch.ops.smi.cross_entropy_head(
                trace.parts, self._targets[part], self._colsum, self._bias,
                None if self._lift is None else self._lift[part], self.vit.weights.low,
                self.cross_entropies[:, part], self._step,
            )  # fmt: skip
            made.append(self.vit.backward(trace, d_logits, dstats, self._scale[part]))
            del trace  # the next part's takes its memory
        return made[0] if len(made) == 1 else torch.cat(made)


def _version(images: Tensor) -> int | None:
    return None if images.is_inference() else images._version  # of inference mode, which counts none


def _check(
    vit: SparseViT,
    images: Tensor,
    targets: Tensor,
    table: Tensor,
    low: Tensor,
    high: Tensor,
    lr_factors: Tensor | None,
) -> None:
    """Raises ValueError for what kernels on a GPU would read beyond the end of, or not find."""
    vit.check(images, None, None)
    (B, C), classes = images.shape[:2], vit.weights.num_classes
    probabilities = targets.is_floating_point()
    if targets.shape != ((B, classes) if probabilities else (B,)) or not (
        probabilities or targets.dtype == torch.int64
    ):
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; expected ({B},) int64 classes or "
            f"({B}, {classes}) probabilities."
        )
    if not probabilities and B and not targets.is_meta:
        least, most = int(targets.min()), int(targets.max())
        if not 0 <= least <= most < classes:
            raise ValueError(f"targets are {least} to {most}; expected 0 to {classes - 1}.")
    if table.ndim != 3 or table.shape[1] not in (1, B) or table.shape[2] != 3 or table.dtype != torch.int64:
        raise ValueError(
            f"table has shape {tuple(table.shape)} and dtype {table.dtype}; expected (T, {B}, 3) or (T, 1, 3) int64, "
            f"rows of (dy, dx, flip)."
        )
    if lr_factors is not None and (lr_factors.shape != table.shape[:1] or lr_factors.dtype != images.dtype):
        raise ValueError(
            f"lr_factors have shape {tuple(lr_factors.shape)} and dtype {lr_factors.dtype}; expected "
            f"{tuple(table.shape[:1])} {images.dtype}."
        )
    for name, bound in (("low", low), ("high", high)):
        if bound.shape != (C,):
            raise ValueError(f"{name} has shape {tuple(bound.shape)}; expected ({C},).")
    placed = {"targets": targets, "table": table, "low": low, "high": high, "lr_factors": lr_factors}
    for name, value in placed.items():
        if value is not None and value.device != images.device:
            raise ValueError(f"{name} is on {value.device}, the images are on {images.device}; move it there.")
