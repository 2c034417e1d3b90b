#!/usr/bin/env python
"""Train the two networks that ship inside the package, on CIFAR-10, and one that does not.

    python scripts/train_embedded.py teacher --data DIR --out smi/assets
    python scripts/train_embedded.py judge   --data DIR --out smi/assets
    python scripts/train_embedded.py whole   --data DIR --out whole

`teacher` is a timm ``VisionTransformer`` (32 x 32, patch 4, width 192, depth 6, 3 heads): the network that the demo
inverts. `judge` is a timm ``ResNet`` (one basic block a stage): another architecture, another seed, never used in
inversion, which is asked afterwards what it sees in the synthetic images. `whole` is a second teacher, the same but for
its training, in which it saw all patches of every image: the shipped one is used to having half of them missing. It is
written as a folder of timm's, ``local-dir:whole`` for `smi`.

``--data`` is either a folder with ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` or any folder, in which case
``--download`` lets torchvision fetch the original CIFAR-10 into it. Training can be interrupted: the state after the
last finished epoch lies in ``--work`` and the same command goes on from there.

Writes ``<name>_cifar10.safetensors`` (float16; of `whole` timm's own files), ``<name>_cifar10.json`` (data, recipe,
seed, versions and the top-1 accuracy of the float16 weights on the 10,000 test images), and, but for `whole`,
``MODEL_CARD.md`` from all such JSON files in that folder; ``python scripts/train_embedded.py card --out smi/assets``
does only the last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from smi.embedded import CLASSES, MEAN, STD, build_judge, build_teacher


@dataclass(frozen=True)
class Recipe:
    """What, with the seed and the data, determines the weights up to floating-point rounding."""

    epochs: int
    batch_size: int
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    crop_padding: int
    cutout: int
    patch_drop: tuple[tuple[float, float], ...]  # (from this fraction of the run on, share of patches dropped)
    seed: int


RECIPES = {
    "teacher": Recipe(12, 256, 2e-3, 2e-3, 0.05, 0.06, 0.1, 4, 0, ((0.0, 0.5), (0.6, 0.25), (0.85, 0.0)), seed=1),
    "whole": Recipe(5, 256, 2e-3, 2e-3, 0.05, 0.06, 0.1, 4, 0, ((0.0, 0.0),), seed=1),
    "judge": Recipe(8, 256, 4e-3, 4e-3, 0.05, 0.1, 0.1, 4, 8, (), seed=2),
}
BUILDERS = {"teacher": build_teacher, "whole": build_teacher, "judge": build_judge}


def load_split(root: Path, split: str, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 32, 32) and int64 labels (N,) of one split, cached as one tensor file beside the images."""
    cache = root / f"packed-{split}.safetensors"
    if cache.exists():
        packed = safetensors.torch.load_file(cache)
        return packed["images"], packed["labels"]
    if (root / split).is_dir():
        source = torchvision.datasets.ImageFolder(str(root / split))
    else:
        source = torchvision.datasets.CIFAR10(str(root), train=split == "train", download=download)
    images = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image, _ in source])
    labels = torch.tensor([label for _, label in source])
    safetensors.torch.save_file({"images": images.contiguous(), "labels": labels}, cache)
    return images, labels


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor, recipe: Recipe, rng: torch.Generator) -> torch.Tensor:
    """Random shift within a reflected border, random flip and, if asked, one square cut out of each image."""
    B, _, H, W = images.shape
    p = recipe.crop_padding
    padded = F.pad(images, (p, p, p, p), mode="reflect")
    dy = torch.randint(0, 2 * p + 1, (B, 1), generator=rng) + torch.arange(H)
    columns = torch.arange(W).expand(B, W)
    flipped = torch.rand(B, 1, generator=rng) < 0.5
    dx = torch.randint(0, 2 * p + 1, (B, 1), generator=rng) + torch.where(flipped, W - 1 - columns, columns)
    rows = torch.arange(B)[:, None, None]
    out = padded.permute(0, 2, 3, 1)[rows, dy[:, :, None], dx[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if recipe.cutout:
        cy, cx = (torch.randint(0, size, (B, 1), generator=rng) for size in (H, W))
        in_y = (torch.arange(H) - cy).abs() < recipe.cutout / 2
        in_x = (torch.arange(W) - cx).abs() < recipe.cutout / 2
        out.masked_fill_((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0)
    return out


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, biases, norms, convolutions and the head."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    ]
    if hidden:
        result.append(
            torch.optim.Muon(
                hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return result


def lr_scale(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        (model(normalise(x)).argmax(1) == y).sum().item()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train(name: str, recipe: Recipe, data: Path, work: Path, download: bool, compile_: bool) -> tuple[nn.Module, dict]:
    torch.manual_seed(recipe.seed)
    train_images, train_labels = load_split(data, "train", download)
    test_images, test_labels = load_split(data, "test", download)
    model = BUILDERS[name]().to(memory_format=torch.channels_last)
    for block in getattr(model, "blocks", []):
        block.attn.fused_attn = False  # measured on 2 CPU cores at 33 tokens: 0.65 s a step instead of 0.93
    opts = optimizers(model, recipe)
    base = [group["lr"] for opt in opts for group in opt.param_groups]
    forward = torch.compile(model, dynamic=False) if compile_ else model
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"{name}.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        first, seconds = saved["epoch"], saved["seconds"]
        print(f"resuming after epoch {first}", flush=True)

    steps = len(train_images) // recipe.batch_size
    for epoch in range(first, recipe.epochs):
        rng = torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch)
        torch.manual_seed(1_000_003 * recipe.seed + epoch)
        if recipe.patch_drop:
            rate = [share for start, share in recipe.patch_drop if epoch / recipe.epochs >= start][-1]
            model.patch_drop.prob = rate
        model.train()
        order = torch.randperm(len(train_images), generator=rng)
        began, total = time.perf_counter(), 0.0
        for step in range(steps):
            scale = lr_scale((epoch + step / steps) / recipe.epochs, recipe.warmup)
            for lr, group in zip(base, (g for o in opts for g in o.param_groups), strict=True):
                group["lr"] = lr * scale
            index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = augment(normalise(train_images[index]), recipe, rng).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), train_labels[index], label_smoothing=recipe.label_smoothing)
            loss.backward()
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            total += loss.item()
            if step % 50 == 49:
                spent = time.perf_counter() - began
                print(f"  {step + 1}/{steps} loss {total / (step + 1):.4f} {spent / (step + 1):.2f} s/step", flush=True)
        seconds += time.perf_counter() - began
        test = accuracy(model, test_images[:2000], test_labels[:2000])
        print(
            f"{name} epoch {epoch + 1}/{recipe.epochs} loss {total / steps:.4f} "
            f"first 2,000 test {test:.4f} {seconds:.0f} s",
            flush=True,
        )
        torch.save(
            {
                "model": model.state_dict(),
                "opts": [opt.state_dict() for opt in opts],
                "epoch": epoch + 1,
                "seconds": seconds,
            },
            checkpoint.with_suffix(".tmp"),
        )
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    card = {
        "name": f"{name}_cifar10",
        "architecture": BUILDERS[name].__doc__.splitlines()[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "CIFAR-10 (Krizhevsky, 2009), 50,000 training images",
        "recipe": asdict(recipe),
        "training_seconds": round(seconds),
        "training_hardware": f"CPU, {torch.get_num_threads()} threads, bfloat16 autocast",
        "test_images": len(test_labels),
        "test_top1": accuracy(model, test_images, test_labels),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    return model, {"card": card, "weights": half}


def model_card(folder: Path) -> str:
    """Markdown for people, made from the JSON cards of a folder."""
    lines = [
        "# The embedded networks",
        "",
        "Made by `scripts/train_embedded.py`, which writes this page from the JSON files beside it. The weights are",
        "float16; accuracy is that of these float16 weights, computed in float32 on the 10,000 test images.",
        "",
        "The teacher is what the demo inverts. The judge is of another architecture, trained apart from another seed,",
        "and never used in an inversion: it is asked afterwards what it sees in the images. Both exist to make the",
        "package testable and its demo self-contained; they are no classifiers to build on. CIFAR-10 is 32 x 32 pixels",
        "and ten classes; nothing about larger models follows from them.",
    ]
    for path in sorted(folder.glob("*_cifar10.json"), reverse=True):
        card = json.loads(path.read_text())
        recipe = ", ".join(f"{key} {value}" for key, value in card["recipe"].items())
        lines += [
            "",
            f"## {card['name'].removesuffix('_cifar10')}",
            "",
            f"- Architecture: {card['architecture']} {card['parameters']:,} parameters, {card['bytes']:,} bytes.",
            f"- **Test top-1: {card['test_top1']:.2%}** on {card['test_images']:,} images.",
            f"- Data: {card['data']}, stored as JPEG. Normalised with mean {MEAN}, std {STD}.",
            f"- Recipe: {recipe}.",
            f"- Training: {card['training_hardware']}, {card['training_seconds']:,} s (other work ran beside it), "
            f"torch {card['versions']['torch']}, timm {card['versions']['timm']}.",
            f"- SHA-256: `{card['sha256']}`",
        ]
    return "\n".join([*lines, ""])


def save_for_timm(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """`weights` of `build_teacher` as a folder that timm reads by name; the file they are in."""
    shape = {"img_size": 32, "patch_size": 4, "depth": 6}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(CLASSES), **shape)
    model.load_state_dict(weights)
    data = {"tag": "whole", "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": MEAN, "std": STD}
    names = {"label_names": list(CLASSES)}
    timm.models.save_for_hf(
        model, folder, model_config={"pretrained_cfg": data, **names}, model_args=shape, safe_serialization=True
    )
    return folder / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*sorted(RECIPES), "card"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("training"))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step (needs a C++ compiler)")
    args = parser.parse_args()

    if args.name == "card":
        (args.out / "MODEL_CARD.md").write_text(model_card(args.out))
        return
    recipe = RECIPES[args.name]
    if args.epochs:
        recipe = Recipe(**{**asdict(recipe), "epochs": args.epochs})
    _, result = train(args.name, recipe, args.data, args.work, args.download, args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name == "whole":
        path = save_for_timm(result["weights"], args.out)
    else:
        path = args.out / f"{args.name}_cifar10.safetensors"
        safetensors.torch.save_file(result["weights"], path)
    card = {**result["card"], "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (args.out / f"{args.name}_cifar10.json").write_text(json.dumps(card, indent=2) + "\n")
    if args.name != "whole":
        (args.out / "MODEL_CARD.md").write_text(model_card(args.out))
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
