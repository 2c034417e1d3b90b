"""Ours, the baselines and the peers behind one handle, with the prunings of the paper moved to the very start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import smi
from benchmarks.baselines import BASELINES, Baseline
from benchmarks.baselines_timm import PEERS, Peer
from benchmarks.gate import OURS
from smi.augment import NOISE, draw_offsets, normal_images

# Iterations of a phase that are not timed. They compile and allocate; and on a GPU they capture: ours after the first
# one, as soon as the eight of one graph lie ahead.
WARM, WARM_ON_GPU = 5, 9
_SPARE = 100  # iterations beyond those of phases and rounds, for memory and launches


def random_weights(network: Any, seed: int = 0) -> None:
    """Normal weights that keep the size of what they multiply: attention is uneven enough to rank by, nothing is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            elif parameter.ndim > 1:
                parameter.copy_(noise)
            else:
                parameter.copy_(0.02 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def begin(network: Any, info: smi.ModelInfo, config: smi.Config, device: torch.device) -> dict[str, Any]:
    """What `Baseline` takes after the model: official semantics, noise, draws and targets from the config's seed."""
    config = config.replace(semantics="official", result_mask="carried").resolved()  # judged on what was fed
    indices = range(config.batch_size)
    size = (info.input_size[1], info.input_size[2])
    return {
        "images": normal_images(config.seed, NOISE, indices, info.input_size).to(device),
        "targets": torch.tensor([i % info.num_classes for i in indices], device=device),
        "offsets": draw_offsets(config, indices, size, info.patch_size, ()),
        "config": config,
        "mean": torch.tensor(info.mean, device=device),
        "std": torch.tensor(info.std, device=device),
    }


def advance(inversion: smi.Inversion, iterations: int) -> None:
    """So many, several at once where graphs allow it, as `Inversion.run` does and `Inversion.step` cannot."""
    target = inversion.iteration + iterations
    while inversion.iteration < target:
        inversion._advance(min(inversion._stride(), target - inversion.iteration))


class Implementation:
    """One way to invert one batch.

    Args:
        name: ``SMI``, or of `BASELINES` or `PEERS`.
        network: on the CPU.
        model: ours.
        start: of `begin`.
        steps: iterations of a round, and of each phase, to whose end its pruning is moved, with one more in between,
            which ranks; 0 leaves the schedule.
        rounds: of the steady phase, for which there have to be iterations.

    Attributes:
        about, notes: in words.
        config: with the moved schedule.
        phases: (patches fed, iterations of the schedule as given), in order; none of a peer, which has no schedule.
        graph: whether steps run as CUDA graphs.
        warm: iterations of a phase before those that are timed.
        weight_bytes: of one copy of its weights in its own arithmetic.
    """

    def __init__(
        self, name: str, network: Any, model: smi.SparseModel, start: dict[str, Any], steps: int, rounds: int = 0
    ) -> None:
        self.name, self.device = name, model.device
        recipe = BASELINES.get(name)
        config: smi.Config = start["config"].replace(strategy="dense" if recipe and recipe.dense else "sparse")
        patches = model.info.num_patches
        kept = min(config.replace(strategy="sparse").schedule(patches).values(), default=patches)
        schedule = config.schedule(patches)
        lengths = zip([patches, *schedule.values()], [0, *schedule], [*schedule, config.iterations], strict=True)
        self.phases = [] if name in PEERS else [(fed, end - begun) for fed, begun, end in lengths]
        self.warm = WARM_ON_GPU if self.device.type == "cuda" else WARM
        if steps:
            length = self.warm + steps + 1
            moved = tuple(length * (i + 1) for i in range(len(config.prune_at)))
            room = length * (len(moved) + 1) + steps * rounds + _SPARE
            config = config.replace(prune_at=moved, iterations=room)
        self.config, self.targets = config, start["targets"]
        self.notes: tuple[str, ...] = ()
        parameters = sum(p.numel() for p in network.parameters())
        narrow = (
            model.precision in ("bf16", "fp16") if name == OURS else recipe is not None and recipe.precision == "bf16"
        )
        self.weight_bytes = parameters * (2 if narrow else 4)
        self.graph = model.device.type == "cuda" and (name == OURS or (recipe is not None and recipe.captured))
        offsets = draw_offsets(config, [0], model.info.input_size[1:], model.info.patch_size, ())
        self._run: Any
        if name == OURS:
            self.about = f"SMI on {model.where}, {model.precision}"
            self._run = smi.Inversion(model, self.targets, config.replace(precision=model.precision))
        elif name in PEERS:
            self.about = PEERS[name]
            self._run = Peer(name, network, start["images"], self.targets, kept, lr=config.learning_rate)
        else:
            self.about = BASELINES[name].about
            self._run = Baseline(name, network, **{**start, "config": config, "offsets": offsets})
            self.notes = self._run.notes

    def advance(self, iterations: int) -> None:
        """So many, as a user's run does them; the host does not wait for more than it would there."""
        if self.name == OURS:
            advance(self._run, iterations)
            return
        for _ in range(iterations):
            self._run.step()

    def warm_up(self) -> None:
        """Compile what a whole schedule would; ours has run all its shapes by then."""
        if isinstance(self._run, Baseline):
            self._run.warm_up()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def iteration(self) -> int:
        """Done so far; of a peer 0, for it counts none."""
        return getattr(self._run, "iteration", 0)

    @property
    def fed(self) -> int | None:
        """Patches fed now; None of a peer."""
        return None if self.name in PEERS else self._run.keep.shape[1]

    def final(self) -> dict[str, float]:
        """Of the images as they are: cross-entropy and the share on which the teacher agrees."""
        logits: Tensor
        if self.name == OURS:
            logits = self._run.result().logits.to(self.device)
        elif self.name in PEERS:
            logits = self._run.logits
        else:
            logits = self._run.final()[0]
        return {
            "iterations": self.iteration,
            "cross_entropy": F.cross_entropy(logits.float(), self.targets).item(),
            "teacher_agreement": (logits.argmax(1) == self.targets).float().mean().item(),
        }
