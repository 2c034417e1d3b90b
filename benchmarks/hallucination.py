#!/usr/bin/env python
"""Does sparse inversion suppress spurious backgrounds? The second claim of Hu et al., ICML 2024, put to a test.

    python -m benchmarks.hallucination --work hallucination

A drawn data set: six shapes, on backgrounds whose colour and stripes go with the shape in most training images; in so
many that the network learns from both (of --matched 0.9 it learns the background alone). A small Vision Transformer
learns it, and is inverted densely, sparsely, and with patches chosen at random. The images are then looked at twice:

- A reader, a network taught to name shape and background apart where neither tells of the other, says how often the
  shape and how often the background of the class can be seen in them.
- A linear classifier on the reader's features, which hold both, learns the class from the images alone, and is asked
  about shapes on matched backgrounds, on backgrounds drawn at random, and on those of another class: what is lost
  between the first and the others is how much it relies on the background. The foreground of every test image is
  known, so attention and gradient outside it can be counted too.

Of sparse images both see the kept patches alone. Pools and networks are kept under --work; the same command goes on
after an interruption. Writes one JSON file and one PNG under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from benchmarks.agreement import ROWS
from benchmarks.timing import RESULTS, environment, write_result
from smi.files import atomic_write
from smi.given import as_inverted
from smi.run import run

SHAPES = ("disc", "ring", "square", "cross", "triangle", "bars")
CLASSES, SIDE, PATCH = len(SHAPES), 32, 4
TESTS = ("matched", "shifted", "conflicting")
BASE = smi.Config(
    iterations=200,
    prune_at=(20, 40, 60, 80),
    prune_ratio=(0.3, 0.3, 0.3, 0.3),
    jitter="pixel",
    learning_rate=0.1,
    tv2=5e-3,
    batch_size=60,
    snapshots=0,
)


class Drawing(NamedTuple):
    """Pixels (B, 3, 32, 32) in [0, 1], labels (B,), classes of the backgrounds (B,), foreground (B, 32, 32) bool."""

    pixels: Tensor
    labels: Tensor
    grounds: Tensor
    foreground: Tensor


def draw(count: int, seed: int, matched: float, conflicting: bool = False) -> Drawing:
    """`count` images.

    Args:
        matched: share of the images whose background is that of their class; the others' is of any class.
        conflicting: the others' is of any class but their own.
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *more, generator=rng)

    labels = torch.randint(CLASSES, (count,), generator=rng)
    other = (labels + torch.randint(1 if conflicting else 0, CLASSES, (count,), generator=rng)) % CLASSES
    kind = torch.where(uniform(0, 1) < matched, labels, other)

    axis = torch.linspace(-1, 1, SIDE)
    rows, columns = axis.view(1, -1, 1), axis.view(1, 1, -1)
    size, turn = uniform(0.3, 0.5).view(-1, 1, 1), uniform(-0.35, 0.35).view(-1, 1, 1)
    down, right = (
        (rows - uniform(-0.4, 0.4).view(-1, 1, 1)) / size,
        (columns - uniform(-0.4, 0.4).view(-1, 1, 1)) / size,
    )
    y, x = turn.cos() * down - turn.sin() * right, turn.sin() * down + turn.cos() * right
    far, radius = torch.maximum(x.abs(), y.abs()), (x * x + y * y).sqrt()
    masks = torch.stack(
        [
            radius < 1,
            (radius < 1) & (radius > 0.55),
            far < 0.85,
            (torch.minimum(x.abs(), y.abs()) < 0.3) & (far < 1),
            (y < 0.8) & (x.abs() < (y + 0.9) / 1.7),
            ((y.abs() - 0.6).abs() < 0.25) & (x.abs() < 1),
        ]
    )
    foreground = masks[labels, torch.arange(count)]

    hue = (kind / CLASSES + uniform(-0.04, 0.04)).view(-1, 1)
    colour = 0.5 + 0.3 * torch.cos(2 * math.pi * (hue - torch.tensor([0.0, 1 / 3, 2 / 3])))
    angle = (math.pi * kind / CLASSES).view(-1, 1, 1)
    phase = 6 * math.pi * (columns * angle.cos() + rows * angle.sin()) + uniform(0, 2 * math.pi).view(-1, 1, 1)
    background = colour[..., None, None] + 0.12 * phase.sin()[:, None]
    shape = uniform(0, 1, 3)[..., None, None].expand(-1, -1, SIDE, SIDE)
    pixels = torch.where(foreground[:, None], shape, background)
    pixels = pixels + 0.03 * torch.randn(pixels.shape, generator=rng)
    return Drawing(pixels.clamp(0, 1), labels, kind, foreground)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - 0.5) / 0.25


def network(classes: int = CLASSES, dropped: float = 0.0) -> VisionTransformer:
    """A small Vision Transformer; in training, `dropped` is the share of patches it does not see."""
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=classes,
        patch_drop_rate=dropped,
    )
    model.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": "drawn-shapes",
        "input_size": (3, SIDE, SIDE),
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        **({"label_names": SHAPES} if classes == CLASSES else {}),
    }
    return model


def teacher(work: Path, steps: int, matched: float) -> VisionTransformer:
    """The network that has learnt the shapes of drawn images."""

    def loss(model: nn.Module, drawn: Drawing) -> Tensor:
        return F.cross_entropy(model(normalised(drawn.pixels)), drawn.labels, label_smoothing=0.05)

    return _taught(network, loss, work / "teacher.safetensors", steps, matched, 1_000_000)


def reader(work: Path, steps: int) -> VisionTransformer:
    """The network that has learnt shapes (its first six logits) and backgrounds (the others), each for itself.

    Half of the patches are hidden from it in training, as they are in the images it has to read.
    """

    def loss(model: nn.Module, drawn: Drawing) -> Tensor:
        shape, ground = model(normalised(drawn.pixels)).split(CLASSES, dim=1)
        return F.cross_entropy(shape, drawn.labels) + F.cross_entropy(ground, drawn.grounds)

    return _taught(lambda: network(2 * CLASSES, 0.5), loss, work / "reader.safetensors", steps, 0.0, 4_000_000)


def _taught(
    build: Callable[[], VisionTransformer],
    loss: Callable[[nn.Module, Drawing], Tensor],
    file: Path,
    steps: int,
    matched: float,
    first: int,
) -> VisionTransformer:
    """A network trained on drawings numbered from `first` on, from the file of an earlier call if there is one."""
    torch.manual_seed(0)
    model = build()
    if not file.is_file():
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        for step in range(steps):
            rate = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = 1e-3 * rate
            value = loss(model, draw(128, first + step, matched))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if step % 100 == 0:
                print(f"{file.stem}: step {step} of {steps}, loss {value.item():.3f}", flush=True)
        atomic_write(file, save(model.state_dict()))
    model.load_state_dict(load_file(file))
    return model.eval()


def pool(row: str, seed: int, model: smi.SparseModel, images: int, work: Path, matched: float) -> smi.Pool:
    """Images of a row: inverted ones, or drawn ones with what the teacher says of them."""
    config = BASE.replace(seed=seed, **ROWS.get(row, ROWS["dense"])).resolved()
    plan = smi.WorkPlan.balanced(range(CLASSES), images, config.batch_size, CLASSES)
    folder = work / "pools" / f"{row.replace(' ', '-')}-{seed}"
    if row in ROWS:
        run(model, plan, config, folder)
        return smi.Pool(folder)
    writer = smi.PoolWriter(folder, model.info, config, plan, device=model.where)
    drawn = draw(20 * images, 2_000_000 + seed, matched)
    for batch in writer.missing:
        numbers = plan.batch(batch)
        chosen = torch.stack([(drawn.labels == plan.targets[i]).nonzero()[i // CLASSES, 0] for i in numbers])
        given = as_inverted(normalised(drawn.pixels[chosen]), drawn.labels[chosen], numbers, model, config.iterations)
        writer.write(batch, given)
    return smi.Pool(folder)


@torch.no_grad()
def legible(images: smi.Pool, expert: smi.SparseModel) -> dict[str, float]:
    """How often the reader sees the shape, and how often the background, of an image's class in its kept patches."""
    seen = dict.fromkeys(("shape", "ground"), 0)
    for result in images:
        logits, _ = expert.feed(result.images, result.keep)
        for name, part in zip(seen, logits.split(CLASSES, dim=1), strict=True):
            seen[name] += int((part.argmax(1) == result.targets).sum())
    return {name: count / len(images) for name, count in seen.items()}


@torch.no_grad()
def reading(expert: smi.SparseModel, tests: int) -> dict[str, float]:
    """How often the reader is right about new drawings of which it sees all patches, or a quarter."""
    drawn, patches = draw(tests, 3_000_002, 0.0), expert.info.num_patches
    quarter = torch.rand(tests, patches, generator=torch.Generator().manual_seed(0)).argsort(1)[:, : patches // 4]
    found: dict[str, float] = {}
    for name, keep in (("", None), (" in a quarter", quarter.sort(1).values)):
        shape, ground = expert.feed(normalised(drawn.pixels), keep)[0].split(CLASSES, dim=1)
        found[f"shape{name}"] = (shape.argmax(1) == drawn.labels).float().mean().item()
        found[f"ground{name}"] = (ground.argmax(1) == drawn.grounds).float().mean().item()
    return found


def probed(images: smi.Pool, backbone: VisionTransformer, folder: Path, epochs: int, seed: int) -> VisionTransformer:
    """The reader with a classifier that has learnt the teacher's word for these images."""
    torch.manual_seed(seed)
    student = network()
    weights = {name: value for name, value in backbone.state_dict().items() if not name.startswith("head.")}
    student.load_state_dict(weights, strict=False)
    found = smi.teach(student, images, folder, smi.TransferConfig(epochs=epochs, batch_size=32, seed=seed))
    student.load_state_dict(load_file(found.path / "student.safetensors"))
    return student


def examined(model: VisionTransformer, tests: int) -> dict[str, float]:
    """Accuracy on every test, and how much of what the network looks at lies outside the shape."""
    model.eval()
    found: dict[str, float] = {}
    for name in TESTS:
        drawn = draw(tests, 3_000_000, float(name == "matched"), name == "conflicting")
        with torch.no_grad():
            said = torch.cat([model(part).argmax(1) for part in normalised(drawn.pixels).split(250)])
        found[name] = (said == drawn.labels).float().mean().item()
    drawn = draw(200, 3_000_001, 0.0)
    images = normalised(drawn.pixels)
    attention = smi.SparseModel(model, backend="reference").feed(images, scores=True)[1]
    assert attention is not None
    cells = attention.view(-1, SIDE // PATCH, SIDE // PATCH)
    found["attention_outside"] = share_outside(cells, drawn.foreground)
    found["gradient_outside"] = share_outside(gradient(model, images, drawn.labels), drawn.foreground)
    return found


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W): magnitude of the derivative of the label's logit, added up over the channels."""
    images = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(images).gather(1, labels[:, None]).sum(), images)
    magnitude: Tensor = found.abs().sum(1)
    return magnitude


def share_outside(mass: Tensor, foreground: Tensor) -> float:
    """Mean share of `mass` (B, h, w) outside the foreground, over the share if it were spread evenly.

    1 is that of something that looks anywhere, 0 of what looks at the shape alone.
    """
    outside = F.adaptive_avg_pool2d((~foreground).float()[:, None], mass.shape[-2:])[:, 0]
    shares = (mass * outside).sum((1, 2)) / mass.sum((1, 2)) / outside.mean((1, 2))
    return shares.mean().item()


def plot(record: dict[str, Any], path: Path) -> None:
    """Left, what the reader sees in the images; right, how a classifier taught by them does on the tests."""
    from matplotlib import pyplot as plt

    panels = {
        "seen in the images by a reader": {"shape": "shape of the class", "ground": "background of the class"},
        "top-1 of a classifier taught by them": {
            "matched": "matched background",
            "shifted": "any background",
            "conflicting": "another class's",
        },
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(keys)
        for number, (key, label) in enumerate(keys.items()):
            at = [place + (number - (len(keys) - 1) / 2) * width for place in range(len(record["rows"]))]
            values = [[100 * found[key] for found in row] for row in record["rows"].values()]
            axis.bar(at, [statistics.mean(v) for v in values], width, label=label)
            for place, found in zip(at, values, strict=True):
                axis.plot([place] * len(found), found, "k.", markersize=3)
        axis.axhline(100 / CLASSES, color="grey", linestyle=":", label="chance")
        axis.set_title(title)
        axis.set_xticks(range(len(record["rows"])), [name.replace(" ", "\n", 1) for name in record["rows"]])
        axis.legend(fontsize="small")
    axes[0].set_ylabel("% of images; a dot for every seed")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for networks and pools")
    parser.add_argument("--images", type=int, default=480, help="a row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--matched", type=float, default=0.6, help="share of training images with their class's ground")
    parser.add_argument("--steps", type=int, default=1500, help="of the teacher's training")
    parser.add_argument("--reader-steps", type=int, default=3000, help="of the reader's")
    parser.add_argument("--epochs", type=int, default=60, help="of a classifier's")
    parser.add_argument("--tests", type=int, default=2000, help="images of each test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("images", "matched", "steps", "reader_steps", "epochs", "tests")}
    known = args.work / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != settings:
        raise smi.SmiError(f"{str(args.work)!r} holds networks of other settings; choose another --work.")
    atomic_write(known, json.dumps(settings).encode())
    source, backbone = teacher(args.work, args.steps, args.matched), reader(args.work, args.reader_steps)
    model = smi.SparseModel(source, name="drawn-shapes")
    expert = smi.SparseModel(backbone, name="reader", backend="reference")
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for row in ("drawn images", *ROWS):
            images = pool(row, seed, model, args.images, args.work, args.matched)
            student = probed(images, backbone, args.work / "students" / images.path.name, args.epochs, seed)
            rows.setdefault(row, []).append(legible(images, expert) | examined(student, args.tests))
            print(f"seed {seed}: {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[row][-1].items()), flush=True)
    record = {
        "benchmark": "hallucination",
        **settings,
        "seeds": args.seeds,
        "config": BASE.to_dict(),
        "teacher": examined(source, args.tests),
        "reader": reading(expert, args.tests),
        "rows": rows,
        "environment": environment(model.device),
    }
    print(f"teacher: {record['teacher']}")
    path = write_result(args.out, "hallucination", record)
    plot(record, path.with_suffix(".png"))
    print(f"written to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
