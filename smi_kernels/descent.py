"""Whole iterations of gradient descent on pixels, with every kernel of an iteration in one CUDA graph.

An iteration is: augment, feed the kept patches, cross-entropy, gradient of the patches' pixels, image priors, Adam,
clamp. Nothing in it is decided by the host: step counter, augmentations and losses live on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

import smi_kernels.ops  # noqa: F401  defines torch.ops.smi
from smi_kernels.graphs import Graph
from smi_kernels.patch_embed.reference import slot_table
from smi_kernels.vit import SparseViT


class PixelDescent:
    """A batch of images under descent; `advance` it, `prune` it.

    The loss of each group of `group` consecutive images is the mean of their weighted cross-entropies plus the weighted
    priors, whose norms run over the group. Groups do not meet, so several reference batches run in one launch.

    Args:
        vit: the network.
        images: (B, C, H, W) in the network's wide dtype, the start; not modified.
        targets: (B,) int64 classes or (B, classes) probabilities.
        table: (T, B, 3) or (T, 1, 3) int64, the augmentation of every iteration: rows of (dy, dx, flip).
        low, high: (C,), bounds of each channel.
        cross_entropy, tv1, tv2, l2: weights.
        learning_rate, beta1, beta2, eps: Adam without weight decay.
        group: images a group, 1 to B; the last group may be short.
        frozen: whether patches that were pruned stay bit for bit what they are; else priors and Adam go on moving them.
        micro_batch: feed at most so many images at once, which lowers the peak of memory and changes nothing else.
        unroll: iterations in one graph; on a CPU there are no graphs.

    Attributes:
        iteration: iterations done.
        images: as they are now.
        exp_avg, exp_avg_sq: Adam's moments, like `images`.
        keep: (B, K) int64, or None while no patch was pruned.
        cross_entropies: (T, B), of every iteration done.
        priors: (T, G, 3), unweighted tv1, tv2 and l2 of each group before every iteration done.
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
        beta1: float = 0.5,
        beta2: float = 0.99,
        eps: float = 1e-8,
        group: int = 1,
        frozen: bool = True,
        micro_batch: int | None = None,
        unroll: int = 8,
    ) -> None:
        B, T = images.shape[0], table.shape[0]
        if not 1 <= group <= max(B, 1):
            raise ValueError(f"group is {group}; expected 1 to {B}, the number of images.")
        if images.dtype != vit.weights.wide:
            raise ValueError(f"images are {images.dtype}; expected {vit.weights.wide}, which the network sums in.")
        self.vit = vit
        self.iteration = 0
        self.images = images.detach().clone(memory_format=torch.contiguous_format)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.keep: Tensor | None = None
        self.cross_entropies = images.new_full((T, B), torch.nan)
        self.priors = images.new_full((T, -(-B // group), 3), torch.nan)
        self._targets, self._table, self._low, self._high = targets, table.contiguous(), low, high
        self._weights = (tv1, tv2, l2)
        self._adam = (learning_rate, beta1, beta2, eps)
        self._group, self._frozen, self._unroll = group, frozen, unroll
        self._micro_batch = micro_batch or max(B, 1)
        self._slots: Tensor | None = None
        members = torch.full((-(-B // group),), group)
        if B % group:
            members[-1] = B % group
        # In float16 the gradient of the logits starts where there is room below it, and is put back in the end.
        lift = 256.0 if vit.weights.low == torch.float16 else 1.0
        self._lift = images.new_full((B,), lift) if lift != 1 else None
        self._scale = (cross_entropy / lift / members.double()).repeat_interleave(members).to(images)
        self._step = torch.zeros(1, dtype=torch.int64, device=images.device)
        self._sums = torch.ops.smi.prior_sums(self.images)
        self._colsum = torch.stack([head.colsum for head in vit.weights.heads_of_tokens])
        self._bias = torch.stack([head.bias for head in vit.weights.heads_of_tokens])
        self._ran = 0  # iterations since the last change of shapes
        self._graph: Graph | None = None
        self._captured = vit.weights

    def advance(self, iterations: int = 1) -> None:
        """So many iterations; the host does not wait for them."""
        if not 0 <= iterations <= self._table.shape[0] - self.iteration:
            raise ValueError(
                f"{iterations} iterations were asked for; expected 0 to {self._table.shape[0] - self.iteration}, what "
                f"is left of the table's {self._table.shape[0]}."
            )
        if self._captured is not self.vit.weights:  # a graph knows addresses, and these are gone
            self._graph, self._captured = None, self.vit.weights
        while iterations:
            if self.images.is_cuda and self._graph is None and self._ran and iterations >= self._unroll:
                self._graph = Graph(lambda: self._iterate(self._unroll), self.images.device)
            if self._graph is not None and iterations >= self._unroll:
                self._graph.replay()
                done = self._unroll
            else:
                self._iterate(1)
                done = 1
            self._ran += done
            self.iteration += done
            iterations -= done

    @torch.no_grad()
    def rank(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` patches with most class attention, un-augmented: (B, count) int64, and (B, K) the attention."""
        trace = self.vit.run(self.images, self.keep, None, trace=False)
        keep = self.keep
        if keep is None:
            keep = torch.arange(self.vit.weights.position.shape[0], device=self.images.device)
            keep = keep.repeat(self.images.shape[0], 1)
        return self.vit.rank(trace, keep, count)

    def prune(self, keep: Tensor) -> None:
        """Go on with the patches `keep` (B, K) int64 alone."""
        self.keep = keep.contiguous()
        self._slots = slot_table(self.keep, self.vit.weights.position.shape[0])
        self._graph, self._ran = None, 0

    @torch.no_grad()
    def _iterate(self, iterations: int) -> None:
        images, sums = self.images, self._sums
        for _ in range(iterations):
            images, sums = self._once(images, sums)
        self.images.copy_(images)
        self._sums.copy_(sums)

    def _once(self, images: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        ops, (H, W) = torch.ops.smi, images.shape[2:]
        lr, beta1, beta2, eps = self._adam
        offsets, bias_correction, coefficients = ops.begin_step(
            self._step, self._table, sums, *self._weights, self._group, H, W, beta1, beta2, self.priors
        )
        images_new, rows = ops.pixel_step(
            images,
            self.exp_avg,
            self.exp_avg_sq,
            self._d_patches(images, offsets),
            None,
            self._slots,
            offsets,
            coefficients,
            self._group,
            bias_correction,
            lr,
            beta1,
            beta2,
            eps,
            self._low,
            self._high,
            self._frozen,
            *self.vit.weights.patch_size,
        )
        return images_new, ops.finish_prior_sums(images_new, rows, self._step)

    def _d_patches(self, images: Tensor, offsets: Tensor) -> Tensor:
        """(B, K, C * height * width), and the cross-entropies to their place in the history."""
        B, size = images.shape[0], self._micro_batch
        made = []
        for start in range(0, B, size):
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
