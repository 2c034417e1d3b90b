"""Where a Vision Transformer is quantized, and how: sites of an exported graph, as a torchao ``Quantizer``.

A *site* is a tensor that is quantized once, for all that read it: what linear layers, convolutions and the two products
of attention take in, what goes into a softmax and into a sum, sums, and the logits. For timm's plain blocks these are

    input, patch_embed.proj, embed.tokens, embed.position, embed.sum, head.input, head            7
    norm1, attn.qkv, attn.scores, attn.softmax, attn.context, attn.proj, residual1,
    norm2, mlp.act, mlp.fc2, residual2                                                    11 in each block

139 for 12 blocks. The code published with Hu et al. (ICML 2024) quantizes the same tensors except the output of the
softmax: 127 for 12 blocks, which is ``skip=("softmax",)``. LayerScale and query-key norms add sites of their own.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from smi.errors import SmiError, did_you_mean

# On import, torchao registers an enumeration that torch 2.11 and later know by themselves, and warns that it does.
_registry = logging.getLogger("torch.utils._pytree")
_level = _registry.level
_registry.setLevel(logging.ERROR)
try:
    from torchao.quantization.pt2e import (
        FakeQuantize,
        HistogramObserver,
        MinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
except ImportError as error:
    raise SmiError(
        f"quantization needs torchao, which cannot be imported ({error}); install it with "
        f"pip install 'sparse-model-inversion[quantize]'."
    ) from None
finally:
    _registry.setLevel(_level)

Observer = Literal["minmax", "percentile", "mse"]
KINDS = ("first", "embed", "norm", "linear", "scores", "softmax", "context", "activation", "residual", "scale", "head")
_WITH_WEIGHTS = {"first", "head"}  # kinds that spare the weights of their layers, too
BITS = range(2, 9)
_COUNTED = 2**24  # values that one histogram takes in
_ANNOTATION = "quantization_annotation"  # the key under which PT2E looks

_aten = torch.ops.aten
_WEIGHTED = (_aten.linear.default, _aten.conv2d.default)
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
# Only rearrange values, or read some of a constant: what they give is quantized where it comes from.
_VIEWS = (
    *(_aten.reshape.default, _aten.view.default, _aten.permute.default, _aten.transpose.int, _aten.unbind.int),
    *(_aten.expand.default, _aten.clone.default, _aten.contiguous.default, _aten.flatten.using_ints),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.chunk.default, _aten.split.Tensor, _aten.index.Tensor),
    operator.getitem,
)


@dataclass(frozen=True)
class Scheme:
    """Weights per output channel, symmetric; activations per tensor, asymmetric; both kept in 8-bit integers.

    Attributes:
        weights, activations: bits, 2 to 8. b-bit weights are integers of -(2^(b-1) - 1) to 2^(b-1) - 1, activations of
            0 to 2^b - 1.
        observer: range of an activation: ``minmax`` of all calibration images (as published), ``percentile`` clips
            0.01 % of the values on either side, ``mse`` shrinks both ends by the factor with the least squared error.
        skip: kinds of sites left in floating point; ``head`` and ``first`` spare the weights there, too.

    Raises:
        SmiError: bits, observer or kind that there is not.
    """

    weights: int = 8
    activations: int = 8
    observer: Observer = "minmax"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in BITS:
                raise SmiError(f"{name} are to have {getattr(self, name)} bits; expected {BITS[0]} to {BITS[-1]}.")
        if self.observer not in _OBSERVERS:
            raise SmiError(f"unknown observer {self.observer!r}.{did_you_mean(self.observer, _OBSERVERS)}")
        for kind in self.skip:
            if kind not in KINDS:
                raise SmiError(f"unknown kind of site {kind!r} to skip.{did_you_mean(kind, KINDS, limit=len(KINDS))}")


@dataclass(frozen=True)
class Site:
    """One quantized tensor: ``blocks.0.attn.scores`` of kind ``scores``."""

    name: str
    kind: str


class _SearchedObserver(HistogramObserver):
    """A histogram of 2048 bins, from which the range is taken by `search`."""

    def forward(self, x_orig: Tensor) -> Tensor:
        # torch.histc counts in float32, where 2^24 and one more are 2^24: attention of large images has more in a bin.
        for part in x_orig.detach().reshape(-1).split(_COUNTED):
            super().forward(part)
        return x_orig

    def search(self, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(bins,) float64 values and how many there are -> smallest and largest that are represented."""
        raise NotImplementedError

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        width = (self.max_val - self.min_val).double() / self.bins
        centers = self.min_val.double() + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)
        low, high = self.search(centers, self.histogram.double())
        return low.to(self.min_val.dtype), high.to(self.max_val.dtype)


class PercentileObserver(_SearchedObserver):
    """The range without the outer 0.01 % of the values on either side."""

    tail = 1e-4

    def search(self, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        share = counts.cumsum(0) / counts.sum()
        low, high = (int((share < limit).sum()) for limit in (self.tail, 1 - self.tail))
        return centers[low], centers[min(high, len(centers) - 1)]


class MseObserver(_SearchedObserver):
    """[a min, a max] for the a of 0.2, 0.21, ... 1 with the least squared error of quantization."""

    def search(self, centers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        shrink = torch.linspace(0.2, 1, 81, dtype=torch.float64)[:, None]
        low, high = (shrink * end.double() for end in (self.min_val.clamp_max(0), self.max_val.clamp_min(0)))
        step = ((high - low) / (self.quant_max - self.quant_min)).clamp_min(1e-12)
        zero = self.quant_min - (low / step).round()
        grid = ((centers / step).round() + zero).clamp(self.quant_min, self.quant_max)
        error = (((grid - zero) * step - centers).square() * counts).sum(1)
        best = int(error.argmin())
        return low[best, 0], high[best, 0]


# The range of each channel as the weights are at this step, which is what conversion will see of them.
_TRAINED_WEIGHT = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0)
_OBSERVERS: dict[str, Any] = {"minmax": MinMaxObserver, "percentile": PercentileObserver, "mse": MseObserver}


class VitQuantizer(Quantizer):
    """Annotates an exported `smi.adapters.timm_quantize.TokenModel`, of whole images or of some patches.

    Args:
        scheme: what to do.
        observers: by name of the site, calibrated elsewhere; taken in place of new ones.
        training: annotate for ``prepare_qat_pt2e``; `observers`, of all sites, say where the learned steps begin.

    Attributes:
        sites: after ``prepare_pt2e``, in order of the graph.
        observers: after ``prepare_pt2e``, by name of the site.
        learned: after ``prepare_qat_pt2e``, by name of the site, what quantizes it with a step to be learned.
        weights: after ``prepare_pt2e``, names of the quantized weights.
    """

    def __init__(self, scheme: Scheme, observers: dict[str, Any] | None = None, *, training: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.training = training
        self.sites: list[Site] = []
        self.weights: list[str] = []
        self.observers: dict[str, Any] = dict(observers or {})
        self.learned: dict[str, Any] = {}
        self._at: dict[Node, Site] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        scheme, top = self.scheme, 2 ** (self.scheme.weights - 1) - 1
        weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=_TRAINED_WEIGHT if self.training else PerChannelMinMaxObserver,
            quant_min=-top,
            quant_max=top,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        activation = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=_OBSERVERS[scheme.observer],
            quant_min=0,
            quant_max=2**scheme.activations - 1,
            qscheme=torch.per_tensor_affine,
        )
        self._at = {node: site for node, site in find_sites(model).items() if site.kind not in scheme.skip}
        self.sites, self.weights = list(self._at.values()), []
        for node in model.graph.nodes:
            inputs: dict[Node, Any] = {}
            if node.target in _WEIGHTED and not {_layer_kind(node)} & {*scheme.skip} & _WITH_WEIGHTS:
                inputs[node.args[1]] = weight
                self.weights.append(str(node.args[1].target).removeprefix("vit."))
            if inputs or node in self._at:
                node.meta[_ANNOTATION] = QuantizationAnnotation(
                    input_qspec_map=inputs,
                    output_qspec=activation if node in self._at else None,
                    allow_implicit_sharing=False,
                    _annotated=True,
                )
        return model

    def validate(self, model: GraphModule) -> None:
        """Raises `SmiError` where a product of two activations stayed hidden."""
        hidden = {str(node.target) for node in model.graph.nodes if "scaled_dot_product" in str(node.target)}
        if hidden:
            raise SmiError(f"the model cannot be quantized: its attention stays in one piece ({', '.join(hidden)}).")

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        for node, site in self._at.items():
            if self.training:
                begun = _learnable(self.observers[site.name])
                edge_or_node_to_obs_or_fq[node] = self.learned[site.name] = begun
                continue
            observer = edge_or_node_to_obs_or_fq[node]
            edge_or_node_to_obs_or_fq[node] = self.observers.setdefault(site.name, observer)


def _learnable(observer: Any) -> LearnableFakeQuantize:
    """Quantizes by the step and zero point of `observer`, and has a gradient for the step."""
    made = LearnableFakeQuantize(
        MinMaxObserver,
        observer.quant_min,
        observer.quant_max,
        use_grad_scaling=True,
        dtype=observer.dtype,
        qscheme=observer.qscheme,
    )
    scale, zero_point = observer.calculate_qparams()
    made._initialize_or_update_qparams(scale.clone(), zero_point)
    made.disable_observer()
    return made


def learned_observer(learned: LearnableFakeQuantize) -> MinMaxObserver:
    """One that says the step and zero point that were learned."""
    scale, zero_point = learned.calculate_qparams()
    made = MinMaxObserver(
        dtype=learned.dtype, qscheme=learned.qscheme, quant_min=learned.quant_min, quant_max=learned.quant_max
    )
    made(torch.cat([(end - zero_point) * scale for end in (learned.quant_min, learned.quant_max)]))
    return made


def find_sites(model: GraphModule) -> dict[Node, Site]:
    """Every tensor to be quantized, by the node that makes it, in order of the graph."""
    wanted: dict[Node, None] = {}
    for node in model.graph.nodes:
        if node.target == _aten.conv2d.default:
            wanted[node.args[0]] = wanted[node] = None  # the pixels themselves, however they were gathered
        elif node.target == _aten.linear.default or node.target == _aten.softmax.int:
            wanted[_source(node.args[0])] = None
        elif node.target in _PRODUCTS:
            wanted[_source(node.args[0])] = wanted[_source(node.args[1])] = None
        elif node.target == _aten.add.Tensor and all(map(_is_float, node.args)):
            wanted[_source(node.args[0])] = wanted[_source(node.args[1])] = wanted[node] = None
        elif node.op == "output":
            wanted[_source(node.args[0][0])] = None
    heads = [node for node in model.graph.nodes if node.target in _WEIGHTED and _layer_kind(node) == "head"]
    order = {node: place for place, node in enumerate(model.graph.nodes)}
    found: dict[Node, Site] = {}
    count: dict[str, int] = {}
    for node in sorted(wanted, key=order.__getitem__):
        site = _name(node, after_head=bool(heads) and order[node] >= order[heads[0]])
        count[site.name] = count.get(site.name, 0) + 1
        repeated = site.kind == "residual" or count[site.name] > 1
        found[node] = Site(f"{site.name}{count[site.name]}", site.kind) if repeated else site
    return found


def _name(node: Node, after_head: bool) -> Site:
    path, target = _path(node), node.target
    inside = f"{path}." if path else ""
    if any(user.target == _aten.conv2d.default for user in node.users):
        return Site("input", "first")
    if target == _aten.conv2d.default:
        return Site(path, "first")
    if after_head:
        return Site(path or "logits", "head")
    if node.users and all(user.target in _WEIGHTED and _layer_kind(user) == "head" for user in node.users):
        return Site("head.input", "head")
    if node.op == "get_attr":
        return Site("embed.position" if node.target == "position" else str(node.target).removeprefix("vit."), "embed")
    if target == _aten.cat.default and not path:
        return Site("embed.tokens", "embed")
    if target == _aten.add.Tensor:
        return Site(f"{inside}residual", "residual") if path else Site("embed.sum", "embed")
    if target == _aten.layer_norm.default:
        return Site(path, "norm")
    if target == _aten.linear.default:
        return Site(path, "linear")
    if target == _aten.softmax.int:
        return Site(f"{inside}softmax", "softmax")
    if target in _PRODUCTS:
        return Site(f"{inside}scores", "scores") if _feeds_softmax(node) else Site(f"{inside}context", "context")
    if target == _aten.mul.Tensor and any(isinstance(a, Node) and a.op == "get_attr" for a in node.args):
        return Site(path, "scale")
    return Site(path or str(node.name), "activation")


def _path(node: Node) -> str:
    """Of the innermost module that `node` belongs to, as the model names it: ``blocks.0.attn``."""
    stack = [str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix("vit.") if stack and stack[-1].startswith("vit.") else ""


def _layer_kind(node: Node) -> str:
    if node.target == _aten.conv2d.default:
        return "first"
    return "head" if _path(node).startswith("head") else "linear"


def _source(node: Any) -> Node:
    """What made the values of `node`, past what only rearranges or scales them all alike."""
    while node.target in _VIEWS or (node.target == _aten.mul.Tensor and not isinstance(node.args[1], Node)):
        node = node.args[0]
    found: Node = node
    return found


def _feeds_softmax(node: Node) -> bool:
    return any(
        user.target == _aten.softmax.int
        or (user.target in _VIEWS and _feeds_softmax(user))
        or (user.target in (_aten.mul.Tensor, _aten.add.Tensor) and _feeds_softmax(user))
        for user in node.users
        if _path(user) == _path(node)
    )


def _is_float(value: Any) -> bool:
    meta = value.meta.get("val") if isinstance(value, Node) else None
    if isinstance(value, Node) and meta is None and value.op == "get_attr":
        return True
    return isinstance(meta, Tensor) and meta.is_floating_point()


def kinds_of(text: str) -> Sequence[str]:
    """``residual,head`` as a tuple; empty text is none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
