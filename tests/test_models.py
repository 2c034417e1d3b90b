"""Models by name: what loads, what comes out as it went in, and what is refused before it can run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file
from small import one_thread, randomise  # noqa: F401
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

import smi
from benchmarks.models import FAMILIES, LIMIT, PAGE, Row, measure, page
from smi import SmiError, SparseModel

NAME, SMALL = "vit_tiny_patch16_224", {"num_classes": 3, "img_size": 32}


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`timm.create_model` as ever, but of one narrow block, so that files stay small."""
    create = timm.create_model

    def smaller(name: str, **kwargs: Any) -> nn.Module:
        narrow = {} if ":" in name else {"depth": 1, "embed_dim": 24, "num_heads": 2}
        return create(name, **narrow, **kwargs)

    monkeypatch.setattr(timm, "create_model", smaller)
    return randomise(smaller(NAME, **SMALL))


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_load_without_weights(small_timm: nn.Module) -> None:
    model = smi.load_model(NAME, pretrained=False, num_classes=3, img_size=(32, 48))
    assert not model.training and SparseModel(model).info.input_size == (3, 32, 48)
    assert model.num_classes == 3 and not same_weights(model, small_timm)


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "ema": lambda state: {"model": {name: value + 1 for name, value in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_pth_round_trip(wrapping: str, small_timm: nn.Module, tmp_path: Path) -> None:
    torch.save(WRAPPINGS[wrapping](small_timm.state_dict()), tmp_path / "weights.pth")
    assert same_weights(smi.load_model(NAME, checkpoint=tmp_path / "weights.pth", **SMALL), small_timm)


@pytest.mark.parametrize("wrapping", ["plain", "module"])
def test_safetensors_round_trip(wrapping: str, small_timm: nn.Module, tmp_path: Path) -> None:
    save_file(WRAPPINGS[wrapping](small_timm.state_dict()), tmp_path / "weights.safetensors")
    model = smi.load_model(NAME, checkpoint=str(tmp_path / "weights.safetensors"), **SMALL)
    assert same_weights(model, small_timm) and not model.training


@pytest.mark.parametrize("size", [64, (32, 48)])
@pytest.mark.parametrize("name", [NAME, "deit3_small_patch16_224"])
def test_positions_of_a_checkpoint_are_interpolated(size: Any, name: str, small_timm: Any, tmp_path: Path) -> None:
    """As PyTorch resizes pictures: one of each channel, over the grid of 4 x 4; the class token's stays."""
    saved: Any = randomise(timm.create_model(name, num_classes=3, img_size=64))
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    model: Any = smi.load_model(name, checkpoint=tmp_path / "weights.pth", num_classes=3, img_size=size)
    grid = model.patch_embed.grid_size
    prefix = 0 if saved.no_embed_class else 1
    pictures = saved.pos_embed[0, prefix:].T.reshape(1, 24, 4, 4)
    expected = F.interpolate(pictures, grid, mode="bicubic", antialias=True)[0].flatten(1).T
    assert torch.equal(model.pos_embed[0, :prefix], saved.pos_embed[0, :prefix])
    torch.testing.assert_close(model.pos_embed[0, prefix:], expected)
    if size == 64:
        assert same_weights(model, saved)
    others = [key for key in saved.state_dict() if key != "pos_embed"]
    assert all(torch.equal(model.state_dict()[key], saved.state_dict()[key]) for key in others)


def test_positions_that_cannot_be_interpolated(small_timm: Any, tmp_path: Path) -> None:
    state = {**small_timm.state_dict(), "pos_embed": torch.zeros(1, 1 + 6, 24)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(SmiError, match="size mismatch for pos_embed"):
        smi.load_model(NAME, checkpoint=tmp_path / "weights.pth", num_classes=3, img_size=64)
    torch.save(small_timm.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(SmiError, match="size mismatch for pos_embed"):  # of 32 pixels, and no size was asked for
        smi.load_model(NAME, checkpoint=tmp_path / "weights.pth", num_classes=3)


def test_local_dir(small_timm: Any, tmp_path: Path) -> None:
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}
    save_for_hf(small_timm, tmp_path, model_args=arguments, safe_serialization=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model = smi.load_model(f"local-dir:{tmp_path}")
    assert same_weights(model, small_timm)
    with pytest.raises(SmiError, match=r"cannot get the published weights of 'local-dir:.*absent'"):
        smi.load_model(f"local-dir:{tmp_path}/absent")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_checkpoint_of_a_compiled_model(prefix: str, small_timm: nn.Module, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in small_timm.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    assert same_weights(smi.load_model(NAME, checkpoint=tmp_path / "weights.safetensors", **SMALL), small_timm)


def test_checkpoint_with_numbers_for_names(small_timm: nn.Module, tmp_path: Path) -> None:
    torch.save({0: torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(SmiError, match="holds no state dict"):
        smi.load_model(NAME, checkpoint=tmp_path / "weights.pth", **SMALL)


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    trap, modern, old = tmp_path / "trap", tmp_path / "modern.pth", tmp_path / "old.pth"
    torch.save({"model": {"weight": torch.zeros(2)}, "args": Code(trap)}, modern)
    old.write_bytes(pickle.dumps(Code(trap), protocol=2))
    for path in (modern, old):
        with pytest.raises(SmiError, match="would have to run code to load; save its state_dict"):
            smi.load_model(NAME, checkpoint=path)
    assert not trap.exists()


def test_checkpoints_that_do_not_fit(small_timm: nn.Module, tmp_path: Path) -> None:
    def load(state: Any, name: str = "weights.pth") -> nn.Module:
        torch.save(state, tmp_path / name)
        return smi.load_model(NAME, checkpoint=tmp_path / name, **SMALL)

    state = small_timm.state_dict()
    other = r"of another architecture than vit_tiny_patch16_224: "
    with pytest.raises(SmiError, match=other + r"size mismatch for head\.bias.*num_classes"):
        load({**state, "head.bias": torch.zeros(9)})
    with pytest.raises(SmiError, match=other + r"it lacks 'cls_token' \(1 missing, 0 unexpected"):
        load({name: value for name, value in state.items() if name != "cls_token"})
    with pytest.raises(SmiError, match=other + r"it has an unexpected 'dist_token' \(0 missing, 1 unexpected"):
        load({**state, "dist_token": torch.zeros(1)})
    for junk in ({}, [torch.zeros(1)], {"state_dict": {"epoch": 3}}, torch.zeros(2)):
        with pytest.raises(SmiError, match="holds no state dict"):
            load(junk)
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04 and no more")
    for name in ("short.safetensors", "short.pth"):
        with pytest.raises(SmiError, match=f"cannot read the checkpoint '.*{name}'"):
            smi.load_model(NAME, checkpoint=tmp_path / name, **SMALL)
    with pytest.raises(SmiError, match=r"the checkpoint '.*' is a folder; name the file in it"):
        smi.load_model(NAME, checkpoint=tmp_path, **SMALL)
    with pytest.raises(SmiError, match=r"there is no checkpoint '.*absent\.pth'"):
        smi.load_model(NAME, checkpoint=tmp_path / "absent.pth", **SMALL)


def test_names_that_are_not() -> None:
    with pytest.raises(SmiError, match=r"unknown model 'deit_tny_patch16_224'\. Did you mean 'deit_tiny_patch16_224'"):
        smi.load_model("deit_tny_patch16_224")
    with pytest.raises(SmiError, match=r"unknown model 'quantized/w8'; .* hf-hub:quantized/w8, .* quantization\.json"):
        smi.load_model("quantized/w8")
    with pytest.raises(SmiError, match=r"Did you mean 'embedded:teacher'"):
        smi.load_model("embedded:teache")
    with pytest.raises(SmiError, match=r"embedded:judge is complete in itself, weights included; leave out img_size\."):
        smi.load_model("embedded:judge", img_size=0)
    with pytest.raises(SmiError, match=r"leave out num_classes, pretrained=False \(--no-pretrained\)"):
        smi.load_model("embedded:teacher", num_classes=10, pretrained=False)
    with pytest.raises(SmiError, match=r"num_classes is -4; expected the length of the head, or 0 for none"):
        smi.load_model("resnet10t", pretrained=False, num_classes=-4)
    with pytest.raises(SmiError, match=r"resnet10t cannot be created with \{'img_size': 64\}"):
        smi.load_model("resnet10t", pretrained=False, img_size=64)
    for pretrained in (True, False):
        with pytest.raises(SmiError, match=r"no_such_tag"):
            smi.load_model("vit_tiny_patch16_224.no_such_tag", pretrained=pretrained)


# ---- every family


def test_the_page_of_models_is_what_is_so() -> None:
    if Version(timm.__version__) < Version("1.0.31"):
        pytest.skip(f"the page is of timm 1.0.31; {timm.__version__} lacks families, or float64 in some")
    rows = {key: measure(key) for key in FAMILIES}
    for key, row in rows.items():
        assert row.sparse < LIMIT and row.fell, key
        assert row.fused is None or row.fused < LIMIT, key
    assert PAGE.read_text() == page(rows), "run python -m benchmarks.models"


def test_the_page_says_what_fails() -> None:
    row = Row("class attention", 0.02, False, 0.5, ("its head is odd",), "it has no head", "")
    made = page({"vit": row, "deit": replace(row, fused=None), "deit3": replace(row, fused=0.0)})
    lines = [line for line in made.splitlines() if line.startswith("| ")][2:]
    assert (
        lines[0] == "| ViT | `vit_tiny_patch16_224` | class attention | off by 2e-02 | no | off by 5e-01 | no | yes |"
    )
    assert "| no | no | no | yes |" in lines[1] and "| network alone |" in lines[2]
    assert "- ViT, fused: its head is odd." in made and "- ViT, quantize: it has no head." in made
