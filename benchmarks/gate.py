"""Whether an implementation computes the published iteration: asked on the device that is timed, before it is timed."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import smi
from benchmarks.baselines import Baseline
from benchmarks.baselines_timm import PEERS, Peer

OURS = "SMI"
# The least cosine of the pixel gradient and the least share of the same kept patches, by arithmetic.
LEAST = {"fp32": (0.9999, 0.98), "tf32": (0.999, 0.95), "bf16": (0.999, 0.95)}
GATED = 4  # images
STEPS = 8  # iterations that a run of the gate may have: enough for a graph to be captured and replayed


@dataclass(frozen=True)
class Gate:
    """The verdict on one implementation.

    Attributes:
        cosine: the lowest, with all patches fed and with the kept ones, of the gradient of cross-entropy.
        overlap: share of the patches kept at a pruning that the reference keeps, too; None where nothing is ranked.
        arithmetic: key of `LEAST`.
        reason: why it failed; empty if it passed.
    """

    cosine: float
    overlap: float | None
    arithmetic: str
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judged(cosines: list[float], overlap: float | None, arithmetic: str) -> Gate:
    """The verdict on the worst of these figures; NaN, wherever it stands, fails."""
    least, least_overlap = LEAST[arithmetic]
    cosine = torch.tensor(cosines, dtype=torch.float64).amin().item()  # Python's min passes a NaN over
    reasons = []
    if not cosine >= least:
        reasons.append(f"cosine of the gradient {cosine:.4f}, expected at least {least}")
    if overlap is not None and not overlap >= least_overlap:
        reasons.append(f"share of the same patches {overlap:.3f}, expected at least {least_overlap}")
    return Gate(cosine, overlap, arithmetic, "; ".join(reasons))


class Reference:
    """Float64 E32s on a few images of this model: what every implementation is held against.

    Args:
        network: as loaded, on the CPU.
        start: images (B, C, H, W) float32, targets (B,), offsets (T, 1, 3), config, mean, std, as `Baseline` takes
            them; the first `GATED` images count.
        kept: patches after the one pruning that is tried.
    """

    def __init__(self, network: Any, start: dict[str, Any], kept: int) -> None:
        patches = network.patch_embed.num_patches
        config = start["config"].replace(
            iterations=STEPS, prune_at=(1,), prune_ratio=(1 - (kept + 0.5) / patches,), tv1=0.0, tv2=0.0, l2=0.0
        )
        self.network, self.kept = network, kept
        few = {"images": start["images"][:GATED], "targets": start["targets"][:GATED]}
        offsets = start["offsets"][:STEPS].clone()
        offsets[:2] = 0  # as at any pruning; the dense ones, which never prune, shall see the same
        self.start = {**start, **few, "offsets": offsets, "config": config}
        self.dense = self._of("E32d").gradient()
        run = self._of("E32s")
        run.step()
        run.step()
        self.keep, self.images = run.keep, run.images.detach()
        self.sparse = run.gradient()

    def _of(self, name: str) -> Baseline:
        wide = copy.deepcopy(self.network).double()
        given = {**self.start, "images": self.start["images"].double()}
        return Baseline(name, wide, **given, exact=True)

    def of_baseline(self, name: str) -> Gate:
        """Gradients and ranking of the named baseline, each by its own code.

        Of one in a CUDA graph also the way that several steps go, replayed, against the same steps without a graph.
        """
        run = Baseline(name, self.network, **self.start, tune=False)
        arithmetic = {"fp32": "fp32", "tf32": "tf32"}.get(run.precision, "bf16")
        cosines = [cosine(run.gradient(), self.dense)]
        if run.in_graph:
            moved = [self._way(name, graphs) for graphs in (False, True)]
            cosines.append(cosine(*moved))
        if run.recipe.dense:
            return judged(cosines, None, arithmetic)
        run.step()
        run.step()
        overlap = shared(run.keep, self.keep)
        run.keep = self.keep
        with torch.no_grad():
            run.images.copy_(self.images)
        cosines.append(cosine(run.gradient(), self.sparse))
        return judged(cosines, overlap, arithmetic)

    def _way(self, name: str, graphs: bool) -> Tensor:
        """What all steps together add to the images."""
        run = Baseline(name, self.network, **self.start, tune=False, graphs=graphs)
        for _ in range(STEPS):
            run.step()
        return run.images.detach() - self.start["images"]

    def of_library(self, model: smi.SparseModel) -> Gate:
        """Gradients through the operators that an inversion runs on, and the ranking of an inversion itself."""
        arithmetic = {"fp32": "fp32", "tf32": "tf32"}.get(model.precision, "bf16")
        config = self.start["config"].replace(precision=model.precision)
        inversion = smi.Inversion(model, self.start["targets"], config)
        offsets = self.start["offsets"]
        cosines = []
        for images, keep, t, expected in (
            (self.start["images"], None, 0, self.dense),
            (self.images.float(), self.keep, 2, self.sparse),
        ):
            leaf = images.clone().requires_grad_(True)
            logits, _ = model.feed(leaf, keep, offsets[t].to(model.device))
            loss = torch.nn.functional.cross_entropy(logits, self.start["targets"].to(model.device))
            cosines.append(cosine(torch.autograd.grad(loss, leaf)[0], expected))
        inversion.step()
        inversion.step()
        return judged(cosines, shared(inversion.keep, self.keep), arithmetic)

    def of_peer(self, name: str) -> Gate:
        """Its gradient in the arithmetic that is timed against its own in float64, nothing left out."""
        patches = self.network.patch_embed.num_patches
        given = (self.start["images"], self.start["targets"])
        rough = Peer(name, self.network, *given, kept=patches).gradient()
        wide = Peer(name, copy.deepcopy(self.network).double(), given[0].double(), given[1], kept=patches, exact=True)
        return judged([cosine(rough, wide.gradient())], None, "bf16")

    def gate(self, name: str, model: smi.SparseModel) -> Gate:
        """The verdict on an implementation by name."""
        if name == OURS:
            return self.of_library(model)
        return self.of_peer(name) if name in PEERS else self.of_baseline(name)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def shared(keep: Tensor, expected: Tensor) -> float:
    """Share of the patches of `keep` (B, K) that are among `expected` (B, K)."""
    return (keep[:, :, None] == expected[:, None, :]).any(2).double().mean().item()
