"""Any timm ViT with a ``patch_drop`` slot, fed only some of its patches.

The caller's model is never touched: the adapter works on a frozen twin that shares its weights. In the twin two modules
are replaced: the patch embedding, so that only fed patches are embedded, and ``patch_drop``, so that only their tokens
go on. Everything between and after is timm's own code, which is why every family that has the slot works.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi_kernels
import smi_kernels.backends
from smi.adapters.rollout import attention_rollout
from smi.adapters.timm_merge import Merging, merge_inside, merging_reasons
from smi.adapters.timm_names import known_names
from smi.adapters.timm_slots import AttentionTap, EmbedSlot, GatherSlot, frozen_twin
from smi.config import ModelRanking, Precision
from smi.devices import resolve_device
from smi.errors import SmiError, did_you_mean
from smi.state import ModelInfo
from smi.weights import check_finite, weights_hash

_SEVERAL_BLOCKS = ("class_attention_last_4", "attention_rollout")  # rankings of more than the last block
_DIFFERENTIAL = ("DiffAttention", "DiffParallelScalingBlock")  # by name: older versions of timm have none
# Of the logits from timm's own, relative: an order of magnitude above what rounding to so many bits does.
_DIFFERENCE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 0.1}


class SparseModel:
    """A frozen timm ViT that can be fed any subset of its patches, under any roll and flip of the image.

    Args:
        model: a timm ``VisionTransformer`` or ``Eva`` (or subclass), in any mode and on any device; not modified. Its
            weights are shared wherever device and dtype allow.
        name: for records; default the timm architecture name.
        device: where to run; default where the model is.
        precision: arithmetic of the network, ``fp32`` or ``bf16``, on the fused kernels ``tf32`` or ``fp16`` too. A
            float64 model stays float64 under ``fp32``.
        ranking: what patches are ranked by; ``auto`` takes the class token's attention in the last block, else the
            attention pooling's, else the attention each patch receives in the last block. ``class_attention_last_4``
            averages the class token's over the last four blocks, or all of fewer, and ``attention_rollout`` takes it
            through all blocks; both on timm's modules whatever the backend.
        mean, std: per channel; default the model's own data config.
        class_names: one for each logit, for people; default what the model's own config says, or
            ImageNet's where timm's card says that it was trained on that.
        backend: what `feed` runs on: ``triton`` is fused kernels for GPUs, ``cpu`` compiled operators, ``cuda`` both
            on a GPU, ``reference`` timm's own modules; ``auto`` takes what is made for the device where it can run
            this model.
        merge_to: share of the patches that merging inside the blocks leaves as tokens, see `smi.Config.merge_to`; None
            merges nothing and feeds through timm's own blocks.

    Attributes:
        original: the caller's model.
        info: identity and geometry.
        backend: ``triton``, ``cpu``, ``cuda`` or ``reference``.
        against_kernels: every reason why `backend` is ``reference``.
        operations: backend of single operations where the network runs on timm's modules: ``reference`` if that was
            asked for, else ``auto``.
        vit: the network on fused kernels, or None.
        device, dtype: where it runs, and the dtype of pixels and logits.
        difference: of the logits from timm's own, relative, all patches fed through the sparse path; at most 1e-3
            (0.02 in tf32 and fp16, 0.1 in bf16).
        has_head: False if the logits are features, because the model was made with ``num_classes=0``.

    Raises:
        SmiError: not a supported model (with the reason), weights not finite, ranking not to be had, device missing,
            backend or precision not to be had (with every reason), or the output differs from timm's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        ranking: ModelRanking = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
        backend: str = "auto",
        merge_to: float | None = None,
    ) -> None:
        reasons = unsupported_reasons(model)
        if reasons:
            raise SmiError(f"{type(model).__name__} is not supported: {'; '.join(reasons)}.")
        if merge_to is not None and (reasons := merging_reasons(model)):
            raise SmiError(
                f"tokens cannot be merged inside {type(model).__name__}: {'; '.join(reasons)}. Use another strategy "
                f"than fusion."
            )
        self.original = model
        self.has_head = bool(model.num_classes)
        self.precision = precision
        first = next(model.parameters())
        self.device = resolve_device(device) if device is not None else first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        network_dtype = torch.bfloat16 if precision == "bf16" else self.dtype
        check_finite(model)

        twin = frozen_twin(model).to(device=self.device, dtype=network_dtype).eval()
        embed = twin.patch_embed
        channels, prefix = embed.proj.in_channels, twin.num_prefix_tokens
        height, width = embed.img_size
        probe = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=self.dtype)
        probe = probe.to(self.device)
        with torch.no_grad():
            expected = twin(probe.to(network_dtype)).to(self.dtype)

        self._tap = tap = AttentionTap()
        # Earlier blocks rank nothing. A hook that held this object, and not the tap, would keep both alive.
        twin.blocks[-1].register_forward_pre_hook(lambda _module, _args: None if tap.everything else tap.calls.clear())
        twin.patch_embed = EmbedSlot(embed, embed.grid_size)
        twin.patch_drop = GatherSlot(prefix, with_indices=isinstance(twin, Eva))
        ranking_blocks = twin.blocks if ranking in _SEVERAL_BLOCKS else twin.blocks[-1]
        for module in (ranking_blocks, twin.attn_pool):
            for part in module.modules() if module is not None else ():
                if hasattr(part, "fused_attn"):
                    part.fused_attn = True  # the tap sees fused calls; the result is the same
        self._twin = twin
        self.merge_to = merge_to
        self._features: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}

        data = resolve_model_data_config(model)
        card = getattr(model, "pretrained_cfg", None) or {}
        labels = tuple(class_names) or known_names(model)
        self._ranking = self._resolve_ranking(ranking)
        self.info = ModelInfo(
            name=name or card.get("architecture") or type(model).__name__,
            weights_sha256=weights_hash(model),
            input_size=(channels, height, width),
            mean=_per_channel("mean", for_channels(data["mean"], channels) if mean is None else mean, channels),
            std=_per_channel("std", for_channels(data["std"], channels) if std is None else std, channels),
            patch_size=(embed.patch_size[0], embed.patch_size[1]),
            grid=(embed.grid_size[0], embed.grid_size[1]),
            num_prefix_tokens=prefix,
            num_classes=expected.shape[-1],
            ranking=self._ranking,
            class_names=labels if len(labels) == expected.shape[-1] else (),
        )
        self._asked_ranking, self._asked_backend = ranking, backend
        self.against_kernels, self.backend = self._choose_backend(backend)
        self.operations = "reference" if backend == "reference" else "auto"
        if self.against_kernels and precision in ("tf32", "fp16"):
            raise SmiError(
                f"precision {precision!r} runs on the fused kernels alone, and {self.info.name} does not run on those: "
                f"{'; '.join(self.against_kernels)}. Use fp32 or bf16."
            )
        self.vit: smi_kernels.SparseViT | None = None
        if not self.against_kernels:
            self.vit = smi_kernels.SparseViT.from_timm(model, precision, device=self.device)
        self._merging: Merging | None = None
        self.difference = self._check_dense(probe, expected)
        if merge_to is not None:
            self._merging = merge_inside(twin, merge_to)
            if self.vit is not None:
                self.vit.merge_to = merge_to

    def merging(self, merge_to: float | None) -> SparseModel:
        """This network with another `merge_to`, or itself if that is its own.

        Raises:
            SmiError: tokens cannot be merged inside this architecture.
        """
        if merge_to == self.merge_to:
            return self
        return SparseModel(
            self.original,
            name=self.info.name,
            device=self.device,
            precision=self.precision,
            ranking=self._asked_ranking,
            mean=self.info.mean,
            std=self.info.std,
            class_names=self.info.class_names,
            backend=self._asked_backend,
            merge_to=merge_to,
        )

    @property
    def merging_to(self) -> float | None:
        """`merge_to` as it is now: 1 within `unmerged`."""
        return None if self._merging is None else self._merging.merge_to

    @contextlib.contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside, no tokens are merged: this is the network itself that speaks."""
        merging = self._merging is not None
        networks: list[Any] = [one for one in (self._merging, self.vit) if merging and one is not None]
        for network in networks:
            network.merge_to = 1.0
        try:
            yield
        finally:
            for network in networks:
                network.merge_to = self.merge_to

    def __call__(
        self, images: Tensor, cells: Tensor | None = None, offsets: Tensor | None = None, scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and on request the ranking score of each fed patch.

        Args:
            images: (B, C, H, W) float32 (float64 for a float64 model), normalised; differentiable.
            cells: (B, K) int64 grid cells of the augmented images that are fed, any order; None feeds all.
            offsets: (B, 3) or (1, 3) int64 rows of (dy, dx, flip); None is no augmentation.
            scores: whether to compute scores.

        Returns:
            logits (B, classes), and (B, K) scores in the order of `cells`, or None; both in the dtype of `images`.

        Raises:
            SmiError: images of another size than the model's, scores while tokens are merged, or `restore` was called.
        """
        if self._twin is None:
            raise SmiError("this SparseModel was restored; make a new one of the model.")
        if scores and self._merging is not None:
            raise SmiError("scores of patches are not to be had while tokens are merged; make one without merge_to.")
        if images.shape[1:] != self.info.input_size:
            C, H, W = self.info.input_size
            raise SmiError(
                f"images have shape {tuple(images.shape)}; expected (B, {C}, {H}, {W}) for {self.info.name}. "
                f"Resize them or load the model with another img_size."
            )
        self._twin.patch_embed.cells, self._twin.patch_embed.offsets = cells, offsets
        self._twin.patch_drop.cells = cells
        self._features.clear()
        if not scores:
            return self._twin(images).to(images.dtype), None
        self._tap.everything = self._ranking in _SEVERAL_BLOCKS
        self._tap.calls.clear()
        try:
            with self._tap:
                logits = self._twin(images)
            found = self._score(self._tap.calls)
        finally:
            self._tap.everything = False
            self._tap.calls.clear()
        return logits.to(images.dtype), found.to(images.dtype)

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self._twin.blocks)

    def attention_maps(self, images: Tensor, cells: Tensor | None = None) -> tuple[Tensor, ...]:
        """The attention of every block, on timm's modules: (B, heads, tokens, tokens) each, differentiable.

        Args:
            images, cells: as for a call; tokens are prefix tokens and cells, in that order.

        Raises:
            SmiError: a block that makes no fused attention call, or several; tokens are merged.
        """
        if self._merging is not None:
            raise SmiError("attention maps are not to be had while tokens are merged; make one without merge_to.")
        for block in self._twin.blocks:
            for part in block.modules():
                if hasattr(part, "fused_attn"):
                    part.fused_attn = True
        self._tap.everything = True
        self._tap.calls.clear()
        try:
            with self._tap:
                self(images, cells)
            calls = self._of_all_blocks(self._tap.calls)
            return tuple((query @ key.mT * scale).softmax(-1).to(images.dtype) for query, key, scale in calls)
        finally:
            self._tap.everything = False
            self._tap.calls.clear()

    def _of_all_blocks(self, calls: list[tuple[Tensor, Tensor, float]]) -> list[tuple[Tensor, Tensor, float]]:
        if len(calls) != self.depth + (self._twin.attn_pool is not None):
            name = type(self.original).__name__
            raise SmiError(f"{name} has no single attention in each block, so it has no maps to give.")
        return calls[: self.depth]

    @property
    def where(self) -> str:
        """Device and, unless it is the reference, backend, for people."""
        compiled = ", compiled operators"
        kinds = {"reference": "", "cpu": compiled, "cuda": f"{compiled} and triton kernels"}
        kind = kinds.get(self.backend, f", {self.backend} kernels")
        return f"{self.device}{kind}"

    def feed(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        offsets: Tensor | None = None,
        scores: bool = False,
        watched: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """As a call, for patches of the un-augmented image, on `backend`.

        Args:
            keep: (B, K) int64 patches that are fed, wherever the augmentation moves them; None feeds all.
            watched: whether `features` are wanted, if any are watched: only the model's own modules have them.
        """
        watched = watched and bool(self._hooks)
        ranks = self.vit is not None and self._ranking == self.vit.ranking and self._merging is None
        if self.vit is not None and not watched and (not scores or ranks):
            with smi_kernels.use_backend(self.backend):
                found = self.vit(images, keep, offsets, class_attention=scores)
            return found if scores else (found, None)
        if keep is not None and offsets is not None:
            keep = smi_kernels.map_cells(keep, offsets, self.info.grid, self.info.patch_size)
        return self(images, keep, offsets, scores)

    def watch(self, names: Sequence[str]) -> None:
        """Make the outputs of these submodules (``blocks.3``, ``norm``, ...) available as `features` after each call.

        Raises:
            SmiError: no such submodule, or a precision that the model's own modules do not run in.
        """
        if names and self.precision in ("tf32", "fp16"):
            raise SmiError(
                f"features are outputs of the model's own modules, which do not run in {self.precision}; use fp32 or "
                f"bf16, or objectives without features."
            )
        modules, features = dict(self._twin.named_modules()), self._features
        for name in names:
            if name not in modules:
                raise SmiError(f"the model has no submodule {name!r} to take features from; e.g. 'blocks.0' exists.")
            if name not in self._hooks:
                self._hooks[name] = modules[name].register_forward_hook(
                    lambda _module, _args, output, name=name: features.__setitem__(name, output)
                )

    @property
    def features(self) -> dict[str, Tensor]:
        """Outputs of the watched submodules in the last call, differentiable; tokens are prefix, then fed patches."""
        return dict(self._features)

    def weights(self) -> Iterator[Tensor]:
        """Parameters and buffers as they run here, in this device and precision."""
        yield from self._twin.parameters()
        yield from self._twin.buffers()

    def restore(self) -> nn.Module:
        """Drop the twin and give back the caller's model, which is and was as it came."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._features.clear()
        self._twin = self.vit = None
        return self.original

    def _choose_backend(self, wanted: str) -> tuple[list[str], str]:
        """Every reason why `feed` does not run on fused kernels, and what it runs on.

        Raises `SmiError` if kernels were asked for that cannot run.
        """
        if wanted not in ("auto", *smi_kernels.backends.BACKENDS):
            expected = ", ".join(("auto", *smi_kernels.backends.BACKENDS))
            raise SmiError(
                f"backend is {wanted!r}; expected one of {expected}.{did_you_mean(wanted, expected.split(', '))}"
            )
        if wanted == "reference":
            return ["the reference was asked for"], "reference"
        name = smi_kernels.backends.preferred(self.device) if wanted == "auto" else wanted
        reasons = [
            *smi_kernels.backends.reasons_against(name, self.device),
            *smi_kernels.unsupported_reasons(self.original),
        ]
        if name == "cpu" and self.precision != "fp32":
            reasons.append(f"the compiled operators compute in float32 and float64, not in {self.precision}")
        theirs = self._resolve_ranking("auto")
        if self._ranking not in (theirs, *_SEVERAL_BLOCKS):
            reasons.append(f"they rank this model by {theirs}, not by {self._ranking}")
        if reasons and wanted != "auto":
            raise SmiError(
                f"backend {wanted!r} cannot run {self.info.name}: {'; '.join(reasons)}. Use reference or auto."
            )
        return reasons, "reference" if reasons else name

    def _resolve_ranking(self, wanted: ModelRanking) -> str:
        has = {
            "class_attention": self._twin.cls_token is not None,
            "attention_pool": isinstance(self._twin.attn_pool, AttentionPoolLatent),
            "received_attention": True,
            **dict.fromkeys(_SEVERAL_BLOCKS, self._twin.cls_token is not None),
        }
        if wanted == "auto":
            pools = self._twin.global_pool == "map"
            order = ("attention_pool", "class_attention") if pools else ("class_attention", "attention_pool")
            return next((name for name in order if has[name]), "received_attention")
        if not has[wanted]:
            raise SmiError(
                f"ranking {wanted!r} needs {'attention pooling' if wanted == 'attention_pool' else 'a class token'}, "
                f"which this model has not; use {', '.join(repr(name) for name in has if has[name])} or 'auto'."
            )
        return wanted

    def _score(self, calls: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        """Scores of the fed patches from the attention calls since the last block began; a pooling's is the last.

        A block of several parallel attentions makes as many calls; their heads count alike.
        """
        pooled, prefix = self._twin.attn_pool is not None, self._twin.num_prefix_tokens
        if self._ranking == "attention_rollout":
            return attention_rollout(self._of_all_blocks(calls))[:, prefix:]
        if self._ranking == "class_attention_last_4":
            last = self._of_all_blocks(calls)[-4:]
            rows = [smi_kernels.attention_row(query[:, :, 0], key, scale) for query, key, scale in last]
            return torch.stack(rows).mean(0)[:, prefix:]
        if len(calls) < 1 + pooled:
            raise SmiError(f"ranking {self._ranking!r} is not to be had: the last block makes no fused attention call.")
        if self._ranking == "attention_pool":
            query, key, scale = calls[-1]
            row = smi_kernels.attention_row(query[:, :, 0], key, scale)
            pools_prefix = getattr(self._twin, "pool_include_prefix", True)  # Eva has no such switch and always does
            return row[:, prefix if pools_prefix else 0 :]
        rows = [
            smi_kernels.attention_row(query[:, :, 0], key, scale)
            if self._ranking == "class_attention"
            else smi_kernels.received_attention(query, key, scale)
            for query, key, scale in (calls[:-1] if pooled else calls)
        ]
        return torch.stack(rows).mean(0)[:, prefix:]

    def _check_dense(self, probe: Tensor, expected: Tensor) -> float:
        """Fed every patch in reverse, the backend must give what timm gave; fed half of them, a score for each.

        Returns the relative difference of the logits.
        """
        cells = torch.arange(self.info.num_patches, device=self.device).flip(0)[None]
        half = cells[:, : (self.info.num_patches + 1) // 2]
        with torch.no_grad():
            logits, _ = self.feed(probe, cells)
            _, scores = self.feed(probe, half, scores=True)
        error = ((logits - expected).norm() / expected.norm().clamp_min(1e-12)).item()
        limit = _DIFFERENCE[self.precision]
        if not error <= limit:
            raise SmiError(
                f"{self.info.name} is not supported: fed all its patches, the sparse path differs from timm's own "
                f"forward by {error:.1e} (relative; at most {limit:g} is expected)."
            )
        assert scores is not None
        if scores.shape != half.shape:
            raise SmiError(
                f"{self.info.name} is not supported: fed {half.shape[1]} of its {cells.shape[1]} patches, its "
                f"{self._ranking} gives {scores.shape[1]} scores."
            )
        return float(error)


def unsupported_reasons(model: object) -> list[str]:
    """Every reason why `model` cannot be made sparse; empty if it can."""
    if not isinstance(model, nn.Module):
        return [f"expected a torch.nn.Module, got {type(model).__name__}"]
    if not isinstance(model, (VisionTransformer, Eva)):
        return [
            "expected a timm VisionTransformer or Eva (ViT, DeiT, DeiT-III, DINO, CLIP, SigLIP, EVA-02, ...), whose "
            "patches can be left out one by one; windowed, convolutional and hierarchical models need the whole grid"
        ]
    reasons = []
    embed = model.patch_embed
    if not isinstance(embed, PatchEmbed):
        return [f"its {type(embed).__name__} is not timm's PatchEmbed, so patches cannot be embedded apart"]
    if tuple(embed.proj.kernel_size) != tuple(embed.patch_size) or tuple(embed.proj.stride) != tuple(embed.patch_size):
        reasons.append("its patches overlap, so patches cannot be embedded apart")
    if embed.img_size is None:
        reasons.append("it has no fixed input size; create it with img_size=")
    elif any(size % patch for size, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        height, width = embed.img_size
        reasons.append(
            f"its input of {height} x {width} pixels is not a multiple of its patch of "
            f"{embed.patch_size[0]} x {embed.patch_size[1]}; choose an img_size that is"
        )
    if not len(model.blocks):
        reasons.append("it has no blocks")
    elif any(type(part).__name__ in _DIFFERENTIAL for part in model.blocks[-1].modules()):
        reasons.append("its attention is the difference of two, which ranks no patches")
    return reasons


def for_channels(values: Sequence[float], channels: int) -> Sequence[float]:
    """Mean or std of a data config, one value for each channel or one for all.

    timm's data config of a model made with other than three channels still has three values.
    """
    return values if len(values) == channels else (sum(values) / len(values),)


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        values = tuple(values) * channels
    if len(values) != channels:
        raise SmiError(f"{name} has {len(values)} values; expected one for each of the {channels} channels.")
    if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
        raise SmiError(f"{name} is {tuple(values)}; expected {'finite' if name == 'mean' else 'positive'} numbers.")
    return tuple(float(value) for value in values)
