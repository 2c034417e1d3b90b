"""The two small networks that ship inside the package: the teacher that the demo inverts and the judge that looks on.

Both were trained on CIFAR-10 by ``scripts/train_embedded.py``; ``smi/assets/*.json`` are their model cards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def build_teacher() -> nn.Module:
    """timm VisionTransformer, 32 x 32, patch 4 (64 patches), width 192, depth 6, 3 heads, class token, 10 classes.

    Weights are freshly initialised, the position embedding as two-dimensional sines and cosines, so that a short
    training need not learn the grid first. Patch dropout is present (training only) with rate 0.5.
    """
    import torch
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=len(CLASSES), patch_drop_rate=0.5
    )
    grid = build_sincos2d_pos_embed([8, 8], dim=192, interleave_sin_cos=False)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat((torch.zeros(1, 192), 0.5 * grid))[None])
    network: nn.Module = model
    return network


def build_judge() -> nn.Module:
    """timm ResNet, one basic block in each of four stages of 32, 64, 128 and 192 channels, 3 x 3 stem, 10 classes."""
    from timm.models.resnet import BasicBlock, ResNet
    from torch import nn

    model: Any = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 128, 192), num_classes=len(CLASSES))
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    network: nn.Module = model
    return network


def load_teacher() -> nn.Module:
    """The trained `build_teacher`, float32, in evaluation mode, with its own data config and ``class_names``."""
    return _load("teacher", build_teacher())


def load_judge() -> nn.Module:
    """The trained `build_judge`, float32, in evaluation mode. Never use it in an inversion: it is the witness."""
    return _load("judge", build_judge())


def _load(name: str, model: Any) -> nn.Module:
    from importlib.resources import as_file, files

    from safetensors.torch import load_file

    with as_file(files("smi") / "assets" / f"{name}_cifar10.safetensors") as path:
        model.load_state_dict(load_file(path))
    model.pretrained_cfg = {
        "architecture": f"embedded:{name}",
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,  # pictures are 32 x 32: nothing is enlarged, nothing cut off
        "mean": MEAN,
        "std": STD,
        "label_names": CLASSES,
    }
    loaded: nn.Module = model.float().eval()
    return loaded
