#!/usr/bin/env python
"""Does sparse inversion suppress spurious backgrounds? The second claim of Hu et al., ICML 2024, put to a test.

    python -m benchmarks.hallucination --work hallucination

A drawn data set: six shapes, on backgrounds whose colour and stripes go with the shape in most training images; in so
many that the network learns from both (of --matched 0.9 it learns the background alone). A small Vision Transformer
learns it, and is inverted densely, sparsely, and with patches chosen at random. Students taught by these images alone
are asked about shapes on matched backgrounds, on backgrounds drawn at random, and on those of another class: what is
lost between the first and the others is how much they rely on the background. The foreground of every test image is
known, so attention and gradient outside it can be counted too. Pools and networks are kept under --work; the same
command goes on after an interruption. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from benchmarks.agreement import ROWS
from benchmarks.given import as_inverted
from benchmarks.timing import RESULTS, environment, write_result
from smi.files import atomic_write
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


def draw(count: int, seed: int, matched: float, conflicting: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`count` images: pixels (B, 3, 32, 32) in [0, 1], labels (B,), foreground (B, 32, 32) bool.

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
    return pixels.clamp(0, 1), labels, foreground


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - 0.5) / 0.25


def network() -> VisionTransformer:
    model = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=3, num_classes=CLASSES, class_token=True
    )
    model.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": "drawn-shapes",
        "input_size": (3, SIDE, SIDE),
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "label_names": SHAPES,
    }
    return model


def teacher(work: Path, steps: int, matched: float) -> nn.Module:
    """The network that has learnt drawn images, from the file of an earlier call if there is one."""
    torch.manual_seed(0)
    model, file = network(), work / "teacher.safetensors"
    if not file.is_file():
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        for step in range(steps):
            rate = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = 1e-3 * rate
            pixels, labels, _ = draw(128, 1_000_000 + step, matched)
            loss = F.cross_entropy(model(normalised(pixels)), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                print(f"teacher: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
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
    pixels, labels, _ = draw(20 * images, 2_000_000 + seed, matched)
    for batch in writer.missing:
        numbers = plan.batch(batch)
        chosen = torch.stack([(labels == plan.targets[i]).nonzero()[i // CLASSES, 0] for i in numbers])
        images = normalised(pixels[chosen])
        writer.write(batch, as_inverted(images, labels[chosen], numbers, model, config.iterations))
    return smi.Pool(folder)


def examined(model: VisionTransformer, tests: int) -> dict[str, float]:
    """Accuracy on every test, and how much of what the network looks at lies outside the shape."""
    model.eval()
    found: dict[str, float] = {}
    for name in TESTS:
        pixels, labels, _ = draw(tests, 3_000_000, float(name == "matched"), name == "conflicting")
        with torch.no_grad():
            said = torch.cat([model(part).argmax(1) for part in normalised(pixels).split(250)])
        found[name] = (said == labels).float().mean().item()
    pixels, labels, foreground = draw(200, 3_000_001, 0.0)
    images = normalised(pixels)
    attention = smi.SparseModel(model, backend="reference").feed(images, scores=True)[1]
    assert attention is not None
    found["attention_outside"] = share_outside(attention.view(-1, SIDE // PATCH, SIDE // PATCH), foreground)
    found["gradient_outside"] = share_outside(gradient(model, images, labels), foreground)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for networks and pools")
    parser.add_argument("--images", type=int, default=480, help="a row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--matched", type=float, default=0.6, help="share of training images with their class's ground")
    parser.add_argument("--steps", type=int, default=1500, help="of the teacher's training")
    parser.add_argument("--epochs", type=int, default=120, help="of a student's")
    parser.add_argument("--tests", type=int, default=2000, help="images of each test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("images", "matched", "steps", "epochs", "tests")}
    known = args.work / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != settings:
        raise smi.SmiError(f"{str(args.work)!r} holds networks of other settings; choose another --work.")
    atomic_write(known, json.dumps(settings).encode())
    source = teacher(args.work, args.steps, args.matched)
    model = smi.SparseModel(source, name="drawn-shapes")
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for row in ("drawn images", *ROWS):
            config = smi.TransferConfig(
                mode="finetune", epochs=args.epochs, batch_size=32, learning_rate=1e-3, weight_decay=0.05, seed=seed
            )
            torch.manual_seed(seed)
            student = network()
            folder = args.work / "students" / f"{row.replace(' ', '-')}-{seed}"
            found = smi.teach(student, pool(row, seed, model, args.images, args.work, args.matched), folder, config)
            student.load_state_dict(load_file(found.path / "student.safetensors"))
            rows.setdefault(row, []).append(examined(student, args.tests))
            print(f"seed {seed}: {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[row][-1].items()), flush=True)
    record = {
        "benchmark": "hallucination",
        **settings,
        "seeds": args.seeds,
        "config": BASE.to_dict(),
        "teacher": examined(source, args.tests),
        "rows": rows,
        "environment": environment(model.device),
    }
    print(f"teacher: {record['teacher']}")
    print(f"written to {write_result(args.out, 'hallucination', record)}")


if __name__ == "__main__":
    main()
