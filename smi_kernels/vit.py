"""A frozen timm Vision Transformer on fused kernels: forward over kept patches, input-only backward.

Ten kernels a block. LayerNorm, softmax scale and LayerScale are folded into neighbouring weights, what remains of them
rides in the prologues and epilogues of the matrix products, and nothing is computed for weights that never change. If
the head reads the class token, the last block computes keys and values for every token and all else for that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smi_kernels import blocks, heads, rotary, tuning
from smi_kernels.attention.reference import received
from smi_kernels.folding import Pool, VitWeights, fold, unsupported_reasons
from smi_kernels.linear.reference import row_statistics
from smi_kernels.marks import span
from smi_kernels.ops import outside_autocast
from smi_kernels.token_merge.reference import merge_counts

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Memory = Literal["fast", "small"]
_LOW = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_NORMED, _READ = 3, 5  # tensors that a LayerNorm of all tokens keeps, and a head
_FIRST = 3 + 2 * _NORMED + _READ


@dataclass
class Trace:
    """What `SparseViT.backward` needs of a `SparseViT.run`.

    Attributes:
        parts: (R, B, classes), what each of the R classifiers adds to the logits.
        saved: of each block, and of an attention pooling; under the small memory plan its `blocks.Input`.
        normed: input, mean and 1 / standard deviation of the norms before the blocks and before the mean; or None.
        read: of the head.
        places: (B, N) int64 of `rotary.tokens`; None without rotary embeddings.
        query, key: (B, H, d) and (B, N, H, d), whose attention ranks patches: of the class token or the pooling's query
            to the tokens; or of all tokens to each other, (B, N, H, d) both. Before any query and key norm.
        tokens: N.
        size: (B, N') patches in each token of the last block, None for one in each.
    """

    parts: Tensor
    saved: list[blocks.Saved | blocks.Input]
    normed: list[Tensor | None]
    read: heads.Read
    places: Tensor | None
    query: Tensor | None
    key: Tensor | None
    tokens: int
    size: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All that `SparseViT.backward` reads, as one list."""
        return [
            self.parts,
            self.places,
            self.size,
            *self.normed,
            *self.read,
            *(tensor for kept in self.saved for tensor in kept),
        ]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], memory: Memory, tokens: int) -> Trace:
        """The trace of a network with this memory plan whose `tensors` these are, but for what only `rank` reads."""
        parts, places, size, *around = tensors[:_FIRST]
        kind: Any = blocks.Saved if memory == "fast" else blocks.Input
        each = len(kind._fields)
        saved = [kind(*tensors[i : i + each]) for i in range(_FIRST, len(tensors), each)]
        assert parts is not None
        read = heads.Read(*around[2 * _NORMED :])  # type: ignore[arg-type]
        return cls(parts, saved, around[: 2 * _NORMED], read, places, None, None, tokens, size)


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
        logits: (B, classes) float32; with `class_attention` also (B, K) float32, the attention to each fed patch that
        ranks it, mean over heads: the class token's in the last block (Hu et al., ICML 2024, equation 4), or what
        `ranking` names; no gradient flows through it.

    Attributes:
        ranking: ``class_attention``, or ``attention_pool``, that of an attention pooling's query, or
            ``received_attention``, what each patch receives from all tokens in the last block.
        merge_to: share of the fed patches that merging of alike tokens inside the blocks leaves in front of the last
            one (Bolya et al., "Token Merging", ICLR 2023, section 3; see `smi_kernels.merge_counts`); may be set,
            but not between a forward and its backward. None and 1 merge nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, attention asked while tokens are merged, or more to
            merge than the blocks can.
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

        self.check(images, keep, jitter)
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
        w, R = self.weights, self.weights.head_tokens
        saved: list[blocks.Saved | blocks.Input] = []
        normed: list[Tensor | None] = [None] * (2 * _NORMED)
        x, x_low, stats = torch.ops.smi.embed_tokens(
            images, keep, offsets, w.patch_weight, w.position, w.prefix, *w.patch_size, self._dot
        )
        B, N, D = x.shape
        x_low = blocks.low_of(x, x_low).view(B * N, D)
        x = x.view(B * N, D)
        if w.norm_pre is not None:
            x, normed[:_NORMED] = heads.normalise(w.norm_pre, x)
            x_low, stats = x.to(w.low), row_statistics(x)
        places, fed, size = self._places(images, keep, offsets), N, None
        how, N = self._ways(fed, places), self._left(fed)[-1]
        for number, block in enumerate(w.blocks):
            before = blocks.Input(x, stats, size)
            with span(f"block {number} forward"):
                x, x_low, stats, kept = blocks.forward(block, x, x_low, stats, size, how(number))
            size = size if kept.merged_size is None else kept.merged_size
            if trace:
                saved.append(kept if self.memory == "fast" else before)
        query, key = self._ranked_by(kept, w.heads, N)
        if w.pool is not None:
            before = blocks.Input(self._pooled(x, N), self._pooled(stats, N), None)
            x, x_low, stats, kept = blocks.forward(
                w.pool, before.x, before.x.to(w.low), before.stats, None, self._way_of_pool(w.pool, N)
            )
            if trace:
                saved.append(kept if self.memory == "fast" else before)
            query, key = self._ranked_by(kept, w.pool.heads, N - w.pool_skips)
        elif not R:
            if w.norm_last is not None:
                x, normed[_NORMED:] = heads.normalise(w.norm_last, x)
            x = self._pooled(x, N).view(B, N - w.pool_skips, D)
            x = x.mean(1) if size is None else (x * size[:, w.pool_skips :, None]).sum(1) / (fed - w.pool_skips)
            x_low, stats = x.to(w.low), row_statistics(x)
        parts, read = heads.forward(w, x_low.view(B, R or 1, D), stats.view(B, R or 1, *stats.shape[1:]), self._dot)
        return Trace(parts, saved, normed if trace else [], read, places, query, key, fed, size)

    def _pooled(self, rows: Tensor, tokens: int) -> Tensor:
        """Of (B N, ...) rows those of the tokens that are pooled."""
        first = self.weights.pool_skips
        return rows.view(-1, tokens, *rows.shape[1:])[:, first:].reshape(-1, *rows.shape[1:])

    def _ranked_by(self, kept: blocks.Saved, heads_: int, tokens: int) -> tuple[Tensor, Tensor]:
        """`Trace.query` and `Trace.key` of a last block, or of the pooling behind it."""
        d, R = self.weights.width // heads_, self.weights.head_tokens or 1
        if kept.query is not None:
            key = kept.qkv.view(-1, tokens, 2, heads_, d)[:, :, 0]
            return kept.query.view(-1, R, heads_, d)[:, 0], key
        qkv = kept.qkv.view(-1, tokens, 3, heads_, d)
        return qkv[:, 0, 0] if self.weights.has_class_token else qkv[:, :, 0], qkv[:, :, 1]

    def _places(self, images: Tensor, keep: Tensor | None, offsets: Tensor | None) -> Tensor | None:
        w = self.weights
        if w.rotary is None:
            return None
        prefix, cells = w.prefix.shape[0], w.position.shape[0]
        return rotary.tokens(keep, offsets, images.shape[0], prefix, cells, w.grid, w.patch_size, images.device)

    def _ways(self, tokens: int, places: Tensor | None) -> Callable[[int], blocks.How]:
        """How each block runs, by its number, of so many tokens in front of the first."""
        w, left = self.weights, [tokens, *self._left(tokens)]
        turns = rotary.angles(w.rotary, places)

        def how(number: int) -> blocks.How:
            first = w.head_tokens if number == len(w.blocks) - 1 else 0
            fewer = left[number] - left[number + 1]
            return blocks.How(left[number], w.heads, self._dot, turns(number), first, w.prefix.shape[0], fewer)

        return how

    def _way_of_pool(self, pool: Pool, tokens: int) -> blocks.How:
        return blocks.How(tokens - self.weights.pool_skips, pool.heads, self._dot)

    @property
    def ranking(self) -> str:
        if self.weights.pool is not None:
            return "attention_pool"
        return "class_attention" if self.weights.has_class_token else "received_attention"

    def _left(self, tokens: int) -> list[int]:
        """Tokens behind each block, prefix among them, of so many in front of the first."""
        prefix, depth = self.weights.prefix.shape[0], len(self.weights.blocks)
        if self.merge_to is None:
            return [tokens] * depth
        if self.weights.pool is not None or self.weights.rotary is not None:
            raise ValueError(
                "tokens are not merged in front of attention pooling, or where rotary positions turn them."
            )
        return [prefix + left for left in merge_counts(tokens - prefix, depth, self.merge_to)]

    def backward(self, trace: Trace, d_logits: Tensor, dstats: Tensor, scale: Tensor | None = None) -> Tensor:
        """Gradient with respect to the pixels of the fed patches.

        Args:
            trace: of a `run`.
            d_logits: (B, classes) in the low dtype.
            dstats: (R, B, parts, 2), for each of the R classifiers the sums of ``d_logits colsum`` and
                ``d_logits (part - bias)``, as `head_sums` and ``cross_entropy_head`` give.
            scale: (B,) factor of each image's gradient, or None.

        Returns:
            (B, K, C * height * width) in the wide dtype, patches in the order of `keep`.
        """
        w, how, N = self.weights, self._ways(trace.tokens, trace.places), self._left(trace.tokens)[-1]
        B, D, R = d_logits.shape[0], w.width, w.head_tokens
        dx, dx_low = heads.backward(w, trace.read, d_logits, dstats, self._dot)
        dx, dx_low = dx.view(-1, D), dx_low.view(-1, D)
        if not R:
            n = N - w.pool_skips
            if w.pool is not None:
                with span("pooling backward"):
                    dx, _ = blocks.backward(w.pool, trace.saved[-1], dx, dx_low, self._way_of_pool(w.pool, N))
                dx = dx.view(B, n, D)
            else:
                dx = (dx / (trace.tokens - w.pool_skips)).view(B, 1, D)
                dx = dx.expand(-1, n, -1) if trace.size is None else dx * trace.size[:, w.pool_skips :, None]
            dx = torch.cat((dx.new_zeros(B, w.pool_skips, D), dx), 1).view(B * N, D)
            if w.norm_last is not None:
                dx = heads.normalise_dx(w.norm_last, trace.normed[_NORMED:], dx)
            dx_low = dx.to(w.low)
        for number in reversed(range(len(w.blocks))):
            with span(f"block {number} backward"):
                dx, dx_low = blocks.backward(w.blocks[number], trace.saved[number], dx, dx_low, how(number))
        if w.norm_pre is not None:
            dx_low = heads.normalise_dx(w.norm_pre, trace.normed[:_NORMED], dx).to(w.low)
        patches: Tensor = torch.ops.smi.embed_tokens_dx(
            dx_low.view(B, trace.tokens, D), w.patch_weight, w.prefix.shape[0], scale, self._dot
        )
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
        return heads.sums(parts, d_logits, self.weights.classifiers)

    def rank(self, trace: Trace, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What `ranking` says of each fed patch, and the `count` highest-ranked of them, without a gradient.

        Args:
            keep: (B, K) int64, increasing along each row: the patches that were fed.
            count: 1 <= count <= K.

        Returns:
            (B, count) int64, increasing; (B, K) float32.

        Raises:
            ValueError: `count` is outside 1..K, or tokens are merged.
        """
        w, last = self.weights, self.weights.blocks[-1]
        if not 1 <= count <= keep.shape[1]:
            raise ValueError(f"count is {count}; expected 1 to {keep.shape[1]}, the number of patches that were fed.")
        if trace.size is not None:
            raise ValueError("tokens are merged, so patches have no attention of their own to be ranked by.")
        assert trace.query is not None and trace.key is not None
        if self.ranking == "received_attention":
            # PyTorch's products of many images may sum in another order than those of one; compiled operators never do.
            size = 1 if self.batch_invariant or not keep.is_cuda else max(len(keep), 1)
            images = zip(trace.query.split(size), trace.key.split(size), strict=True)
            with outside_autocast(keep.device):
                of_all = torch.cat([received(query, key, last.qk_norm, last.qk_eps) for query, key in images])
            scores = of_all[:, w.prefix.shape[0] :].contiguous()
            return torch.ops.smi.select_tokens(scores, keep, count), scores
        norm, prefix = last.qk_norm, w.prefix.shape[0]
        if w.pool is not None:
            norm, prefix = None, prefix - w.pool_skips
        found: tuple[Tensor, Tensor] = torch.ops.smi.rank_tokens(
            trace.query, trace.key, 1.0, norm, last.qk_eps, keep, count, prefix
        )
        return found

    def check(self, images: Tensor, keep: Tensor | None, jitter: Tensor | None) -> None:
        """Raises ValueError unless shapes, dtypes and devices are those of a call."""
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
