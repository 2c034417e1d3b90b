#!/usr/bin/env python
"""Do rankings find the patches that matter? What a few patches, chosen once out of whole images, still tell.

    python -m benchmarks.rankings --test SOMEWHERE/test

Images are real ones, and those of dense inversions after some of their iterations, when sparse ones would prune. Of
each the patches that a ranking puts first are kept; controls are patches drawn at random (three times) and those that
the ranking puts last. Told is how often the model itself says the image's class from these
patches alone, and for inverted images how often a judge that took no part does, with the mean colour in the others'
place. Were ranking worth nothing, first, random and last would be alike. Writes one JSON file under
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from benchmarks.timing import RESULTS, environment, write_result
from smi.dataset import fill_dropped
from smi.embedded import load_judge
from smi.evaluation import data_config, data_transform, open_dataset
from smi.rankings import gradient_input
from smi.report_data import renormalise

RANKINGS = ("class_attention", "received_attention", "attention_rollout", "gradient_input")
DRAWS = 3
BATCH = 100


class Ranked:
    """A network with every ranking, and images with their classes.

    Args:
        network: a supported model with a class token.
        kept: numbers of patches.
    """

    def __init__(self, network: nn.Module, kept: tuple[int, ...]) -> None:
        self.kept = kept
        self.models = {r: smi.SparseModel(network, ranking=r) for r in RANKINGS if r != "gradient_input"}
        self.model = self.models["class_attention"]

    def scores(self, images: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Ranking -> (B, N)."""
        for ranking, model in self.models.items():
            with torch.no_grad():
                found = model.feed(images, scores=True)[1]
            assert found is not None
            yield ranking, found
        watched = images.clone().requires_grad_()
        loss = F.cross_entropy(self.model.feed(watched)[0], targets, reduction="sum")
        everything = torch.arange(self.model.info.num_patches).repeat(len(images), 1)
        yield "gradient_input", gradient_input(loss, watched, everything, self.model.info.patch_size)

    def choices(self, images: Tensor, targets: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name -> (B, N) patches, in the order in which they would be kept."""
        generator = torch.Generator().manual_seed(seed)
        for draw in range(DRAWS):
            yield f"random {draw}", torch.rand(len(images), self.model.info.num_patches, generator=generator).argsort(1)
        for ranking, scores in self.scores(images, targets):
            order = scores.argsort(dim=1, descending=True, stable=True)
            yield ranking, order
            yield f"{ranking}, last", order.flip(1)

    def told(self, images: Tensor, targets: Tensor, judge: nn.Module | None) -> dict[str, dict[str, list[float]]]:
        """Choice -> who says (``model``, ``judge``) -> share of images whose class is said, for each number kept."""
        right: dict[str, dict[str, list[int]]] = {}
        for start in range(0, len(images), BATCH):
            part, wanted = images[start : start + BATCH], targets[start : start + BATCH]
            for name, order in self.choices(part, wanted, start):
                for place, kept in enumerate(self.kept):
                    keep = order[:, :kept].sort(1).values
                    for who, said in self._said(part, keep, judge):
                        counts = right.setdefault(name, {}).setdefault(who, [0] * len(self.kept))
                        counts[place] += int((said == wanted).sum())
        return {n: {w: [c / len(images) for c in counts] for w, counts in by.items()} for n, by in right.items()}

    @torch.no_grad()
    def _said(self, images: Tensor, keep: Tensor, judge: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
        yield "model", self.model.feed(images, keep)[0].argmax(1)
        if judge is not None:
            info, config = self.model.info, judge.pretrained_cfg
            filled = fill_dropped(images, keep, torch.arange(len(images)), info, 0, "mean")
            yield "judge", judge(renormalise(filled, info, config["mean"], config["std"])).argmax(1)


def inverted(model: smi.SparseModel, count: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Dense images after so many iterations of the demo preset: (B, C, H, W) and their classes."""
    config = smi.preset("demo").replace(strategy="dense", seed=1, snapshots=0)
    plan = smi.WorkPlan.balanced(range(model.info.num_classes), count, config.batch_size, model.info.num_classes)
    config = config.replace(iterations=iterations).resolved()
    made = [
        smi.invert(model, [plan.targets[i] for i in numbers], config, indices=numbers).images
        for numbers in map(plan.batch, range(plan.num_batches))
    ]
    return torch.cat(made), torch.tensor(plan.targets)


def combined(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """The draws of the random choice as their mean."""
    draws = [found[f"random {draw}"] for draw in range(DRAWS)]
    mean = {who: [statistics.mean(values) for values in zip(*(d[who] for d in draws), strict=True)] for who in draws[0]}
    return {"random": mean, **{name: by for name, by in found.items() if not name.startswith("random ")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:teacher", help="of the judge's classes: CIFAR-10's")
    parser.add_argument("--test", required=True, help="as --data of smi evaluate")
    parser.add_argument("--limit", type=int, default=1000, help="real images, spread evenly")
    parser.add_argument("--images", type=int, default=120, help="inverted ones")
    parser.add_argument("--iterations", type=int, nargs="+", default=[40, 160, 400], help="of dense inversion")
    parser.add_argument("--kept", type=int, nargs="+", default=[32, 16, 8])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    network, judge = smi.load_model(args.model), load_judge()
    ranked = Ranked(network, tuple(args.kept))
    config, info = data_config(network), ranked.model.info
    test = open_dataset(args.test, data_transform(config), num_classes=info.num_classes, class_names=info.class_names)
    items = [test[i * len(test) // args.limit] for i in range(min(args.limit, len(test)))]
    real = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    sets: dict[str, Any] = {"real images": {"images": len(items), "told": combined(ranked.told(*real, None))}}
    print("real images: done", flush=True)
    for iterations in args.iterations:
        made = inverted(ranked.model, args.images, iterations)
        name = f"dense inversion, {iterations} iterations"
        sets[name] = {"images": args.images, "told": combined(ranked.told(*made, judge))}
        print(f"{name}: done", flush=True)
    record = {
        "benchmark": "rankings",
        "model": args.model,
        "patches": info.num_patches,
        "kept": args.kept,
        "draws": DRAWS,
        "sets": sets,
        "environment": environment(ranked.model.device),
    }
    print(f"written to {write_result(args.out, f'rankings-{args.model}', record)}")


if __name__ == "__main__":
    main()
