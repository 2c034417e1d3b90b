"""The baselines that every speed claim stands against: plain PyTorch on a timm model, as others would write it.

Written from the description in Hu et al., "Sparse Model Inversion", ICML 2024, section 3, and the observable behaviour
of its published code: batch norms, one draw per batch, sub-patch jitter with cells rounded to the nearest, stopped
patches that go on moving under priors and Adam. Nothing here uses `smi_kernels` or `smi.Inversion`; only the start, the
noise and the draws, is given from outside, so that runs can be compared.

Rounding to TF32 is left to cuDNN's convolutions where PyTorch leaves it to them by default; in matrix products it
happens only in the recipes that say so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines_vit import Network, augment, grid_cells, permuted
from smi.config import Config
from smi.errors import SmiError, did_you_mean

Precision = Literal["fp32", "tf32", "autocast", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """How one baseline does the same iteration.

    Attributes:
        about: in words, for tables.
        dense: never prunes.
        trainable: weights require gradients, so each backward computes those too.
        maps: attention maps are written out in every block, in place of PyTorch's fused attention.
        host_read: the host reads the loss at each step.
        precision: ``autocast`` is float32 weights under bf16 autocast, ``bf16`` weights in bf16; pixels are float32.
        compiled: torch.compile, with patches gathered before the embedding and the last block's class row computed
            apart.
        captured: the whole step is one CUDA graph for each number of patches.
    """

    about: str
    dense: bool = False
    trainable: bool = False
    maps: bool = False
    host_read: bool = False
    precision: Precision = "fp32"
    compiled: bool = False
    captured: bool = False


EAGER = {
    "E32d": Recipe(
        "dense, eager fp32, weights left trainable, attention maps, loss read each step",
        dense=True,
        trainable=True,
        maps=True,
        host_read=True,
    ),
    "E32s": Recipe(
        "sparse as published: eager fp32, weights left trainable, all patches embedded and then gathered, attention "
        "maps, loss read each step",
        trainable=True,
        maps=True,
        host_read=True,
    ),
    "E32f": Recipe("E32s with frozen weights and TF32", maps=True, host_read=True, precision="tf32"),
    "A16": Recipe("bf16 autocast, fused attention, frozen weights", precision="autocast"),
}
BASELINES = {
    **EAGER,
    "C16": Recipe(
        "torch.compile max-autotune, bf16, fused attention, patches gathered before the embedding, class row apart, "
        "the whole step a CUDA graph",
        precision="bf16",
        compiled=True,
        captured=True,
    ),
    **{
        f"{name}+graph": dataclasses.replace(
            recipe, about=f"{name}, each step a CUDA graph", host_read=False, captured=True
        )
        for name, recipe in EAGER.items()
    },
}


def recipe(name: str) -> Recipe:
    """The named baseline. Raises `SmiError` with the nearest name."""
    if name not in BASELINES:
        raise SmiError(f"unknown baseline {name!r}.{did_you_mean(name, BASELINES, limit=20)}")
    return BASELINES[name]


class Baseline:
    """One batch under one recipe, step by step.

    Args:
        name: of `BASELINES`.
        model: a timm ``VisionTransformer`` with one class token; copied, not modified. It runs where `images` are.
        images: (B, C, H, W), the initial noise, in the dtype of the model.
        targets: (B,) int64.
        offsets: (T, 1, 3) int64 of dy, dx, flip; no augmentation happens at a pruning and the iteration before it.
        config: official semantics; its strategy and precision are the recipe's affair.
        mean, std: per channel, of the model's normalisation.
        exact: compute in the model's own dtype whatever the recipe says, for parity checks.
        compiler: backend of torch.compile, or ``none`` to do without.
        tune: let inductor try all its candidates on a GPU, as the recipe says; without, it compiles far sooner.
        graphs: capture CUDA graphs where the recipe says so.

    Attributes:
        iteration: iterations done.
        images: (B, C, H, W), the pixels, normalised.
        keep: (B, K) int64, patches still fed, in grid order.
        logits: (B, classes), loss: scalar, both of the last step, before its update.
        notes: what of the recipe this device or call leaves out.

    Raises:
        SmiError: unknown name, another model, or semantics other than official.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        offsets: Tensor,
        config: Config,
        mean: Tensor,
        std: Tensor,
        *,
        exact: bool = False,
        compiler: str = "inductor",
        tune: bool = True,
        graphs: bool = True,
    ) -> None:
        self.name, self.recipe = name, recipe(name)
        self.config = config = _official(config).replace(strategy="dense" if self.recipe.dense else "sparse")
        self.device = images.device
        on_gpu = self.device.type == "cuda"
        self.precision: Precision = "fp32" if exact else self.recipe.precision
        self.in_graph = self.recipe.captured and on_gpu and graphs
        self.notes = _notes(self.recipe, on_gpu, exact)
        twin = copy.deepcopy(model).to(self.device).eval().requires_grad_(self.recipe.trainable)
        self.network = Network(twin.bfloat16() if self.precision == "bf16" else twin, maps=self.recipe.maps)
        self.ranker = self.network if self.recipe.maps else Network(twin, maps=True)
        self.schedule = config.schedule(self.network.num_patches)
        self.images = images.clone().requires_grad_(True)
        self.targets = targets.to(self.device)
        self.keep = torch.arange(self.network.num_patches, device=self.device).repeat(len(images), 1)
        self.iteration = 0
        self.logits = self.loss = torch.empty(0)
        self._scores: Tensor | None = None

        offsets = offsets[:, 0].clone()
        for t in self.schedule:
            offsets[[t - 1, t]] = 0
        self._draws: list[tuple[int, int, int]] = [tuple(row) for row in offsets.tolist()]
        self._offsets = offsets.to(self.device)
        self._low = (-mean / std).to(images).view(1, -1, 1, 1)
        self._high = ((1 - mean) / std).to(images).view(1, -1, 1, 1)
        self._stream = torch.cuda.Stream(self.device) if self.in_graph else None
        self._graph: Any = None
        self._in_phase = 0
        self._t = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._start_update(compiler, tune and on_gpu)

    def _start_update(self, compiler: str, tune: bool) -> None:
        config = self.config
        if self.recipe.compiled:
            self._moments = torch.zeros_like(self.images), torch.zeros_like(self.images)
            self._objective: Callable[..., tuple[Tensor, Tensor]] = _compiled(self._objective_of, compiler, tune)
            self._update: Callable[..., None] = _compiled(_adam_clamp_, compiler, tune)
        else:
            self._objective = self._objective_of
            self._adam = torch.optim.Adam(
                [self.images],
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                capturable=self.in_graph,
            )

    def step(self) -> None:
        """One iteration. Raises `SmiError` after the last."""
        if self.iteration >= self.config.iterations:
            raise SmiError(f"{self.name} is done after {self.iteration} iterations; raise iterations to go on.")
        with _tf32(self.precision == "tf32"), self._on_own_stream():
            if self.iteration in self.schedule:
                self._prune()
            if not self.recipe.maps and self.iteration + 1 in self.schedule:
                self._scores = self._rank()
            if self._graph is not None:
                self._graph.replay()
            elif self.in_graph and self._in_phase >= _WARM_UP:
                self._capture()
                self._graph.replay()
            else:
                self._body()
        self.iteration += 1
        self._in_phase += 1
        if self.recipe.host_read:
            self.loss.item()

    def warm_up(self) -> None:
        """Compile for every number of patches to come, before the first step; nothing else changes."""
        if not self.recipe.compiled:
            return
        images, every = self.images.detach().clone(), self.keep
        with self._on_own_stream():
            for count in (self.network.num_patches, *self.schedule.values()):
                self.keep = every[:, :count].contiguous()
                self._body()
            with torch.no_grad():
                self.images.copy_(images)
                for moment in (*self._moments, self._t):
                    moment.zero_()
        self.keep = every

    def _body(self) -> None:
        """Everything of a step that the device does."""
        cells = self.keep if self.keep.shape[1] < self.network.num_patches else None
        offset: Any = self._draws[self.iteration]
        if self.recipe.captured:
            offset = self._offsets.index_select(0, self._t)[0]
        self.images.grad = None
        for parameter in self.network.model.parameters() if self.recipe.trainable else ():
            parameter.grad = None
        with self._autocast():
            self.loss, self.logits, scores = self._objective(self.images, cells, offset)
        self._scores = self._scores if scores is None else scores.detach()
        self.loss.backward()
        self.loss, self.logits = self.loss.detach(), self.logits.detach()
        self._t += 1
        if self.recipe.compiled:
            c = self.config
            with torch.no_grad():
                self._update(
                    self.images, self.images.grad, *self._moments, self._t, self._low, self._high,
                    c.learning_rate, c.beta1, c.beta2, c.eps,
                )  # fmt: skip
        else:
            self._adam.step()
            with torch.no_grad():
                self.images.clamp_(self._low, self._high)

    def _objective_of(self, images: Tensor, keep: Tensor | None, offset: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scalar loss, logits (B, classes), and the scores (B, K) where maps are written out."""
        if isinstance(offset, Tensor):
            augmented = permuted(images, offset)
        else:
            augmented = augment(images, offset)
        cells = None if keep is None else grid_cells(keep, offset, self.network.grid, self.network.patch)
        logits, scores = self.network(augmented, cells, lean=self.recipe.compiled)
        logits = logits.to(images.dtype)
        loss = self.config.cross_entropy * F.cross_entropy(logits, self.targets)
        for name, prior in PRIORS.items():
            if weight := getattr(self.config, name):
                loss = loss + weight * prior(images)
        return loss, logits, scores

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=self._stream):
            self._body()
        self._graph = graph

    @torch.no_grad()
    def _rank(self) -> Tensor:
        """The scores that this iteration's forward has, of a recipe whose own forward yields none."""
        cells = self.keep if self.keep.shape[1] < self.network.num_patches else None
        with self._autocast():
            scores = self.ranker(self.images, cells)[1]
        assert scores is not None
        return scores

    def _prune(self) -> None:
        assert self._scores is not None
        count = self.schedule[self.iteration]
        order = self._scores.float() if self._scores.dtype == torch.bfloat16 else self._scores
        chosen = order.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        self.keep = self.keep.gather(1, chosen)
        self._graph, self._in_phase = None, 0

    @torch.no_grad()
    def final(self) -> tuple[Tensor, Tensor]:
        """Of the images as they are: logits (B, classes) of the kept patches, and the loss; nothing augmented."""
        cells = self.keep if self.keep.shape[1] < self.network.num_patches else None
        with _tf32(self.precision == "tf32"), self._autocast():
            loss, logits, _ = self._objective_of(self.images, cells, (0, 0, 0))
        return logits, loss

    def gradient(self) -> Tensor:
        """(B, C, H, W), of the loss at the current iteration; changes nothing."""
        cells = self.keep if self.keep.shape[1] < self.network.num_patches else None
        offset: Any = self._draws[self.iteration]
        if self.recipe.captured:
            offset = self._offsets[self.iteration]
        with _tf32(self.precision == "tf32"), self._autocast():
            loss = self._objective(self.images, cells, offset)[0]
        return torch.autograd.grad(loss, self.images)[0]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "autocast":
            return contextlib.nullcontext()
        # Its cache of cast weights would tie a captured graph to tensors that are gone at the next step.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.in_graph)

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """A graph is captured on the stream on which its gradients were first accumulated."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)


_WARM_UP = 3  # steps of a phase before its graph is captured: they compile and allocate


def _adam_clamp_(
    x: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, low: Tensor, high: Tensor,
    lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Adam (Kingma & Ba, 2015, algorithm 1) in place, its step number on the device, then the clamp."""
    m.copy_(beta1 * m + (1 - beta1) * grad)
    v.copy_(beta2 * v + (1 - beta2) * grad * grad)
    t = step.to(x.dtype)
    denominator = (v / (1 - beta2**t)).sqrt() + eps
    x.copy_(torch.clamp(x - lr * (m / (1 - beta1**t)) / denominator, low, high))


def _differences(x: Tensor) -> list[Tensor]:
    """Right, down, down left, down right."""
    return [
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., 1:, 1:] - x[..., :-1, :-1],
    ]


PRIORS: dict[str, Callable[[Tensor], Tensor]] = {
    "tv1": lambda x: torch.stack([d.abs().mean() for d in _differences(x)]).sum(),
    "tv2": lambda x: torch.stack([d.norm() for d in _differences(x)]).sum(),
    "l2": lambda x: x.norm(),
}


def _official(config: Config) -> Config:
    config = config.resolved()
    for name, expected in (("augment_per", "batch"), ("norm", "batch"), ("stopped", "evolve")):
        if getattr(config, name) != expected:
            raise SmiError(
                f"{name} is {getattr(config, name)!r}; baselines follow the published code, where it is {expected!r}. "
                f'Use semantics="official".'
            )
    return config


def _notes(recipe: Recipe, on_gpu: bool, exact: bool) -> tuple[str, ...]:
    notes = []
    if recipe.captured and not on_gpu:
        notes.append("no CUDA graph on a CPU")
    if recipe.precision == "tf32" and not on_gpu:
        notes.append("no TF32 on a CPU")
    if exact and recipe.precision != "fp32":
        notes.append("in the model's own dtype")
    return tuple(notes)


def _compiled(function: Callable[..., Any], compiler: str, tune: bool) -> Callable[..., Any]:
    if compiler == "none":
        return function
    # All numbers of patches of all models share a function, and each compiles for itself.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    # On a CPU there is nothing to tune, and C++ to compile for each candidate.
    mode = {"mode": "max-autotune-no-cudagraphs"} if compiler == "inductor" and tune else {}
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler, **mode)


@contextlib.contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def supported(model: nn.Module) -> list[str]:
    """Every reason why no baseline runs `model`; empty if they do."""
    if not isinstance(model, VisionTransformer):
        return [f"{type(model).__name__} is not timm's VisionTransformer"]
    return Network.reasons_against(model)
