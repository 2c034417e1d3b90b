"""Few bits: exact weights, ranges of the right activations, of kept patches alone, and files that say the same."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pools import make_result, open_writer
from small import CLASSES, PATCH, N, one_thread, tiny  # noqa: F401
from test_cli import Call, call  # noqa: F401
from torch import Tensor

import smi
from smi import embedded, quantization
from smi.adapters.timm import SparseModel
from smi.adapters.timm_quantize import TokenModel
from smi.calibration import Calibration, from_folder, from_noise, from_pool
from smi.errors import SmiError
from smi.pool import Pool
from smi.quantization import Quantized, _prepare
from smi.quantizer import MseObserver, PercentileObserver, Scheme, VitQuantizer
from smi.refinement import Refinement
from smi.state import WorkPlan
from smi.weights import weights_hash


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def pool(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """24 images of which two patches of 16 are kept, in batches of 6; dropped patches hold large values."""
    path = tmp_path_factory.mktemp("quantize") / "pool"
    info, plan = SparseModel(model, backend="reference").info, WorkPlan(tuple(i % CLASSES for i in range(24)), 6)
    writer = open_writer(path, info=info, plan=plan)
    for batch in writer.missing:
        result = make_result(batch, info, plan)
        writer.write(batch, dataclasses.replace(result, images=with_dropped(result.images, result.keep, 50.0)))
    return Pool(path)


def with_dropped(images: Tensor, keep: Tensor, value: float) -> Tensor:
    """A copy in which every pixel of the patches that are not in `keep` is `value`."""
    images = images.clone()
    side = images.shape[-1] // PATCH
    for image, row in zip(images, keep.tolist(), strict=True):
        for patch in set(range(side * side)) - set(row):
            y, x = PATCH * (patch // side), PATCH * (patch % side)
            image[:, y : y + PATCH, x : x + PATCH] = value
    return images


@pytest.fixture(scope="module")
def made(model: Any, pool: Pool) -> Quantized:
    return smi.quantize(model, from_pool(pool))


def batches(calibration: Calibration) -> list[tuple[Tensor, Tensor]]:
    return [(images, cells) for images, cells in calibration.read() if cells is not None]


def float_layers(quantized: Quantized) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, integers and scales of every weight in the converted graph, in the order of the layers."""
    graph: Any = quantized.model.run
    layers = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    names = [weight.name for weight in quantized.weights]
    nodes = [node for node in graph.graph.nodes if node.target in layers]
    assert len(nodes) == len(names)
    for name, node in zip(names, nodes, strict=True):
        whole, scale = node.args[1].args[:2]
        yield name, getattr(graph, whole.target), getattr(graph, scale.target)


# --- what is quantized ---


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_weights_are_round_to_nearest(model: Any, pool: Pool, made: Quantized, bits: int) -> None:
    quantized = made if bits == 8 else smi.quantize(model, from_pool(pool), weights=bits)
    state = {name: value.double() for name, value in model.state_dict().items()}
    expected_names = [n for n, v in state.items() if n.endswith("weight") and v.ndim > 1]
    assert [weight.name for weight in quantized.weights] == expected_names
    top = {8: 127, 4: 7, 3: 3}[bits]
    for name, whole, scale in float_layers(quantized):
        rows = state[name].flatten(1)
        step = rows.abs().amax(1) / top
        assert whole.dtype == torch.int8
        torch.testing.assert_close(scale.double(), step, rtol=1e-6, atol=0)
        assert torch.equal(whole.flatten(1).double(), (rows / step[:, None]).round()), name
        assert whole.abs().max() == top
        error = next(weight.error for weight in quantized.weights if weight.name == name)
        near = whole.flatten(1).double() * step[:, None]
        assert error == pytest.approx(float((near - rows).norm() / rows.norm()), rel=1e-4)


def test_a_twelve_block_deit_has_127_published_sites_and_12_softmax_outputs() -> None:
    tokens = TokenModel(timm.create_model("deit_tiny_patch16_224", img_size=32))
    whole = VitQuantizer(Scheme())
    _prepare(tokens, whole, sparse=False)
    kinds = [site.kind for site in whole.sites]
    assert len(kinds) == len(whole.observers) == 139
    assert kinds.count("softmax") == 12
    assert len(whole.weights) == 1 + 12 * 4 + 1
    block = [site.name.removeprefix("blocks.7.") for site in whole.sites if site.name.startswith("blocks.7.")]
    assert block == [
        *("norm1", "attn.qkv", "attn.scores", "attn.softmax", "attn.context", "attn.proj", "residual1"),
        *("norm2", "mlp.act", "mlp.fc2", "residual2"),
    ]
    rest = {site.name for site in whole.sites if not site.name.startswith("blocks.")}
    assert rest == {
        *("input", "patch_embed.proj", "embed.tokens", "embed.position", "embed.sum", "head.input", "head"),
    }


@pytest.mark.parametrize(
    ("skip", "sites", "weights"),
    [
        (("softmax",), 27, 10),
        (("residual",), 25, 10),
        (("head",), 27, 9),
        (("first",), 27, 9),
        (("first", "head"), 25, 8),
        (("linear",), 23, 10),
    ],
)
def test_kinds_can_be_skipped(model: Any, skip: tuple[str, ...], sites: int, weights: int) -> None:
    quantizer = VitQuantizer(Scheme(skip=skip))
    prepared = _prepare(TokenModel(model), quantizer, sparse=True)
    assert (len(quantizer.sites), len(quantizer.weights)) == (sites, weights)
    observers = [module for module in prepared.children() if hasattr(module, "calculate_qparams")]
    assert len(observers) == sites + weights
    assert not {site.kind for site in quantizer.sites} & set(skip)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True, "qk_norm": True, "init_values": 0.3},
        {"pre_norm": True, "drop_rate": 0.5, "attn_drop_rate": 0.5},
    ],
)
def test_relatives_of_the_plain_model(options: dict[str, Any]) -> None:
    """Every product reads quantized values, whatever norms and scales stand around it."""
    model = tiny(**options)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cells = torch.tensor([[3, 9, 0], [15, 2, 7]])
    tokens = TokenModel(model)
    with torch.no_grad():
        expected, _ = SparseModel(model, backend="reference")(images, cells)
        torch.testing.assert_close(tokens(images), model(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens(images, cells), expected, rtol=1e-4, atol=1e-4)
    quantizer = VitQuantizer(Scheme())
    _prepare(tokens, quantizer, sparse=True)
    names = {site.name for site in quantizer.sites}
    wanted = {"attn.scores", "attn.softmax", "attn.context", "residual1", "residual2", "mlp.act"}
    assert {f"blocks.{i}.{name}" for i in range(2) for name in wanted} <= names
    if "qk_norm" in options:
        assert {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "blocks.0.ls1", "blocks.0.ls2"} <= names


def test_a_model_of_one_channel_is_read_again(tmp_path: Path) -> None:
    """Of which timm's data config has three means."""
    model = tiny(depth=1, in_chans=1)
    info = SparseModel(model, backend="reference").info
    made = smi.quantize(model, from_noise(info, images=8))
    made.save(tmp_path / "q")
    again = smi.load_quantized(tmp_path / "q")
    assert again.info == info and tuple(again.data["mean"]) == info.mean and tuple(again.data["std"]) == info.std
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(again(images), made.model(images))


def test_a_distilled_model_quantizes_both_heads() -> None:
    quantizer = VitQuantizer(Scheme())
    tokens = TokenModel(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3))
    _prepare(tokens, quantizer, sparse=False)
    assert quantizer.weights[-2:] == ["head.weight", "head_dist.weight"]
    assert len({site.name for site in quantizer.sites}) == len(quantizer.sites)


# --- ranges ---


def hooked(model: Any, calibration: Calibration) -> dict[str, tuple[float, float]]:
    """Smallest and largest activations of the float model on the fed patches, by site, from another sparse path."""
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.act")]
    names += [f"blocks.{i}.mlp.fc2" for i in range(2)] + ["blocks.0", "blocks.1", "norm"]
    sparse = SparseModel(model, backend="reference")
    sparse.watch(names)
    seen: dict[str, list[Tensor]] = {}
    for images, cells in batches(calibration):
        with torch.no_grad():
            logits, _ = sparse(images, cells)
        found = sparse.features
        for i in range(2):
            qkv = found[f"blocks.{i}.attn.qkv"].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).double()
            scores = qkv[0] @ qkv[1].mT / qkv.shape[-1] ** 0.5
            found[f"blocks.{i}.attn.scores"], found[f"blocks.{i}.attn.softmax"] = scores, scores.softmax(-1)
            found[f"blocks.{i}.attn.context"] = scores.softmax(-1) @ qkv[2]
            found[f"blocks.{i}.residual2"] = found.pop(f"blocks.{i}")
        found |= {"head": logits, "head.input": found.pop("norm")[:, 0], "embed.position": model.pos_embed}
        found["input"] = torch.stack([patches(image)[row] for image, row in zip(images, cells, strict=True)])
        for name, value in found.items():
            seen.setdefault(name, []).append(value.flatten())
    return {name: (torch.cat(v).min().item(), torch.cat(v).max().item()) for name, v in seen.items()}


def patches(image: Tensor) -> Tensor:
    """(C, H, W) -> (N, C, P, P)."""
    return image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)


def test_ranges_are_those_of_the_float_activations(model: Any, pool: Pool, made: Quantized) -> None:
    calibration = from_pool(pool)
    assert (calibration.images, len(calibration.held_out), calibration.sparse) == (22, 2, True)
    assert [cells.shape for _, cells in batches(calibration)] == [(6, 2), (6, 2), (6, 2), (4, 2)]
    expected = hooked(model, calibration)
    assert len(expected) == 24
    sites = {site.name: site for site in made.sites}
    for name, (low, high) in expected.items():
        site = sites[name]
        assert (site.smallest, site.largest) == (pytest.approx(low, rel=1e-4, abs=1e-5), pytest.approx(high, rel=1e-4))
        low, high = min(low, 0.0), max(high, 0.0)
        assert site.scale == pytest.approx((high - low) / 255, rel=1e-4)
        assert abs(site.zero_point + low / site.scale) <= 0.51


def altered(calibration: Calibration, of_dropped: bool) -> Calibration:
    """With other pixels in the patches that are dropped, or in those that are kept."""

    def read() -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, cells in batches(calibration):
            rest = torch.stack([torch.tensor([n for n in range(N) if n not in row]) for row in cells.tolist()])
            yield with_dropped(images, cells if of_dropped else rest, -1e6), cells

    return dataclasses.replace(calibration, read=read)


def test_dropped_patches_do_not_influence_the_ranges(model: Any, pool: Pool, made: Quantized) -> None:
    assert smi.quantize(model, altered(from_pool(pool), of_dropped=True)).sites == made.sites
    assert smi.quantize(model, altered(from_pool(pool), of_dropped=False)).sites != made.sites
    assert max(abs(site.largest) for site in made.sites if site.name == "input") < 49 < 50, "of dropped patches"


def test_a_filled_pool_feeds_all_patches(pool: Pool) -> None:
    calibration = from_pool(pool, fill="as-is", images=10)
    assert (calibration.sparse, calibration.images, len(calibration.held_out)) == (False, 10, 2)
    read = list(calibration.read())
    assert all(cells is None for _, cells in read)
    assert sum(len(images) for images, _ in read) == 10
    assert max(images.max().item() for images, _ in read) == 50.0
    mean = next(from_pool(pool, fill="mean").read())[0]
    assert mean.max().item() < 49


def test_errors_are_those_of_each_tensor_alone(model: Any, pool: Pool, made: Quantized) -> None:
    site = next(site for site in made.sites if site.name == "input")
    fed = torch.cat(
        [
            patches(image)[row]
            for images, cells in batches(from_pool(pool))
            for image, row in zip(images, cells, strict=True)
        ]
    ).double()
    near = ((fed / site.scale).round() + site.zero_point).clamp(0, 255).sub(site.zero_point) * site.scale
    assert site.error == pytest.approx(float((near - fed).norm() / fed.norm()), rel=1e-3)
    four = smi.quantize(model, from_pool(pool), activations=4)
    pairs = list(zip(four.sites, made.sites, strict=True))
    assert all(coarse.error > 4 * fine.error for coarse, fine in pairs)


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_ranges(bits: int) -> None:
    values = torch.cat((torch.randn(20000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0, -25.0])))
    options = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 2**bits - 1}
    clipped, best = PercentileObserver(**options), MseObserver(**options)
    for observer in (clipped, best):
        observer(values)
    tail = values.sort().values[[2, -3]]  # 0.01 % of 20002 on either side
    low, high = clipped._non_linear_param_search()
    assert (float(low), float(high)) == (pytest.approx(float(tail[0]), abs=0.1), pytest.approx(float(tail[1]), abs=0.1))

    def error(low: float, high: float) -> float:
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        return float((((values / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step - values).square().sum())

    tries = {a: error(-25 * a, 40 * a) for a in np.linspace(0.2, 1, 81)}
    found = [float(end) for end in best._non_linear_param_search()]
    assert error(*found) <= 1.02 * min(tries.values())
    assert (found[1] < 20) is (bits == 4), "few levels are worth more in the middle"


@pytest.mark.parametrize("observer", [PercentileObserver, MseObserver])
def test_more_values_than_float32_counts_one_by_one_are_all_counted(observer: Any) -> None:
    """As many as attention of large images has near 0, and one in a thousand far from it."""
    values = torch.zeros(2**24 + 2**23)
    values[::1000] = torch.linspace(0.5, 1, len(values[::1000]))
    one = observer(dtype=torch.uint8, quant_min=0, quant_max=255)
    assert one(values) is values
    assert float(one.histogram.double().sum()) == pytest.approx(len(values), rel=1e-6)
    assert (float(one.min_val), float(one.max_val)) == (0, 1)


# --- the network ---


def test_more_bits_are_closer(model: Any, pool: Pool, made: Quantized) -> None:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    with torch.no_grad():
        exact = model(images)
        errors = []
        for bits in (8, 6, 4, 3):
            one = made if bits == 8 else smi.quantize(model, from_pool(pool), weights=bits, activations=bits)
            errors.append(float((one.model(images) - exact).norm() / exact.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.2 and errors[2] > 2 * errors[0]


def test_the_callers_model_stays_as_it_was(made: Quantized, model: Any, pool: Pool) -> None:
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = weights_hash(model), [getattr(m, "fused_attn", None) for m in model.modules()]
    numbers = torch.get_rng_state()
    smi.quantize(model, from_pool(pool), weights=4, refine=Refinement(steps=1))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert (weights_hash(model), [getattr(m, "fused_attn", None) for m in model.modules()]) == before
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert all(p.requires_grad for p in model.parameters())


def test_files_say_the_same_bits(made: Quantized, tmp_path: Path) -> None:
    record = made.save(tmp_path / "q")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.pt2", "q", "quantization.json"]
    assert json.loads((tmp_path / "q/quantization.json").read_text()) == json.loads(json.dumps(record))
    images = torch.randn(33, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    for path in (tmp_path / "q", tmp_path / "q/model.pt2"):
        again = smi.load_quantized(path)
        assert again.info == made.info
        with torch.no_grad():
            for some in (images, images[:1]):
                assert torch.equal(again(some), made.model(some))
    assert record["agreement"] == {"images": 2, "model.pt2": 1.0}
    assert record["scheme"] == {"weights": 8, "activations": 8, "observer": "minmax", "skip": ()}
    assert record["calibration"]["fed"] == "kept patches" and record["calibration"]["images"] == 22
    assert len(record["sites"]) == 29 and len(record["weights"]) == 10
    size = (tmp_path / "q/model.pt2").stat().st_size
    assert record["bytes"] == {"float32": 4 * sum(v.numel() for v in tiny().state_dict().values()), "model.pt2": size}


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "class_token": False, "global_pool": "avg"}], ids=str)
def test_dequantizing_later_changes_no_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = tiny(**options), torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = from_noise(SparseModel(network, backend="reference").info, images=8)
    late = smi.quantize(network, noise).model
    monkeypatch.setattr(quantization, "_dequantized_by_layers", lambda graph: graph)
    early = smi.quantize(network, noise).model
    orders = [[str(node.target) for node in model.run.graph.nodes] for model in (late, early)]  # type: ignore[attr-defined]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    with torch.no_grad():
        assert torch.equal(late(images), early(images)) and torch.equal(late(images[:1]), early(images[:1]))


def test_no_float_weight_is_left_in_the_file(made: Quantized) -> None:
    graph: Any = made.model.run
    assert not any(
        value.is_floating_point() and value.ndim > 1
        for name, value in graph.state_dict().items()
        if (name.endswith("weight"))
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_says_the_same(
    model: Any, pool: Pool, made: Quantized, tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operator by operator the same logits; onnxruntime's integer kernels round otherwise, and are only compared."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    one = made if bits == 8 else smi.quantize(model, from_pool(pool), weights=4, activations=4)
    monkeypatch.setattr(quantization, "AGREEMENT", 0.0)  # random weights put images between classes
    record = one.save(tmp_path / "q", onnx=True)
    assert set(record["agreement"]) == {"images", "model.pt2", "model.onnx"}
    kinds = [node.op_type for node in onnx.load(tmp_path / "q/model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") >= 28
    assert kinds.count("Clip") == (0 if bits == 8 else kinds.count("QuantizeLinear"))
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        here = one.model(images)
    for level in (runtime.GraphOptimizationLevel.ORT_DISABLE_ALL, runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC):
        options = runtime.SessionOptions()
        options.graph_optimization_level = level
        session = runtime.InferenceSession(tmp_path / "q/model.onnx", options, providers=["CPUExecutionProvider"])
        there = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert ((there - here).abs().amax(1) < 1e-4).float().mean() > 0.9, level
    default = smi.load_quantized(tmp_path / "q/model.onnx")(images)
    assert float((default - here).norm() / here.norm()) < (0.05 if bits == 8 else 0.2)


def test_a_file_that_says_something_else_is_not_kept(made: Quantized, tmp_path: Path) -> None:
    class Other(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return -made.model(images)

    made.save(tmp_path / "right")
    other = dataclasses.replace(made, model=smi.QuantizedModel(Other(), made.info, made.data, {}))
    with pytest.raises(SmiError, match=r"model\.pt2 agrees with the network in memory on 0\.0% of 2 images"):
        other._agreement(tmp_path / "right/model.pt2")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(SmiError, match="already exists"):
        made.save(taken)
    with pytest.raises(SmiError, match="already exists"):
        made.save(taken, overwrite=True)
    (tmp_path / "right/note.txt").write_text("mine")
    with pytest.raises(SmiError, match=r"holds 'note\.txt' beside an earlier quantization"):
        made.save(tmp_path / "right", overwrite=True)
    assert (tmp_path / "right/note.txt").read_text() == "mine"
    (tmp_path / "right/note.txt").unlink()
    made.save(tmp_path / "right", overwrite=True)


# --- calibration and input that cannot be used ---


def test_noise_and_folders(model: Any, tmp_path: Path) -> None:
    info = SparseModel(model, backend="reference").info
    noise = from_noise(info, images=10, batch_size=4, seed=3)
    assert [len(images) for images, _ in noise.read()] == [4, 4, 2]
    assert torch.equal(next(noise.read())[0], next(from_noise(info, images=40, batch_size=4, seed=3).read())[0])
    assert not (noise.held_out[:1] == next(noise.read())[0]).any()
    for i in range(30):
        (tmp_path / f"{i // 10}").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i // 10}/{i:02d}.png")

    def red(picture: Any) -> Tensor:
        return torch.full((1, 1, 1), float(picture.getpixel((0, 0))[0]))

    folder = from_folder(tmp_path, red)
    seen = torch.cat([images for images, _ in folder.read()]).flatten().tolist()
    held = folder.held_out.flatten().tolist()
    assert sorted(seen + held) == list(range(30))
    assert len(held) == 3 and {int(number) // 10 for number in held} == {0, 1, 2}
    assert len({int(number) // 10 for number in next(from_folder(tmp_path, red, images=9).read())[0].flatten()}) == 3
    (tmp_path / "0/00.png").write_bytes(b"no picture")
    with pytest.raises(SmiError, match="a picture cannot be read"):
        list(from_folder(tmp_path, red).read())
    with pytest.raises(SmiError, match="there is no folder"):
        from_folder(tmp_path / "none", red)


def test_too_few_images(pool: Pool, model: Any, tmp_path: Path) -> None:
    info = SparseModel(model, backend="reference").info
    with pytest.raises(SmiError, match="7 images are to calibrate; expected at least 8"):
        from_pool(pool, images=7)
    with pytest.raises(SmiError, match="has 24 images; expected at least 25: 24 to calibrate and one to compare on"):
        from_pool(pool, images=24)
    with pytest.raises(SmiError, match="2 images of noise are to calibrate; expected at least 8"):
        from_noise(info, images=2)
    small = open_writer(tmp_path / "small", info=info, plan=WorkPlan((0,) * 6, 6))
    small.write(0, make_result(0, info, small.plan))
    with pytest.raises(SmiError, match="has 6 images; expected at least 9: 8 to calibrate"):
        from_pool(tmp_path / "small")


def test_models_that_do_not_fit(pool: Pool, model: Any) -> None:
    with pytest.raises(SmiError, match=r"made from a model with weights \w{12}, .* has \w{12}"):
        smi.quantize(tiny(seed=8), from_pool(pool))
    with pytest.raises(SmiError, match=r"have shape \(3, 16, 16\); .* takes \(3, 32, 32\)"):
        smi.quantize(tiny(img_size=32), dataclasses.replace(from_pool(pool), weights_sha256=None))
    with pytest.raises(SmiError, match="cannot be quantized: expected a timm VisionTransformer"):
        smi.quantize(timm.create_model("test_resnet"), from_pool(pool))
    with pytest.raises(SmiError, match="Eva rotates queries and keys"):
        TokenModel(timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 1}, "weights are to have 1 bits; expected 2 to 8"),
        ({"activations": 16}, "activations are to have 16 bits"),
        ({"observer": "min-max"}, "unknown observer 'min-max'. Did you mean 'minmax'"),
        ({"skip": ("heads",)}, "unknown kind of site 'heads' to skip. Did you mean 'head'"),
    ],
)
def test_unusable_schemes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SmiError, match=message):
        Scheme(**options)


def test_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    monkeypatch.delitem(sys.modules, "smi.quantizer")
    with pytest.raises(SmiError, match=r"quantization needs torchao.*sparse-model-inversion\[quantize\]"):
        importlib.import_module("smi.quantizer")


def test_unreadable_files(made: Quantized, tmp_path: Path) -> None:
    with pytest.raises(SmiError, match="is not a quantized model"):
        smi.load_quantized(tmp_path)
    made.save(tmp_path / "q")
    (tmp_path / "q/model.pt2").write_bytes(b"half")
    with pytest.raises(SmiError, match=r"model\.pt2' cannot be read: .*Make it again"):
        smi.load_quantized(tmp_path / "q")
    record = tmp_path / "q/quantization.json"
    record.write_text(record.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(SmiError, match="has format version 2"):
        smi.load_quantized(tmp_path / "q")


# --- command ---


def test_commands(call: Call, tmp_path: Path) -> None:  # noqa: F811
    """The embedded teacher on noise: written, read again, evaluated on a folder of pictures."""
    out = tmp_path / "q"
    code, said, err = call("quantize", "--noise", "8", "--skip", "softmax,head", "--out", out)
    assert (code, err) == (0, "")
    assert "quantized   65 activations, 25 weights" in said
    assert "agreement   model.pt2: 100.0% of 32 images held out" in said
    draw = np.random.default_rng(0)
    for name in embedded.CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "data" / name / "0.png")
    code, said, err = call("evaluate", out, "--data", tmp_path / "data", "--json")
    assert (code, err) == (0, "")
    assert (json.loads(said)["images"], json.loads(said)["classes"]) == (10, 10)
    for words in (["--checkpoint", "x.pth"], ["--num-classes", 0], ["--img-size", 64], ["--no-pretrained"]):
        code, said, err = call("evaluate", out, "--data", tmp_path / "data", *words)
        assert (code, said) == (2, "") and f"a quantized model is complete in itself; leave out {words[0]}" in err


def test_command_errors_are_one_line(call: Call, pool: Pool, tmp_path: Path) -> None:  # noqa: F811
    out = ["--out", tmp_path / "q"]
    for words, message in (
        (["--noise", "8"], "name a new folder with --out"),
        (out, "nothing to calibrate on; give exactly one of"),
        ([*out, "--noise", "8", "--pool", pool.path], "--pool and --noise to calibrate on"),
        ([*out, "--noise", "8", "--fill", "mean"], "--fill mean goes with --pool alone"),
        ([*out, "--noise", "8", "--images", "16"], "--images 16 goes with --pool and --folder"),
        ([*out, "--noise", "8", "--backend", "cpu"], "--backend cpu is for inversion"),
        ([*out, "--noise", "8", "--device", "cuda"], "quantization runs on the CPU alone"),
        ([*out, "--noise", "3"], "3 images of noise are to calibrate"),
        ([*out, "--pool", tmp_path / "none"], "there is no pool"),
        ([*out, "--pool", pool.path], "was made from a model with weights"),
        ([*out, "--noise", "8", "--weights", "9"], "weights are to have 9 bits"),
        ([*out, "--noise", "8", "--skip", "heads"], "Did you mean 'head'"),
        (["resnet18", "--no-pretrained", *out, "--noise", "8"], "not supported: expected a timm VisionTransformer"),
    ):
        code, said, err = call("quantize", *words)
        assert (code, said) == (2, ""), words
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "q").exists()


def test_what_cannot_be_written_is_told_before_the_calibration(
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "quantize", lambda *_, **__: pytest.fail("calibrated"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--out", tmp_path], "already exists; choose another folder, or replace"),
        (["--out", tmp_path, "--overwrite"], "already exists; choose another folder."),
        (["--out", tmp_path / "file" / "q"], "Not a directory; choose a folder that you may write to"),
        (["--out", tmp_path / "new" / "q", "--onnx"], "onnxscript cannot be imported"),
    ):
        code, said, err = call("quantize", "--noise", "8", *words)
        assert (code, said) == (2, "") and message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
