"""Which Vision Transformers run, and how: every family of timm with random weights, tried and written down.

    python -m benchmarks.models        # docs/models.md

Nothing here is timed. A cell says that something was run and found right, or why it does not run; numbers are compared
in float64, so the page is the same wherever it is made.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import smi
import smi_kernels
import smi_kernels.backends
from smi.adapters.timm_feed import TokenFeed
from smi.adapters.timm_quantize import TokenModel

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
CLASSES, IMAGES = 7, 2
# Of what timm gives, relative, in float64; rounding of this depth makes 1e-15.
LIMIT = 1e-10


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        title: for people.
        name: timm's, of the smallest member.
        options: of ``timm.create_model``, besides `SMALL`.
        resize: input size that the position embeddings are interpolated to after that, or None.
        text: whether classes are embeddings of texts.
    """

    title: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    resize: int | None = None
    text: bool = False


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": CLASSES}
FAMILIES: dict[str, Family] = {
    "vit": Family("ViT", "vit_tiny_patch16_224", {"img_size": 64}),
    "deit": Family("DeiT", "deit_tiny_patch16_224", {"img_size": 64}),
    "deit-distilled": Family("DeiT, distilled", "deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "deit3": Family("DeiT-III", "deit3_small_patch16_224", {"img_size": 64}),
    "resized-384": Family("positions interpolated to 384", "deit_tiny_patch16_224", resize=384),
    "resized-512": Family("positions interpolated to 512", "deit_tiny_patch16_224", resize=512),
    "rectangular": Family("rectangular input", "vit_tiny_patch16_224", {"img_size": (32, 48)}),
    "rectangular-patches": Family(
        "rectangular patches", "vit_tiny_patch16_224", {"img_size": (32, 48), "patch_size": (8, 16)}
    ),
    "patch8": Family("patch 8", "vit_small_patch8_224", {"img_size": 32}),
    "patch32": Family("patch 32", "vit_small_patch32_224", {"img_size": 128}),
    "grey": Family("one channel", "vit_tiny_patch16_224", {"img_size": 64, "in_chans": 1}),
    "dynamic-size": Family("dynamic size", "deit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    "dinov2-registers": Family("registers", "vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2": Family("DINOv2, patch 14", "vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2-giant": Family("DINOv2, SwiGLU", "vit_giant_patch14_dinov2", {"img_size": 56}),
    "gap": Family("mean of patches", "vit_medium_patch16_gap_256", {"img_size": 64}),
    "registers-gap": Family("registers, mean of patches", "vit_medium_patch16_reg4_gap_256", {"img_size": 64}),
    "flexivit": Family("FlexiViT", "flexivit_small", {"img_size": 64}),
    "clip": Family("CLIP, classifier", "vit_base_patch32_clip_224", {"img_size": 128}),
    "clip-quickgelu": Family("CLIP, quick GELU", "vit_base_patch16_clip_quickgelu_224", {"img_size": 64}),
    "clip-text": Family("CLIP, texts", "vit_base_patch32_clip_224", {"img_size": 128, "num_classes": 24}, text=True),
    "siglip": Family("SigLIP, classifier", "vit_base_patch16_siglip_224", {"img_size": 64}),
    "siglip-text": Family(
        "SigLIP, texts", "vit_base_patch16_siglip_224", {"img_size": 64, "num_classes": 0}, text=True
    ),
    "siglip-gap": Family("SigLIP, mean of patches", "vit_base_patch16_siglip_gap_224", {"img_size": 64}),
    "siglip-tanh": Family("SigLIP 2, tanh GELU", "vit_base_patch32_siglip_256", {"img_size": 128}),
    "parallel-blocks": Family("parallel blocks", "vit_small_patch16_18x2_224", {"img_size": 64}),
    "aimv2": Family("AIMv2", "aimv2_large_patch14_224", {"img_size": 56}),
    "dinov3": Family("DINOv3", "vit_small_patch16_dinov3", {"img_size": 64}),
    "eva02": Family("EVA-02", "eva02_tiny_patch14_224", {"img_size": 56}),
    "eva02-dynamic": Family(
        "EVA-02, dynamic size", "eva02_tiny_patch14_224", {"img_size": (28, 56), "dynamic_img_size": True}
    ),
    "eva02-base": Family("EVA-02, base", "eva02_base_patch14_224", {"img_size": 56}),
    "eva-giant": Family("EVA", "eva_giant_patch14_clip_224", {"img_size": 56}),
    "rope-axial": Family("RoPE-ViT, axial", "vit_small_patch16_rope_224", {"img_size": 64}),
    "rope-mixed": Family("RoPE-ViT, mixed", "vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "rope-registers-gap": Family("RoPE-ViT, registers, mean", "vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64}),
    "perception-encoder": Family("Perception Encoder", "vit_pe_core_base_patch16_224", {"img_size": (32, 64)}),
}


def create(key: str, drop: float = 0.0) -> Any:
    """The smallest member, shrunk, in evaluation mode, with random weights that leave no layer without effect.

    Args:
        key: of `FAMILIES`.
        drop: share of patches that timm's own dropout takes out, once it is switched on.
    """
    family = FAMILIES[key]
    model: Any = timm.create_model(family.name, **{**SMALL, **family.options}, patch_drop_rate=drop)
    randomise(model)
    if family.resize is not None:
        model.set_input_size(img_size=family.resize)
    if family.text:
        texts = torch.randn(CLASSES, model.num_classes or model.num_features, generator=_generator(3))
        model = smi.with_text_head(model, texts, logit_scale=10.0, bias=-1.0)
    return model.eval()


def randomise(model: nn.Module, seed: int = 7) -> Any:
    """In place of fresh weights, which have zeros, layer scales of 1e-5 and attention too even to rank by."""
    generator = _generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):
                noise *= 1.5 / math.sqrt(parameter[0].numel())
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.3
            parameter.copy_(noise)
    return model.eval()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Row:
    """What was found of a family.

    Attributes:
        ranking: what patches are ranked by.
        sparse: relative error of logits and pixel gradient of the patches that timm kept, against timm.
        fell: whether the objective of an inversion fell.
        fused: the same errors of the fused operations; None where they do not run the model.
        against: why the fused operations do not invert it.
        quantize, transfer: why not; empty where they do.
    """

    ranking: str
    sparse: float
    fell: bool
    fused: float | None
    against: tuple[str, ...]
    quantize: str
    transfer: str


def measure(key: str) -> Row:
    """Try everything with one family."""
    model = create(key, drop=0.5).double()
    images = _pixels(model)
    expected, cells = _timms_own(model, images)
    sparse = smi.SparseModel(model, **_channels(model))
    reference = smi.SparseModel(model, backend="reference", **_channels(model))
    fused = None
    if not smi_kernels.unsupported_reasons(model):
        vit = smi_kernels.SparseViT.from_timm(model)
        fused = _error(_logits_and_gradient(lambda x: vit(x, cells), images), expected)
    return Row(
        ranking=sparse.info.ranking.replace("_", " "),
        sparse=_error(_logits_and_gradient(lambda x: reference(x, cells)[0], images), expected),
        fell=_inverts(sparse),
        fused=fused,
        against=tuple(_against(model, sparse)),
        quantize=_against_quantizing(model, images, cells, expected[0]),
        transfer="; ".join(TokenFeed.reasons_against(model, sparse.info)),
    )


def _pixels(model: Any) -> Tensor:
    shape = (IMAGES, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=_generator(1), dtype=torch.float64)


def _channels(model: Any) -> dict[str, Any]:
    return {"mean": (0.5,), "std": (0.25,)} if model.patch_embed.proj.in_channels == 1 else {}


def _timms_own(model: Any, images: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Logits and pixel gradient of timm's forward with its patch dropout on, and the patches (B, K) that went on."""
    count = model.patch_embed.num_patches
    model.patch_drop.train()
    model.patch_drop.num_prefix_tokens = model.num_prefix_tokens  # timm's distilled DeiT would drop its second token

    def forward(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        logits: Tensor = model(x)
        return logits

    expected = _logits_and_gradient(forward, images)
    model.patch_drop.eval()
    torch.manual_seed(5)
    order = torch.argsort(torch.randn(IMAGES, count), dim=-1)
    return expected, order[:, : max(1, int(count * (1 - model.patch_drop.prob)))]


def _logits_and_gradient(forward: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_(True)
    logits = forward(x)
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype).sin()
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
    return logits.detach(), gradient


def _error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The greatest difference of an element, over the greatest element."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def _inverts(sparse: smi.SparseModel) -> bool:
    config = smi.Config(iterations=12, prune_at=(3, 6), prune_ratio=(0.3, 0.3), batch_size=2, snapshots=0)
    total = smi.Inversion(sparse, list(range(IMAGES)), config).run().history["total"]
    return bool(total[-1] < total[0])


def _against(model: nn.Module, sparse: smi.SparseModel) -> Iterator[str]:
    """Why inversions do not run on the fused operations, wherever they are run."""
    reasons = smi_kernels.unsupported_reasons(model)
    yield from (reason.replace(" (block 0)", "") for reason in reasons)
    here = smi_kernels.backends.reasons_against(smi_kernels.backends.preferred(sparse.device), sparse.device)
    yield from (reason for reason in sparse.against_kernels if reason not in (*reasons, *here))


def _against_quantizing(model: nn.Module, images: Tensor, cells: Tensor, expected: Tensor) -> str:
    try:
        tokens = TokenModel(model)
    except smi.SmiError as error:
        return str(error).split(": ", 1)[1].split(". Use")[0]
    error = (tokens(images.float(), cells) - expected).abs().max() / expected.abs().max()
    return "" if error < 1e-4 else f"its logits differ by {error.item():.0e}"


def page(rows: dict[str, Row]) -> str:
    """The whole page, from what `measure` found."""
    head = ["family", "timm's smallest", "ranks by", "sparse = timm", "inverts", "fused", "quantize", "transfer"]
    table, notes = [head, ["---"] * len(head)], []
    for key, row in rows.items():
        cells = [_right(row.sparse), _yes(row.fell), _fused(row), _yes(not row.quantize), _yes(not row.transfer)]
        table.append([FAMILIES[key].title, f"`{FAMILIES[key].name}`", row.ranking, *cells])
        reasons = {"fused": "; ".join(row.against), "quantize": row.quantize, "transfer": row.transfer}
        notes += [f"- {FAMILIES[key].title}, {column}: {why}." for column, why in reasons.items() if why]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return "\n\n".join([INTRODUCTION, lines, READING, "## Why not", "\n".join(notes) or "Everything runs."]) + "\n"


def _yes(found: bool) -> str:
    return "yes" if found else "no"


def _right(error: float) -> str:
    return "yes" if error < LIMIT else f"off by {error:.0e}"


def _fused(row: Row) -> str:
    if row.fused is None:
        return "no"
    if not row.fused < LIMIT:
        return _right(row.fused)
    return "network alone" if row.against else "yes"


INTRODUCTION = """# Models

Made by `python -m benchmarks.models`: every family of timm's Vision Transformers, the smallest member by name, shrunk
to two blocks of width 32 and a few patches, with random weights. Larger members that are built alike do what it does;
some are not (EVA-02 from base on, DINOv3 from huge on): `smi doctor MODEL` tells of any one."""

READING = f"""- **sparse = timm**: logits and pixel gradient of the kept half of the patches are those of timm's own
  forward under its own patch dropout, to {LIMIT:g} of the largest, in float64.
- **inverts**: twelve iterations with two prunings ran, and the objective fell.
- **fused**: the fused operations (Triton, compiled, or their references) give the same logits and gradient, to the same
  error. *network alone*: `smi_kernels.SparseViT` and `accelerate` run it; inversions run on timm's modules.
- **quantize**: the network can be taken apart for `smi quantize`, whole and with kept patches alone, and gives timm's
  logits to 1e-4 in float32.
- **transfer**: as the student of `smi transfer` it can be fed the kept patches alone; any network can be fed all.

The width of a head may be up to 128 on the fused operations. Convolutional and windowed networks (Swin, MViT, ...) need
the whole grid and are refused with that reason.

Another input size: `smi.load_model(name, img_size=384)`, on the command line `--img-size 384`, interpolates the
position embeddings of published weights and of your own checkpoint; `model.set_input_size(img_size=384)` of timm does
it to a model that is there. A text tower's embeddings as classes: `smi.with_text_head(model, text_embeddings)`."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="file to write (default docs/models.md)")
    args = parser.parse_args(argv)
    args.out.write_text(page({key: measure(key) for key in FAMILIES}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
