"""A timm Vision Transformer's weights in the form the kernels want: as few and as large linear maps as there can be.

Folded exactly, in float64: a LayerNorm's weight and bias into the linear layer behind it, the softmax scale into the
query's weights (or the query norm's), LayerScale into the layer before it, the patch embedding's bias and the class
tokens into the position embedding, the mean of distilled heads into the heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from smi_kernels.dtypes import wide

SWIGLU = "swiglu"


class Linear(NamedTuple):
    """``weight`` (OUT, IN) in the low dtype; ``colsum`` = weight.sum(1) and ``bias``, (OUT,) in the wide one."""

    weight: Tensor
    colsum: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Folded:
    """One block.

    Attributes:
        qkv: (3 D, D), with the first norm and the softmax scale.
        proj, fc1, fc2: attention's output, with the first LayerScale; hidden layer, with the second norm; output, with
            the second LayerScale.
        qk_norm: (4, d) weight and bias of the query norm (with the softmax scale) and of the key norm, or None.
        activation: a GELU (`smi_kernels.linear.reference.GELUS`), or `SWIGLU`, whose gates and values fc1 makes.
        eps, qk_eps: of the two norms, and of query and key norm.
    """

    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    activation: str
    qk_norm: Tensor | None
    eps: tuple[float, float]
    qk_eps: float

    def of_query(self) -> Linear:
        D = self.qkv.weight.shape[0] // 3
        return Linear(*(part[:D] for part in self.qkv))

    def of_key_and_value(self) -> Linear:
        D = self.qkv.weight.shape[0] // 3
        return Linear(*(part[D:] for part in self.qkv))


class Norm(NamedTuple):
    """A LayerNorm of all tokens that cannot be folded: ``weight`` and ``bias`` (D,) or None, and ``eps``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Pool:
    """A head that pools by the attention of one learned query, which no image changes.

    Attributes:
        block: its layers, with ``qkv`` the (2 D, D) keys and values alone, and the norm of the tokens in them.
        query: (D,) in the low dtype, projected and scaled.
        heads: H of this attention.
    """

    block: Folded
    query: Tensor
    heads: int


@dataclass(frozen=True)
class VitWeights:
    """A whole network.

    Attributes:
        patch_weight: (D, C * height * width) in the low dtype.
        position: (cells, D) position embedding of each cell plus the patch embedding's bias.
        prefix: (P, D) class, distillation and register tokens with their positions.
        blocks: in order.
        heads_of_tokens: what the head makes of each head-read token, or of what was pooled; with its norm.
        head_tokens: R, how many first tokens the head reads; 0 if it reads what was pooled.
        head_eps: of the head's norm; None if it has none.
        norm_pre, norm_last: of all tokens before the first block, and before the mean of them; or None.
        pool: attention pooling; None if the head reads tokens or the mean of them.
        pool_skips: first tokens that are not pooled.
        texts: embeddings of the classes, if the logits are their cosines with the head's output; else None. Their
            ``colsum`` is 0: a norm whose mean counts as 0 makes vectors of length sqrt(E).
        rotary: (blocks or 1, P + cells, H or 1, 2, d) sines and cosines that turn queries and keys of each token, in
            which prefix tokens stay as they are; or None.
        patch_size, grid: (height, width), in pixels and in patches.
        heads, width: H and D.
        low, wide: dtypes of matrix operands, and of sums, residual stream, images and logits.
    """

    patch_weight: Tensor
    position: Tensor
    prefix: Tensor
    blocks: tuple[Folded, ...]
    heads_of_tokens: tuple[Linear, ...]
    head_tokens: int
    head_eps: float | None
    norm_pre: Norm | None
    norm_last: Norm | None
    pool: Pool | None
    pool_skips: int
    texts: Linear | None
    rotary: Tensor | None
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    heads: int
    width: int
    has_class_token: bool
    low: torch.dtype
    wide: torch.dtype

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def classifiers(self) -> tuple[Linear, ...]:
        """The layers whose outputs add up to the logits."""
        return self.heads_of_tokens if self.texts is None else (self.texts,)

    @property
    def num_classes(self) -> int:
        return self.classifiers[0].weight.shape[0]

    def apply(self, function: Callable[[Tensor], Tensor]) -> VitWeights:
        """The same with `function` of every tensor."""
        return cast(VitWeights, _apply(self, function))


def _apply(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (Linear, Norm)):
        return type(value)(*(_apply(part, function) for part in value))
    if isinstance(value, tuple):
        return tuple(_apply(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _apply(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def fold(model: Any, low: torch.dtype, device: torch.device, tf32: bool = False) -> VitWeights:
    """The folded weights of a model without `unsupported_reasons`, on `device`.

    With `tf32` they are rounded to that format's 10 bits of mantissa, because matrix units would cut the rest off.
    """
    folder = _Folder(low, device, tf32)
    patch_weight, position, prefix = _embedding_weights(folder, model)
    rotary = _rotary(model, len(prefix))
    return VitWeights(
        patch_weight=patch_weight,
        position=position,
        prefix=prefix,
        blocks=tuple(folder.block(block) for block in model.blocks),
        norm_pre=folder.norm(model.norm_pre),
        **_head_weights(folder, model, len(prefix)),
        rotary=None if rotary is None else rotary.to(device, folder.wide).contiguous(),
        patch_size=tuple(model.patch_embed.patch_size),
        grid=tuple(model.patch_embed.grid_size),
        channels=model.patch_embed.proj.in_channels,
        heads=model.blocks[0].attn.num_heads,
        width=len(patch_weight),
        has_class_token=model.cls_token is not None,
        low=low,
        wide=folder.wide,
    )


class _Folder:
    """Layers of timm's as those of `VitWeights`: merged in float64, rounded once."""

    def __init__(self, low: torch.dtype, device: torch.device, tf32: bool) -> None:
        self.low, self.wide, self.device, self.tf32 = low, wide(low), device, tf32

    def exact(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, torch.float64)

    def to_low(self, weight: Tensor) -> Tensor:
        rounded = weight.to(self.low)
        if self.tf32:
            rounded = ((rounded.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return rounded.contiguous()

    def linear(self, layer: nn.Linear, before: nn.Module | None = None, after: Tensor | None = None) -> Linear:
        return self.merged(layer.weight, layer.bias, before, after)

    def merged(self, weight: Tensor, bias: Tensor | None, before: nn.Module | None, after: Tensor | None) -> Linear:
        """`before` is the norm in front of the layer, `after` a factor for each of its outputs."""
        weight = self.exact(weight)
        bias = self.exact(bias) if bias is not None else weight.new_zeros(len(weight))
        if isinstance(before, nn.LayerNorm):
            if before.bias is not None:
                bias = bias + weight @ self.exact(before.bias)
            if before.weight is not None:
                weight = weight * self.exact(before.weight)
        if after is not None:
            weight, bias = weight * after[:, None], bias * after
        rounded = self.to_low(weight)
        # Of the rounded weights: the kernels subtract mean times colsum from a product with those.
        return Linear(rounded, rounded.double().sum(1).to(self.wide), bias.to(self.wide))

    def norm(self, layer: nn.Module) -> Norm | None:
        if not isinstance(layer, nn.LayerNorm):
            return None
        weight, bias = (None if t is None else self.exact(t).to(self.wide) for t in (layer.weight, layer.bias))
        return Norm(weight, bias, layer.eps)

    def block(self, timm: Any) -> Folded:
        attn, (weight, bias) = timm.attn, _qkv(timm.attn)
        scale = torch.ones(len(weight), dtype=torch.float64, device=self.device)
        qk_norm = self.qk_norm(attn)
        if qk_norm is None:
            scale[: len(weight) // 3] = attn.scale
        gammas = [None if gamma is None else self.exact(gamma) for gamma in _layer_scales(timm)]
        return Folded(
            qkv=self.merged(weight, bias, timm.norm1, scale),
            proj=self.linear(attn.proj, after=gammas[0]),
            fc1=self.linear(timm.mlp.fc1, timm.norm2),
            fc2=self.linear(timm.mlp.fc2, after=gammas[1]),
            activation=str(_activation(timm.mlp)),
            qk_norm=qk_norm,
            eps=(timm.norm1.eps, timm.norm2.eps),
            qk_eps=getattr(attn.q_norm, "eps", 0.0),
        )

    def qk_norm(self, attn: Any) -> Tensor | None:
        if not isinstance(attn.q_norm, nn.LayerNorm):
            return None
        rows = []
        for norm, factor in ((attn.q_norm, attn.scale), (attn.k_norm, 1.0)):
            ones = torch.ones(attn.head_dim, dtype=torch.float64, device=self.device)
            rows.append((self.exact(norm.weight) if norm.weight is not None else ones) * factor)
            rows.append((self.exact(norm.bias) if norm.bias is not None else 0 * ones) * factor)
        return torch.stack(rows).to(self.wide)

    def pool(self, timm: Any, norm: Any) -> Pool:
        """`norm` is that of the tokens which are pooled."""
        query = self.exact(timm.latent)[0, 0]
        if isinstance(timm.q, nn.Linear):
            query = self.exact(timm.q.weight) @ query + (self.exact(timm.q.bias) if timm.q.bias is not None else 0)
        layers = Folded(
            qkv=self.linear(timm.kv, norm),
            proj=self.linear(timm.proj),
            fc1=self.linear(timm.mlp.fc1, timm.norm),
            fc2=self.linear(timm.mlp.fc2),
            activation=str(_activation(timm.mlp)),
            qk_norm=None,
            eps=(norm.eps, timm.norm.eps),
            qk_eps=0.0,
        )
        return Pool(layers, (query * timm.head_dim**-0.5).to(self.low), timm.num_heads)


def _embedding_weights(folder: _Folder, model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`patch_weight`, `position` and `prefix` of `VitWeights`."""
    embed = model.patch_embed
    tokens = [t for name in ("cls_token", "dist_token", "reg_token") if (t := getattr(model, name, None)) is not None]
    patch_weight = folder.exact(embed.proj.weight).flatten(1)
    prefix = patch_weight.new_empty(0, len(patch_weight))
    if tokens:
        prefix = folder.exact(torch.cat([t.detach()[0] for t in tokens]))
    position = patch_weight.new_zeros(embed.num_patches, len(patch_weight))
    if model.pos_embed is not None:
        embedded = folder.exact(model.pos_embed)[0]
        if tokens and not model.no_embed_class:
            prefix = prefix + embedded[: len(prefix)]
        position = embedded[-embed.num_patches :]
    if embed.proj.bias is not None:
        position = position + folder.exact(embed.proj.bias)
    return folder.to_low(patch_weight), position.to(folder.wide).contiguous(), prefix.to(folder.wide).contiguous()


def _head_weights(folder: _Folder, model: Any, prefix: int) -> dict[str, Any]:
    """What `VitWeights` says of the head, and of what it reads, behind so many prefix tokens."""
    means, attends = model.global_pool == "avg", getattr(model, "attn_pool", None) is not None
    norm = model.fc_norm if isinstance(model.fc_norm, nn.LayerNorm) else model.norm
    apart = attends or (means and norm is model.norm)  # the norm is of the tokens, before they are pooled
    main, texts = model.head, None
    if isinstance(main, nn.Sequential):
        main, cosine = cast(Any, main)
        weight, bias = folder.exact(cosine.weight) / cosine.weight.shape[1] ** 0.5, folder.exact(cosine.bias)
        bias = bias.to(folder.wide)
        texts = Linear(folder.to_low(weight), torch.zeros_like(bias), bias)
    layers = [main] + ([model.head_dist] if getattr(model, "head_dist", None) is not None else [])
    heads = []
    for layer in layers:
        same = isinstance(layer, nn.Identity)  # what it reads is what it gives
        rows = torch.eye(norm.normalized_shape[0]) if same else layer.weight
        share = torch.full((len(rows),), 1 / len(layers), dtype=torch.float64, device=folder.device)
        heads.append(folder.merged(rows, None if same else layer.bias, None if apart else norm, share))
    return {
        "heads_of_tokens": tuple(heads),
        "head_tokens": 0 if means or attends else len(layers),
        "head_eps": None if apart else norm.eps,
        "norm_last": folder.norm(model.norm) if apart and means else None,
        "pool": folder.pool(model.attn_pool, model.norm) if attends else None,
        "pool_skips": 0 if getattr(model, "pool_include_prefix", attends) else prefix,
        "texts": texts,
    }


def _qkv(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of query, key and value as one layer whose heads, if turned, have the pairs (j, j + d / 2)."""
    weight, bias = attn.qkv.weight.detach(), attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([t.detach().double() for t in (attn.q_bias, attn.k_bias, attn.v_bias)])
    if hasattr(attn, "rotate_half") and not attn.rotate_half:
        return _reordered(weight, attn), None if bias is None else _reordered(bias.detach(), attn)
    return weight, bias


def _reordered(rows: Tensor, attn: Any) -> Tensor:
    heads = rows.view(3, attn.num_heads, attn.head_dim, -1).clone()
    heads[:2] = heads[:2, :, _halves(attn.head_dim).to(rows.device)]
    return heads.view(rows.shape)


def _halves(d: int) -> Tensor:
    """Even places, then odd ones."""
    return torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))


def _rotary(model: Any, prefix: int) -> Tensor | None:
    """`VitWeights.rotary` in float64, out of timm's (cells, 2 d) or, if blocks and heads differ, (L, H, cells, 2 d)."""
    rope, grid = getattr(model, "rope", None), model.patch_embed.grid_size
    if rope is None:
        return None
    fixed = not model.dynamic_img_size and hasattr(rope, "feat_shape")
    timms = (rope.get_embed() if fixed else rope.get_embed(shape=grid)).detach().double()
    if timms.ndim == 2:
        timms = timms[None, None]
    table = torch.stack(timms.chunk(2, dim=-1), dim=3).transpose(1, 2)
    if not getattr(model.blocks[0].attn, "rotate_half", False):
        table = table[..., _halves(table.shape[-1]).to(table.device)]
    still = torch.zeros_like(table[:, :1]).expand(-1, prefix, -1, -1, -1).clone()
    still[..., 1, :] = 1
    return torch.cat((still, table), dim=1)


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if hasattr(block, "ls1"):
        return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
    return block.gamma_1, block.gamma_2


def unsupported_reasons(model: object) -> list[str]:
    """Every reason why the kernels cannot run `model`; empty if they can.

    Classes are compared exactly, since a subclass may compute anything.
    """
    if not isinstance(model, nn.Module):
        return [f"expected a torch.nn.Module, got {type(model).__name__}"]
    if type(model).__name__ not in ("VisionTransformer", "VisionTransformerDistilled", "Eva"):
        return ["expected timm's VisionTransformer, VisionTransformerDistilled or Eva (ViT, DeiT, DINO, CLIP, ...)"]
    vit: Any = model
    reasons = [*_embedding(vit), *_head(vit)]
    for number, block in enumerate(vit.blocks):
        for reason in _block(block):
            if not any(known.startswith(reason) for known in reasons):
                reasons.append(f"{reason} (block {number})")
    if not len(vit.blocks):
        reasons.append("it has no blocks")
    return reasons


def _embedding(vit: Any) -> list[str]:
    embed, reasons = vit.patch_embed, []
    if type(embed).__name__ != "PatchEmbed":
        return [f"its {type(embed).__name__} is not timm's PatchEmbed"]
    if tuple(embed.proj.kernel_size) != tuple(embed.patch_size) or tuple(embed.proj.stride) != tuple(embed.patch_size):
        reasons.append("its patches overlap")
    if embed.img_size is None:
        reasons.append("it has no fixed input size; create it with img_size=")
    elif any(size % patch for size, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        reasons.append(f"its input {embed.img_size} is not a multiple of its patch {embed.patch_size}")
    if not isinstance(embed.norm, nn.Identity):
        reasons.append("its patch embedding has a norm")
    if not isinstance(vit.norm_pre, (nn.Identity, nn.LayerNorm)):
        reasons.append(f"it normalises by {type(vit.norm_pre).__name__} before the first block, not LayerNorm")
    return reasons


def _head(vit: Any) -> list[str]:
    reasons, pool = [], getattr(vit, "attn_pool", None)
    if pool is None and vit.global_pool not in ("token", "avg"):
        reasons.append(f"its head pools by {vit.global_pool!r}, expected 'token', 'avg' or 'map'")
    norms = [n for n in (vit.norm, vit.fc_norm) if not isinstance(n, nn.Identity)]
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm):
        reasons.append(f"expected one LayerNorm before its head, found {[type(n).__name__ for n in norms]}")
    elif pool is not None:
        reasons += _pool(pool, norms[0] is vit.norm)
    for layer in (vit.head, getattr(vit, "head_dist", None)):
        if isinstance(layer, nn.Sequential) and len(layer) == 2 and type(layer[1]).__name__ == "CosineClassifier":
            layer = layer[0]
        if layer is not None and not isinstance(layer, nn.Identity):
            reasons += _linear(layer, "its head")
    return reasons


def _pool(pool: Any, norm_first: bool) -> list[str]:
    name, reasons = type(pool).__name__, []
    if name != "AttentionPoolLatent":
        return [f"its head pools by {name}, not by timm's AttentionPoolLatent"]
    if not norm_first or not isinstance(pool.norm, nn.LayerNorm):
        reasons.append("its attention pooling lacks a LayerNorm before keys and values, or before its MLP")
    if not isinstance(pool.q_norm, nn.Identity):
        reasons.append("its attention pooling normalises query and key")
    if pool.pos_embed is not None or pool.latent_len != 1:
        reasons.append("its attention pooling has positions or several queries")
    if pool.head_dim > 128:
        reasons.append(f"the heads of its attention pooling are {pool.head_dim} wide; the kernels go to 128")
    if pool.mlp is None or pool.kv.in_features != pool.out_features:
        reasons.append("its attention pooling has no MLP, or another width")
    else:
        projections = [layer for layer in (pool.q, pool.kv, pool.proj) if not isinstance(layer, nn.Identity)]
        found = [reason for layer in projections for reason in _linear(layer, "a projection")]
        reasons += [f"in its attention pooling {reason}" for reason in [*found, *_mlp(pool.mlp)]]
    return reasons


def _block(block: Any) -> list[str]:
    if type(block).__name__ not in ("Block", "EvaBlock"):
        return [f"its blocks are {type(block).__name__}, not timm's Block or EvaBlock"]
    reasons, attn = [], block.attn
    for norm in (block.norm1, block.norm2):
        if not isinstance(norm, nn.LayerNorm):
            reasons.append(f"it normalises by {type(norm).__name__}, not LayerNorm")
    if type(attn).__name__ not in ("Attention", "EvaAttention", "AttentionRope"):
        reasons.append(f"its attention is {type(attn).__name__}, not timm's Attention")
    else:
        if getattr(attn, "qkv", None) is None or attn.qkv.out_features != 3 * attn.qkv.in_features:
            reasons.append("query, key and value are not one square projection")
        else:
            reasons += _linear(attn.qkv, "its query, key and value projection")
        reasons += _linear(attn.proj, "its attention's output projection")
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            reasons.append("its attention output has a norm")
        if getattr(attn, "gate", None) is not None:
            reasons.append("its attention is gated")
        for norm in (attn.q_norm, attn.k_norm):
            if hasattr(attn, "rotate_half") and not isinstance(norm, nn.Identity):
                reasons.append("it normalises queries and keys before it turns them")
            elif not isinstance(norm, (nn.Identity, nn.LayerNorm)):
                reasons.append(f"query and key are normalised by {type(norm).__name__}, not LayerNorm")
        if attn.head_dim > 128:
            reasons.append(f"its heads are {attn.head_dim} wide; the kernels go to 128")
    return reasons + _mlp(block.mlp)


def _mlp(mlp: Any) -> list[str]:
    if type(mlp).__name__ not in ("Mlp", "GluMlp"):
        return [f"its MLP is {type(mlp).__name__}, not timm's Mlp or GluMlp"]
    reasons = []
    if _activation(mlp) is None:
        expected = "SiLU of the first half" if type(mlp).__name__ == "GluMlp" else "GELU, its tanh or its quick form"
        reasons.append(f"its activation is {mlp.act}, not {expected}")
    if not isinstance(mlp.norm, nn.Identity):
        reasons.append("its MLP has a norm inside")
    if isinstance(mlp.fc1, nn.Conv2d):
        return [*reasons, "its MLP is convolutional"]
    return [*reasons, *_linear(mlp.fc1, "its MLP's first layer"), *_linear(mlp.fc2, "its MLP's second layer")]


def _linear(layer: nn.Module, what: str) -> list[str]:
    """A subclass may keep its weights otherwise, or add to the product: adapters and quantized layers do."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return [f"{what} is a {type(layer).__name__}, not a Linear"]
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return [f"{what} has its weight in a {type(layer.weight).__name__}, not in a plain tensor"]
    return []


def _activation(mlp: Any) -> str | None:
    """`Folded.activation` of an MLP; None if the kernels have none such."""
    name = type(mlp.act).__name__
    if type(mlp).__name__ == "GluMlp":
        return SWIGLU if name == "SiLU" and not mlp.gate_last else None
    if name == "GELU":  # torch's, or timm's, which is exact
        return {"none": "erf", "tanh": "tanh"}.get(getattr(mlp.act, "approximate", "none"))
    return {"GELUTanh": "tanh", "QuickGELU": "sigmoid"}.get(name)
