"""A Vision Transformer in few bits, calibrated without its data: torchao's PT2E flow around `smi.quantizer`.

OUT/model.pt2             the converted program, for ``torch.export.load``
OUT/model.onnx            on request, with QuantizeLinear and DequantizeLinear
OUT/quantization.json     model, scheme, sites with their ranges and errors, calibration, agreement, sizes, versions
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import operator
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smi._version import __version__
from smi.calibration import Calibration
from smi.errors import SmiError
from smi.evaluation import data_config
from smi.files import put_folder, read_bytes, temp_folder, writing
from smi.pool import build, check_plan
from smi.quantization_file import load_program
from smi.state import ModelInfo, WorkPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smi.adapters.timm_quantize import TokenModel
    from smi.quantizer import Observer, Scheme
    from smi.refinement import Refinement

FORMAT, FORMAT_VERSION = "smi-quantization", 1
RECORD, PROGRAM, ONNX = "quantization.json", "model.pt2", "model.onnx"
# Of a file with the network it was made of; below, it is not kept. Noise lies between classes, where the order of a sum
# decides how an activation is rounded, and that which class is ahead.
AGREEMENT, AGREEMENT_ON_NOISE = 0.99, 0.9
_BATCH, _LARGEST_RECORD = 32, 1 << 26  # images, bytes


@dataclass(frozen=True)
class SiteReport:
    """One quantized activation.

    Attributes:
        name, kind: see `smi.quantizer`.
        smallest, largest: value that was seen on the calibration images.
        scale, zero_point: an integer q stands for (q - zero_point) scale.
        error: of quantizing this tensor alone, relative (Frobenius norms), over all calibration images.
    """

    name: str
    kind: str
    smallest: float
    largest: float
    scale: float
    zero_point: int
    error: float


@dataclass(frozen=True)
class WeightReport:
    """One quantized weight; `error` as for a site."""

    name: str
    shape: tuple[int, ...]
    error: float


class QuantizedModel(nn.Module):
    """Logits (B, classes) of images (B, C, H, W) float32, normalised; on the CPU.

    Attributes:
        info: the model that it was made of.
        data: timm's data config of that model.
        record: what ``quantization.json`` says.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], info: ModelInfo, data: dict[str, Any], record: dict[str, Any]):
        super().__init__()
        self.run, self.info, self.data, self.record = run, info, data, record
        self.training = False

    def train(self, mode: bool = True) -> QuantizedModel:
        """Changes nothing: a converted program has no other mode, and says so by an exception."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.run(images)
        return logits


def check_out(out: str | Path, *, onnx: bool = False, overwrite: bool = False) -> Path:
    """`out`, absolute, where `Quantized.save` may write; asked before a calibration whose result would be lost.

    Raises:
        SmiError: as `Quantized.save`, but for full disks and files that disagree.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out) and not (overwrite and (out / RECORD).is_file()):
        mend = "choose another folder" + ("" if overwrite else ", or replace an earlier quantization with overwrite")
        raise SmiError(f"{str(out)!r} already exists; {mend}.")
    if out.is_symlink():
        raise SmiError(f"{str(out)!r} is a link, which is not replaced; name the folder that it leads to.")
    foreign = sorted(set(os.listdir(out)) - {RECORD, PROGRAM, ONNX}) if out.is_dir() else []
    if foreign:
        raise SmiError(
            f"{str(out)!r} holds {foreign[0]!r} beside an earlier quantization and is not replaced; choose another "
            f"folder."
        )
    with writing(out):
        os.rmdir(tempfile.mkdtemp(dir=next(folder for folder in out.parents if os.path.lexists(folder))))
    if onnx:
        from smi.quantization_onnx import check_packages

        check_packages()
    return out


@dataclass(frozen=True)
class Quantized:
    """A quantized network in memory.

    Attributes:
        model: (B, C, H, W) float32 -> (B, classes) float32, on the CPU.
        info, data: identity of the float model and its data config.
        scheme: bits, observer, skipped kinds.
        sites, weights: what was quantized, with errors, in order.
        calibration: what it was calibrated on.
        float_bytes: of the float model's parameters and buffers, in float32.
        refinement: how it was trained and what that changed, for the record; None where it was not.
    """

    model: QuantizedModel
    info: ModelInfo
    data: dict[str, Any]
    scheme: Scheme
    sites: list[SiteReport]
    weights: list[WeightReport]
    calibration: Calibration
    float_bytes: int
    refinement: dict[str, Any] | None = None

    def save(self, out: str | Path, *, onnx: bool = False, overwrite: bool = False) -> dict[str, Any]:
        """Write the new folder `out`, after each file has been read again and compared on the images held out.

        An image agrees if the file's most probable class is the most probable one in memory; of equal logits, which few
        bits make common, any.

        Returns:
            The record, as in ``quantization.json``.

        Raises:
            SmiError: `out` exists, or holds more than the quantization to replace, or cannot be written; onnx or
                onnxscript is missing; a file agrees with the network in memory on less than 99 % of the images (90 % of
                noise).
        """
        out = check_out(out, onnx=onnx, overwrite=overwrite)
        with writing(out, self.float_bytes * (2 if onnx else 1)), temp_folder(out) as temp:
            record = self._write(temp, onnx)
            put_folder(temp, out, replace=overwrite)
        return record

    def _write(self, folder: Path, onnx: bool) -> dict[str, Any]:
        example = torch.zeros(2, *self.info.input_size)  # kept in the file, so no image of anyone's
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1, max=2**16)
            program = torch.export.export(self.model.run, (example,), dynamic_shapes=({0: batch},))  # type: ignore[arg-type]
            packed = io.BytesIO()  # torch's own writing of files tells of a full disk by no OSError
            torch.export.save(program, packed)
        (folder / PROGRAM).write_bytes(packed.getbuffer())
        files = [PROGRAM]
        if onnx:
            from smi.quantization_onnx import save_onnx

            save_onnx(program, example, folder / ONNX)
            files.append(ONNX)
        agreement = {file: self._agreement(folder / file) for file in files}
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": asdict(self.info),
            "data": self.data,
            "scheme": asdict(self.scheme),
            "calibration": {**self.calibration.source, "images": self.calibration.images},
            "refinement": self.refinement,
            "sites": [asdict(site) for site in self.sites],
            "weights": [asdict(weight) for weight in self.weights],
            "agreement": {"images": len(self.calibration.held_out), **agreement},
            "bytes": {"float32": self.float_bytes, **{file: (folder / file).stat().st_size for file in files}},
            "versions": {
                "smi": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "torchao", "timm")},
            },
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        return record

    def _agreement(self, file: Path) -> float:
        run, agree = _open(file), 0
        with torch.no_grad():
            for images in self.calibration.held_out.split(_BATCH):
                here, there = self.model(images), run(images)
                agree += int((here.gather(1, there.argmax(1)[:, None])[:, 0] == here.amax(1)).sum())
        share = agree / len(self.calibration.held_out)
        expected = AGREEMENT_ON_NOISE if self.calibration.source["kind"] == "noise" else AGREEMENT
        if share < expected:
            raise SmiError(
                f"{file.name} agrees with the network in memory on {share:.1%} of {len(self.calibration.held_out)} "
                f"images; expected at least {expected:.0%}. It was not kept; try other versions of torch, torchao and "
                f"onnxruntime."
            )
        return share


@torch.random.fork_rng(devices=())  # torchao draws numbers here and there, and the caller's stream is the caller's
def quantize(
    model: nn.Module,
    calibration: Calibration,
    *,
    weights: int = 8,
    activations: int = 8,
    observer: Observer = "minmax",
    skip: Sequence[str] = (),
    refine: Refinement | None = None,
    name: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Post-training quantization; see `smi.quantizer.Scheme` for bits, observers and what can be skipped.

    Args:
        model: a timm ``VisionTransformer``; copied, not modified.
        calibration: from `smi.calibration`: ``from_pool``, ``from_folder``, ``from_noise``.
        refine: train the quantized network on the calibration images, see `smi.refinement`; for 4 bits and fewer, from
            ranges of the ``mse`` observer. None trains nothing.
        name: for the record; default the timm architecture name.
        on_batch: called with the images done and in all; each counts twice, once for ranges and once for errors.
        on_step: called with the steps of the refinement done and in all.

    Raises:
        SmiError: unsupported model, images made for another model, no such scheme, torchao missing, or the refinement
            diverges.
    """
    from smi.adapters.timm import SparseModel
    from smi.adapters.timm_quantize import TokenModel
    from smi.quantizer import Scheme, VitQuantizer

    scheme = Scheme(weights, activations, observer, tuple(skip))
    tokens = TokenModel(model)
    info = SparseModel(model, name=name, device="cpu", backend="reference").info
    made_for = calibration.weights_sha256
    if made_for is not None and made_for != info.weights_sha256:
        raise SmiError(
            f"the pool was made from a model with weights {made_for[:12]}, {info.name} has {info.weights_sha256[:12]}; "
            f"make a pool from this model, or name the pool's own with its checkpoint."
        )
    if calibration.held_out.shape[1:] != info.input_size:
        raise SmiError(
            f"the calibration images have shape {tuple(calibration.held_out.shape[1:])}; {info.name} takes "
            f"{info.input_size}. Make images of that size."
        )
    quantizer = VitQuantizer(scheme)
    observed = _prepare(tokens, quantizer, calibration.sparse)
    done = _feed(observed, calibration, 0, on_batch)
    seen = {name: (float(one.min_val), float(one.max_val)) for name, one in quantizer.observers.items()}
    ranges, refined = quantizer.observers, None
    if refine is not None:
        ranges, refined = _refine(tokens, scheme, ranges, calibration, refine, on_step)
        observed = _prepare(tokens, VitQuantizer(scheme, ranges), calibration.sparse)
    meters = _with_meters(observed, ranges)
    _feed(observed, calibration, done, on_batch)

    final = VitQuantizer(scheme, ranges)
    prepared = _prepare(tokens, final, sparse=False)
    if [site.name for site in final.sites] != [site.name for site in quantizer.sites]:
        raise RuntimeError("the graphs of whole images and of some patches differ in their sites")
    reports = _observe_weights(prepared)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = _dequantized_by_layers(_without_float_weights(convert_pt2e(prepared)))
    data = data_config(model)
    sites = [_site_report(site, seen[site.name], ranges[site.name], meters[site.name]) for site in quantizer.sites]
    held = [*tokens.vit.parameters(), *tokens.vit.buffers()]
    float_bytes = sum(value.numel() * 4 for value in held)
    network = QuantizedModel(converted, info, data, {})
    return Quantized(network, info, data, scheme, sites, reports, calibration, float_bytes, refined)


def load_quantized(path: str | Path) -> QuantizedModel:
    """The network that `Quantized.save` wrote: a folder (its ``model.pt2``), or one of its model files.

    Raises:
        SmiError: no such file, damaged, of a newer version, torchao (for ``.pt2``) or onnxruntime missing.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / PROGRAM if path.is_dir() else path
    try:
        record = json.loads(read_bytes(folder / RECORD, _LARGEST_RECORD))
        if record.get("format") != FORMAT or not file.is_file():
            raise FileNotFoundError
    except (OSError, ValueError, AttributeError, RecursionError):
        raise SmiError(
            f"{str(path)!r} is not a quantized model; expected a folder that smi quantize has written, with {PROGRAM} "
            f"and {RECORD}."
        ) from None
    if record.get("format_version") != FORMAT_VERSION:
        raise SmiError(
            f"{str(path)!r} has format version {record.get('format_version')}; this program reads 1. Upgrade."
        )
    try:
        info = build(ModelInfo, record["model"])
        check_plan(info, WorkPlan((0,), 1))
        data = {key: tuple(value) if isinstance(value, list) else value for key, value in record["data"].items()}
        if data["input_size"] != info.input_size or {len(data[key]) for key in ("mean", "std")} != {len(info.mean)}:
            raise ValueError("data is of another input")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SmiError(f"{str(folder / RECORD)!r} is damaged ({error}); make it again with smi quantize.") from None
    return QuantizedModel(_open(file), info, record["data"], record)


def is_quantized(path: str | Path) -> bool:
    """Whether `path` names something that `load_quantized` should read, rather than a model."""
    path = Path(path)
    return path.suffix in (".pt2", ".onnx") or (path / RECORD).is_file()


def _open(file: Path) -> Callable[[Tensor], Tensor]:
    if file.suffix == ".onnx":
        from smi.quantization_onnx import load_onnx

        return load_onnx(file)
    from smi import quantizer  # which registers the operators of the file, or says that torchao is missing

    assert quantizer
    try:
        return load_program(file)
    except Exception as error:  # a zip archive, JSON and pickles can each be damaged in ways of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SmiError(f"{str(file)!r} cannot be read: {reason}. Make it again with smi quantize.") from error


def _prepare(tokens: TokenModel, quantizer: Any, sparse: bool) -> Any:
    """The exported network with observers in it, of images alone or of images and cells."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

    embed = tokens.vit.patch_embed
    N = embed.num_patches
    images = torch.zeros(3, embed.proj.in_channels, *embed.img_size)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example: tuple[Tensor, ...] = (images,)
    shapes: dict[str, Any] = {"images": {0: batch}}
    if sparse:
        kept = torch.export.Dim("kept", min=1, max=max(N, 2))
        example = (images, torch.arange(min(max(N - 1, 2), N)).expand(3, -1).contiguous())
        shapes["cells"] = {0: batch, 1: kept}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its guards would refuse a single kept patch, for which the traced operations hold as well.
        graph = torch.export.export(tokens, example, dynamic_shapes=shapes).module(check_guards=False)
        return prepare_qat_pt2e(graph, quantizer) if quantizer.training else prepare_pt2e(graph, quantizer)


def _feed(prepared: Any, calibration: Calibration, done: int, on_batch: Callable[[int, int], None] | None) -> int:
    """Run all images through `prepared`, for what its observers or meters make of them. Returns how many are done."""
    with torch.no_grad():
        for images, cells in calibration.read():
            prepared(images) if cells is None else prepared(images, cells)
            done += len(images)
            if on_batch is not None:
                on_batch(done, 2 * calibration.images)
    return done


def _with_meters(prepared: Any, observers: dict[str, Any]) -> dict[str, _Meter]:
    """Put a meter in the place of each observer; by name of the site."""
    names = {id(observer): name for name, observer in observers.items()}
    meters: dict[str, _Meter] = {}
    for place, module in list(prepared.named_children()):
        if id(module) in names:
            meters[names[id(module)]] = meter = _Meter(module)
            setattr(prepared, place, meter)
    return meters


def _refine(
    tokens: TokenModel,
    scheme: Scheme,
    ranges: dict[str, Any],
    calibration: Calibration,
    options: Refinement,
    on_step: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the weights of `tokens` from these ranges. Returns observers that say the learned ones, and the record."""
    from smi.quantizer import VitQuantizer, learned_observer
    from smi.refinement import refine

    quantizer = VitQuantizer(scheme, ranges, training=True)
    prepared = _prepare(tokens, quantizer, calibration.sparse)
    found = refine(tokens, prepared, quantizer.learned, calibration, options, on_step)
    learned = {name: learned_observer(one) for name, one in quantizer.learned.items()}
    return learned, {"method": "qat", **asdict(options), "divergence": asdict(found)}


class _Meter(nn.Module):
    """In place of a calibrated observer: passes values on and adds up what quantizing them would change."""

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.range = observer.quant_min, observer.quant_max
        self.wrong = self.all = 0.0

    def forward(self, x: Tensor) -> Tensor:
        near = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.range)
        self.wrong += float((near - x).double().square().sum())
        self.all += float(x.double().square().sum())
        return x

    @property
    def error(self) -> float:
        return float((self.wrong / max(self.all, 1e-30)) ** 0.5)


def _observe_weights(prepared: Any) -> list[WeightReport]:
    """Show each weight to its observer; activations have been observed before, and see nothing here."""
    reports = []
    for node in prepared.graph.nodes:
        if node.op != "call_module" or not node.args or node.args[0].op != "get_attr":
            continue
        source = node.args[0]
        observer = prepared.get_submodule(node.target)
        if not hasattr(observer, "ch_axis"):
            continue  # the position embedding, which is an activation here
        weight = operator.attrgetter(str(source.target))(prepared).detach()
        observer(weight)
        scale, zero_point = observer.calculate_qparams()
        near = torch.fake_quantize_per_channel_affine(
            weight, scale, zero_point.to(torch.int32), 0, observer.quant_min, observer.quant_max
        )
        error = float((near - weight).norm() / weight.norm().clamp_min(1e-30))
        reports.append(WeightReport(str(source.target).removeprefix("vit."), tuple(weight.shape), error))
    return reports


def _without_float_weights(graph: Any) -> Any:
    """Drop what no node reads any more: conversion leaves the float weights behind, and export would save them."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*graph.named_parameters(), *graph.named_buffers()) if name not in read]:
        owner, _, own = name.rpartition(".")
        delattr(graph.get_submodule(owner), own)
    return graph


def _dequantized_by_layers(graph: Any) -> Any:
    """Integers become floats right before the linear layer that reads them, not before they are rearranged for it.

    Not a bit changes, and inductor, which looks for integers there, makes integer layers of the projections behind
    attention too.
    """
    aten = torch.ops.aten
    rearranges = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default)
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            continue
        chain, user = [], node
        while len(user.users) == 1 and (user := next(iter(user.users))).target in rearranges:
            chain.append(user)
        if not chain or len(node.users) != 1 or user.target is not aten.linear.default:
            continue
        chain[0].replace_input_with(node, node.args[0])
        user.replace_input_with(chain[-1], node)
        node.replace_input_with(node.args[0], chain[-1])
        chain[-1].append(node)
        for moved in (node, *chain):
            moved.meta.pop("val", None)  # of another dtype or shape now
    graph.graph.lint()
    graph.recompile()
    return graph


def _site_report(site: Any, seen: tuple[float, float], observer: Any, meter: _Meter) -> SiteReport:
    scale, zero_point = observer.calculate_qparams()
    return SiteReport(site.name, site.kind, *seen, float(scale), int(zero_point), meter.error)
