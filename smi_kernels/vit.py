"""A frozen timm Vision Transformer on fused kernels: forward over kept patches, input-only backward.

Ten kernels a block. LayerNorm, softmax scale and LayerScale are folded into neighbouring weights, what remains of them
rides in the prologues and epilogues of the matrix products, and nothing is computed for weights that never change. If
the head reads the class token, the last block computes keys and values for every token and all else for that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import smi_kernels.ops  # noqa: F401  defines torch.ops.smi
from smi_kernels import blocks, tuning
from smi_kernels.folding import VitWeights, fold, unsupported_reasons
from smi_kernels.linear.reference import gradient_sums, row_statistics
from smi_kernels.marks import span
from smi_kernels.token_merge.reference import merge_counts

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Memory = Literal["fast", "small"]
_LOW = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trace:
    """What `SparseViT.backward` needs of a `SparseViT.run`.

    Attributes:
        parts: (R, B, classes), what each of the R head-read tokens adds to the logits.
        saved: of each block its `blocks.Saved`, or under the small memory plan its input and statistics.
        head_x, head_moments: rows that the head normalised, and for each head their moments.
        query, key: (B, H, d) of the class token and (B, N, H, d) of all tokens in the last block, before any norm.
        tokens: N.
        size: (B, N') patches in each token of the last block, None for one in each.
    """

    parts: Tensor
    saved: list[tuple[Any, ...]]
    head_x: Tensor
    head_moments: list[Tensor]
    query: Tensor | None
    key: Tensor | None
    tokens: int
    size: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All that `SparseViT.backward` reads, as one list."""
        saved = (tensor for kept in self.saved for tensor in kept)
        return [self.size, self.parts, self.head_x, *self.head_moments, *saved]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], heads: int, blocks_: int, tokens: int) -> Trace:
        """The trace whose `tensors` these are, but for what only `SparseViT.rank` reads."""
        first = 3 + heads
        each = (len(tensors) - first) // blocks_
        saved = [tuple(tensors[i : i + each]) for i in range(first, len(tensors), each)]
        parts, head_x, *moments = (tensor for tensor in tensors[1:first] if tensor is not None)
        return cls(parts, saved, head_x, moments, None, None, tokens, tensors[0])


class SparseViT(nn.Module):
    """A frozen ViT, fed any subset of patches under any roll and flip of the image, and differentiable in the image.

    Make it with `from_timm`. Weights are folded once, and do not follow the model they came from.

    Args of a call:
        images: (B, C, H, W) floating, normalised as the model wants; computed in float32 (float64 in a float64 model).
        keep: (B, K) int64 patch indices of the un-augmented image, each at most once a row, any order; None feeds all.
        jitter: (B, 3) or (1, 3) int64 rows of (dy, dx, flip), an augmentation ``flip(roll(images, (dy, dx)))`` that is
            folded into addressing; None is none. A kept patch is read at, and takes the position embedding of, its
            nearest cell (Hu et al., ICML 2024, published behaviour).
        class_attention: whether to give the ranking signal too.

    Returns:
        logits: (B, classes) float32; with `class_attention` also (B, K) float32, the class token's attention to each
        fed patch in the last block, mean over heads (Hu et al., ICML 2024, equation 4); no gradient flows through it.

    Attributes:
        merge_to: share of the fed patches that merging of alike tokens inside the blocks leaves in front of the last
            one (Bolya et al., "Token Merging", ICLR 2023, section 3; see `smi_kernels.merge_counts`); may be set,
            but not between a forward and its backward. None and 1 merge nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, attention asked of a model without class token or while
            tokens are merged, or more to merge than the blocks can.
    """

    def __init__(
        self,
        weights: VitWeights,
        precision: Precision = "fp32",
        memory: Memory = "fast",
        batch_invariant: bool = False,
        merge_to: float | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.precision = precision
        self.memory = memory
        self.batch_invariant = batch_invariant
        self.merge_to = merge_to
        self._dot = ("tf32" if precision == "tf32" else "ieee") + (tuning.INVARIANT if batch_invariant else "")

    @classmethod
    def from_timm(
        cls,
        model: nn.Module,
        precision: Precision = "fp32",
        *,
        memory: Memory = "fast",
        batch_invariant: bool = False,
        merge_to: float | None = None,
        device: str | torch.device | None = None,
    ) -> SparseViT:
        """Fold the weights of a timm ``VisionTransformer``, which is not modified.

        Args:
            model: in any mode; its dropout and drop path count as switched off.
            precision: of the network's matrix products: IEEE float32, TF32, bfloat16 or float16; sums, statistics and
                residual stream are float32. A float64 model stays float64 under ``fp32``.
            memory: ``fast`` keeps 18 bytes times width per token and block in 16 bits; ``small`` keeps each block's
                input alone and computes the rest again in the backward.
            batch_invariant: one tile for every batch size, so that an image's bits do not depend on its batch.
            merge_to: see the attribute.
            device: where to; default where the model is.

        Raises:
            ValueError: a model that cannot be folded, with every reason; or no such precision or memory plan.
        """
        if precision not in _LOW:
            raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, _LOW))}.")
        if memory not in ("fast", "small"):
            raise ValueError(f"memory is {memory!r}; expected 'fast' or 'small'.")
        reasons = unsupported_reasons(model)
        if reasons:
            raise ValueError(f"{type(model).__name__} cannot run on the fused kernels: {'; '.join(reasons)}.")
        first = next(model.parameters())
        dtype = torch.float64 if first.dtype == torch.float64 and precision == "fp32" else _LOW[precision]
        to = torch.device(device) if device is not None else first.device
        weights = fold(model, dtype, to, tf32=precision == "tf32")
        return cls(weights, precision, memory, batch_invariant, merge_to)

    def forward(
        self, images: Tensor, keep: Tensor | None = None, jitter: Tensor | None = None, class_attention: bool = False
    ) -> Any:
        from smi_kernels.autograd import apply_network

        self._check(images, keep, jitter)
        logits, scores = apply_network(self, images.to(self.weights.wide), keep, jitter, class_attention)
        return (logits, scores) if class_attention else logits

    def _apply(self, function: Any, recurse: bool = True) -> SparseViT:
        """Moves between devices; the dtype of each weight is part of the precision."""
        moved = self.weights.apply(function)
        if moved.low != self.weights.low or moved.patch_weight.dtype != self.weights.low:
            raise ValueError(
                f"this network was folded for {self.precision}; fold the model again for another precision."
            )
        self.weights = moved
        return self

    def run(self, images: Tensor, keep: Tensor | None, offsets: Tensor | None, trace: bool = True) -> Trace:
        """The forward without autograd. The logits are `Trace.parts` summed over its first axis.

        Args:
            images: (B, C, H, W) contiguous, in the wide dtype.
            keep, offsets: as `keep` and `jitter` of a call.
            trace: whether `backward` will follow; if not, nothing is kept for it.
        """
        w, ops = self.weights, torch.ops.smi
        R = w.head_tokens
        saved: list[tuple[Any, ...]] = []
        x, x_low, stats = ops.embed_tokens(
            images, keep, offsets, w.patch_weight, w.position, w.prefix, *w.patch_size, self._dot
        )
        B, N, D = x.shape
        x_low = blocks.low_of(x, x_low).view(B * N, D)
        x = x.view(B * N, D)
        prefix, size, fed = w.prefix.shape[0], None, N
        for number, (block, left) in enumerate(zip(w.blocks, self._left(N), strict=True)):
            before = (x, stats, size)
            with span(f"block {number} forward"):
                if R and number == len(w.blocks) - 1:
                    x, x_low, stats, kept = blocks.last_forward(block, x, x_low, stats, N, w.heads, R, self._dot, size)
                else:
                    x, x_low, stats, kept = blocks.forward(
                        block, x, x_low, stats, N, w.heads, self._dot, size, prefix, N - left
                    )
                    N, size = left, size if kept.merged_size is None else kept.merged_size
            if trace:
                saved.append(kept if self.memory == "fast" else before)
        if R:
            assert kept.query is not None
            query, key = (
                kept.query.view(B, R, w.heads, w.head_dim)[:, 0],
                kept.qkv.view(B, N, 2, w.heads, w.head_dim)[:, :, 0],
            )
        else:
            qkv = kept.qkv.view(B, N, 3, w.heads, w.head_dim)
            query, key = qkv[:, 0, 0], qkv[:, :, 1]
            x = x.view(B, N, D)[:, prefix:]
            x = x.mean(1) if size is None else (x * size[:, prefix:, None]).sum(1) / (fed - prefix)
            x_low, stats = x.to(w.low), row_statistics(x)
        rows, stats = x_low.view(B, R or 1, D), stats.view(B, R or 1, *stats.shape[1:])
        parts, moments = zip(
            *(
                ops.norm_linear(rows[:, r], stats[:, r], *head, w.head_eps, w.wide, self._dot)
                for r, head in enumerate(w.heads_of_tokens)
            ),
            strict=True,
        )
        return Trace(_stack(parts, 0), saved, x_low, list(moments), query, key, fed, size)

    def _left(self, tokens: int) -> list[int]:
        """Tokens behind each block, prefix among them, of so many in front of the first."""
        prefix, depth = self.weights.prefix.shape[0], len(self.weights.blocks)
        if self.merge_to is None:
            return [tokens] * depth
        return [prefix + left for left in merge_counts(tokens - prefix, depth, self.merge_to)]

    def backward(self, trace: Trace, d_logits: Tensor, dstats: Tensor, scale: Tensor | None = None) -> Tensor:
        """Gradient with respect to the pixels of the fed patches.

        Args:
            trace: of a `run`.
            d_logits: (B, classes) in the low dtype.
            dstats: (R, B, parts, 2), for each head-read token the sums of ``d_logits colsum`` and
                ``d_logits (part - bias)``, as `head_sums` and ``cross_entropy_head`` give.
            scale: (B,) factor of each image's gradient, or None.

        Returns:
            (B, K, C * height * width) in the wide dtype, patches in the order of `keep`.
        """
        w, ops = self.weights, torch.ops.smi
        B, D, R = d_logits.shape[0], w.width, w.head_tokens
        rows = trace.head_x.view(B, R or 1, D)
        made = [
            ops.norm_linear_dx(
                d_logits, head.weight, dstats[r], rows[:, r], trace.head_moments[r], None, None, 1, 1, self._dot
            )
            for r, head in enumerate(w.heads_of_tokens)
        ]
        dx = _stack([pair[0] for pair in made], 1).view(-1, D)
        dx_low = blocks.low_of(dx, _stack([pair[1] for pair in made], 1))
        if not R:
            prefix, final = w.prefix.shape[0], self._left(trace.tokens)[-1]
            share = (dx / (trace.tokens - prefix)).view(B, 1, D)
            share = share.expand(-1, final - prefix, -1) if trace.size is None else share * trace.size[:, prefix:, None]
            dx = torch.cat((share.new_zeros(B, prefix, D), share), 1).view(-1, D)
            dx_low = dx.to(w.low)
        left = [trace.tokens, *self._left(trace.tokens)]
        for number in reversed(range(len(w.blocks))):
            block, kept, N = w.blocks[number], trace.saved[number], left[number]
            last = bool(R) and number == len(w.blocks) - 1
            if self.memory == "fast":
                kept = blocks.Saved(*kept)
            else:
                x, stats, size = kept
                given = (block, x, x.to(w.low), stats, N, w.heads)
                *_, kept = (
                    blocks.last_forward(*given, R, self._dot, size)
                    if last
                    else blocks.forward(*given, self._dot, size, w.prefix.shape[0], N - left[number + 1])
                )
            with span(f"block {number} backward"):
                if last:
                    dx, dx_low = blocks.last_backward(block, kept, dx, dx_low.view(-1, D), N, w.heads, R, self._dot)
                else:
                    dx, dx_low = blocks.backward(block, kept, dx, dx_low, N, w.heads, self._dot)
        patches: Tensor = ops.embed_tokens_dx(dx_low.view(B, N, D), w.patch_weight, w.prefix.shape[0], scale, self._dot)
        return patches

    def backward_of(self, trace: Trace, d_logits: Tensor) -> Tensor:
        """`backward` from a gradient of the logits as any loss gives it: (B, classes) in the wide dtype."""
        scale = None
        if self.weights.low == torch.float16:
            # Images never meet in the network, so each gradient can start near 1, where float16 is widest, and is put
            # back in the end; a power of two changes no digit.
            _, exponent = torch.frexp(d_logits.abs().amax(1))
            scale = torch.ldexp(torch.ones_like(d_logits[:, 0]), exponent)
            d_logits = d_logits / scale[:, None]
        low = d_logits.to(self.weights.low).contiguous()
        return self.backward(trace, low, self.head_sums(trace.parts, low), scale)

    def head_sums(self, parts: Tensor, d_logits: Tensor) -> Tensor:
        """The `dstats` that `backward` wants: (R, B, parts, 2).

        Args:
            parts: (R, B, classes) of a `Trace`.
            d_logits: (B, classes) in the low dtype.
        """
        sums = [
            gradient_sums(d_logits, part, head.colsum, head.bias)
            for part, head in zip(parts, self.weights.heads_of_tokens, strict=True)
        ]
        return torch.stack(sums)

    def rank(self, trace: Trace, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Class attention to each fed patch, and the `count` highest-ranked of them, in one launch.

        Args:
            keep: (B, K) int64, increasing along each row: the patches that were fed.

        Returns:
            (B, count) int64, increasing; (B, K) float32.

        Raises:
            ValueError: a model without class token, or tokens are merged.
        """
        w = self.weights
        if trace.size is not None:
            raise ValueError("tokens are merged, so patches have no attention of their own to be ranked by.")
        if not w.has_class_token:
            raise ValueError("this model has no class token, so its patches have no class attention to be ranked by.")
        last, prefix = w.blocks[-1], w.prefix.shape[0]
        found: tuple[Tensor, Tensor] = torch.ops.smi.rank_tokens(
            trace.query, trace.key, 1.0, last.qk_norm, last.qk_eps, keep, count, prefix
        )
        return found

    def _check(self, images: Tensor, keep: Tensor | None, jitter: Tensor | None) -> None:
        w = self.weights
        size = (w.channels, w.grid[0] * w.patch_size[0], w.grid[1] * w.patch_size[1])
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, {size[0]}, {size[1]}, {size[2]}).")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected floating-point numbers, normalised.")
        if images.device != w.patch_weight.device:
            raise ValueError(
                f"images are on {images.device}, the weights on {w.patch_weight.device}; move one of them."
            )
        B, cells = images.shape[0], w.position.shape[0]
        if keep is not None and (
            keep.ndim != 2 or keep.shape[0] != B or not 1 <= keep.shape[1] <= cells or keep.dtype != torch.int64
        ):
            raise ValueError(
                f"keep has shape {tuple(keep.shape)} and dtype {keep.dtype}; expected ({B}, K) int64 with K from 1 to "
                f"{cells}."
            )
        if jitter is not None and (jitter.shape not in ((B, 3), (1, 3)) or jitter.dtype != torch.int64):
            raise ValueError(
                f"jitter has shape {tuple(jitter.shape)} and dtype {jitter.dtype}; expected ({B}, 3) or (1, 3) int64, "
                f"rows of (dy, dx, flip)."
            )
        for name, value in (("keep", keep), ("jitter", jitter)):
            if value is not None and value.device != images.device:
                raise ValueError(f"{name} is on {value.device}, the images are on {images.device}; move it there.")


def _stack(tensors: Any, dim: int) -> Tensor:
    """Stacked, without a copy if there is one alone."""
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(list(tensors), dim=dim)
