"""The ``smi evaluate`` and ``smi quantize`` commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from smi.cli_options import ModelOptions
from smi.cli_progress import progress, size
from smi.errors import SmiError

if TYPE_CHECKING:
    from smi.calibration import Calibration
    from smi.pool import Pool


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """What `smi evaluate` takes; the model may also be what `smi quantize` wrote."""

    data: Annotated[
        str, typer.Option("--data", "-d", help="cifar10:PATH, cifar100:PATH, imagenet:PATH, or a folder of classes.")
    ] = ""
    download: Annotated[bool, typer.Option("--download", help="Fetch cifar10 or cifar100.", show_default=False)] = False
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="At most so many images.", min=1, show_default=False)
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images together.", min=1)] = 64
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Another model in the same run, in turns.", show_default=False),
    ] = None
    compile: Annotated[
        bool, typer.Option("--compile", help="Through inductor; it takes a while before it starts.", show_default=False)
    ] = False
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", show_default=False)] = False

    def __post_init__(self) -> None:
        _without_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(ModelOptions):
    """What `smi quantize` takes."""

    pool: Annotated[
        Path | None, typer.Option("--pool", help="Calibrate on this pool: the kept patches.", show_default=False)
    ] = None
    fill: Annotated[
        str | None,
        typer.Option(
            "--fill", help="Feed all patches of the pool, dropped ones as-is, black, mean or noise.", show_default=False
        ),
    ] = None
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Calibrate on the pictures below this folder.", show_default=False)
    ] = None
    noise: Annotated[
        int | None, typer.Option("--noise", help="Calibrate on so many images of noise.", show_default=False)
    ] = None
    images: Annotated[
        int | None,
        typer.Option("--images", "-n", help="Calibrate on so many. Default: all but a tenth.", show_default=False),
    ] = None
    weights: Annotated[int, typer.Option("--weights", "-w", help="Bits of weights, 2 to 8.")] = 8
    activations: Annotated[int, typer.Option("--activations", "-a", help="Bits of activations, 2 to 8.")] = 8
    observer: Annotated[str, typer.Option("--observer", help="Range of activations: minmax, percentile or mse.")] = (
        "minmax"
    )
    skip: Annotated[
        str,
        typer.Option(
            "--skip", metavar="LIST", help="Leave in float: first, head, residual, softmax, scores, norm, ..."
        ),
    ] = ""
    refine: Annotated[
        int | None,
        typer.Option(
            "--refine", metavar="STEPS", help="Train so many steps after calibration, for 4 bits.", show_default=False
        ),
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of --refine. Default: 1e-4.", show_default=False)
    ] = None
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="New folder.", show_default=False)] = (
        None
    )
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx (QDQ).", show_default=False)] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier quantization.", show_default=False)
    ] = False
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images together.", min=1)] = 32
    json: Annotated[bool, typer.Option("--json", help="The record as one JSON object.", show_default=False)] = False

    def __post_init__(self) -> None:
        """Refuse at once what no model could mend."""
        given = [name for name in ("pool", "folder", "noise") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(f"--{name}" for name in given) or "nothing"
            raise SmiError(f"{said} to calibrate on; give exactly one of --pool POOL, --folder FOLDER and --noise N.")
        if self.fill is not None and self.pool is None:
            raise SmiError(f"--fill {self.fill} goes with --pool alone; leave it out.")
        if self.images is not None and self.noise is not None:
            raise SmiError(f"--images {self.images} goes with --pool and --folder; --noise is a number already.")
        if self.out is None:
            raise SmiError("nowhere to write to; name a new folder with --out DIR.")
        if self.learning_rate is not None and self.refine is None:
            raise SmiError(f"--learning-rate {self.learning_rate:g} goes with --refine STEPS alone; leave it out.")
        if self.device not in ("auto", "cpu"):
            raise SmiError(f"device is {self.device!r}; quantization runs on the CPU alone, leave out --device.")
        _without_backend(self.backend)


def _without_backend(backend: str) -> None:
    """Raises `SmiError` where one was given: networks are taken as timm runs them."""
    if backend != "auto":
        raise SmiError(f"--backend {backend} is for inversion, and nothing is inverted here; leave it out.")


def evaluate(options: EvaluateOptions) -> None:
    """Count how often a model is right on labelled images: top-1, top-5, images per second.

    MODEL may also be a folder that smi quantize has written, or one of its model files. With --against another one is
    evaluated in the same run, on the same device, compiled if the first is, in turns batch by batch.

    [bold]Examples[/bold]

      smi evaluate embedded:teacher --data cifar10:data --download

      smi evaluate deit_base_patch16_224.fb_in1k --data imagenet:/data/imagenet --limit 5000

      smi evaluate quantized/w8a8 --against embedded:teacher --data cifar10:data --compile
    """
    from smi.evaluation import compiled, data_transform, evaluate_together, open_dataset
    from smi.quantization import is_quantized

    names = [options.model, *([] if options.against is None else [options.against])]
    device = _device(options.device, any(map(is_quantized, names)))
    _check_making(options, [name for name in names if not is_quantized(name)])
    pairs = []
    for name in names:
        model, config, classes, labels = _opened(replace(options, model=name), device)
        transform = data_transform(config)
        dataset = open_dataset(
            options.data, transform, num_classes=classes, class_names=labels, download=options.download
        )
        pairs.append((compiled(model, options.batch_size, config["input_size"]) if options.compile else model, dataset))
    with progress("evaluating") as tell:
        found = evaluate_together(
            pairs, batch_size=options.batch_size, limit=options.limit, device=device, on_batch=tell
        )
    if options.json:
        facts = [
            {"model": name, "data": options.data, "device": str(device), **asdict(one)}
            | {"images_per_second": one.images_per_second}
            for name, one in zip(names, found, strict=True)
        ]
        print(json.dumps(facts[0] if options.against is None else {**facts[0], "against": facts[1]}))
        return
    where = f"in the network, on {device}, batch {options.batch_size}{', compiled' if options.compile else ''}"
    if options.against is not None:
        print("        " + "  ".join(f"{name:>{max(11, len(name))}}" for name in names))
    for row, values, after in (
        ("top-1", [f"{one.top1:.2%}" for one in found], f"of {found[0].images} images"),
        ("top-5", [f"{one.top5:.2%}" for one in found], ""),
        ("speed", [f"{one.images_per_second:.1f}" for one in found], f"images/s {where}"),
    ):
        if options.against is not None:
            values = [f"{value:>{max(11, len(name))}}" for name, value in zip(names, values, strict=True)]
        print(f"{row}   {'  '.join(values)} {after}".rstrip())


def _check_making(options: EvaluateOptions, made: Sequence[str]) -> None:
    """Raises `SmiError` where options of how a model is made have none to make, or a checkpoint is for either of two.

    Args:
        made: names of the models that are not read as they were quantized.
    """
    names = ("checkpoint", "num_classes", "img_size", "no_pretrained")
    given = [name for name in names if getattr(options, name) is not None and getattr(options, name) is not False]
    if given and not made:
        raise SmiError(f"a quantized model is complete in itself; leave out --{given[0].replace('_', '-')}.")
    if options.checkpoint is not None and len(made) > 1:
        raise SmiError(
            f"--checkpoint {options.checkpoint} would be loaded into both {made[0]} and {made[1]}; evaluate them one "
            f"after the other."
        )


def _device(wanted: str, quantized: bool) -> Any:
    """Where all models of an evaluation run."""
    from smi.devices import resolve_device

    if not quantized:
        return resolve_device(wanted)
    if wanted not in ("auto", "cpu"):
        raise SmiError(f"device is {wanted!r}; a quantized model runs on the CPU alone.")
    return resolve_device("cpu")


def _opened(options: EvaluateOptions, device: Any) -> tuple[Any, dict[str, Any], int, Sequence[str]]:
    """The model on `device`, its data config, the number of its classes, and their names."""
    from smi.adapters.timm_names import known_names
    from smi.evaluation import data_config
    from smi.quantization import is_quantized, load_quantized

    if is_quantized(options.model):
        quantized = load_quantized(options.model)
        return quantized, quantized.data, quantized.info.num_classes, quantized.info.class_names
    model = options.build(seed=0).to(device)
    return model, data_config(model), model.num_classes, known_names(model)


def quantize(options: QuantizeOptions) -> None:
    """Quantize a model after training, calibrated on synthetic images: of sparse ones, on the kept patches alone.

    [bold]Examples[/bold]

      smi quantize embedded:teacher --pool pools/embedded-teacher-sparse --out quantized/w8a8

      smi quantize deit_base_patch16_224.fb_in1k --pool pools/deit-b -w 4 -a 8 --observer mse --out quantized/w4a8

      smi quantize embedded:teacher --pool pools/embedded-teacher-sparse -w 4 -a 4 --observer mse --refine 200 -o w4a4

      smi quantize embedded:teacher --noise 32 --skip softmax,head --out quantized/control --onnx
    """
    from smi.packed import open_pool
    from smi.quantization import check_out
    from smi.quantization import quantize as make
    from smi.quantizer import kinds_of
    from smi.refinement import Refinement

    assert options.out is not None
    refine = None
    if options.refine is not None:
        rate = Refinement.learning_rate if options.learning_rate is None else options.learning_rate
        refine = Refinement(options.refine, rate)
    check_out(options.out, onnx=options.onnx, overwrite=options.overwrite)
    pool = None if options.pool is None else open_pool(options.pool)
    model = options.build(seed=0 if pool is None else pool.config.seed)
    calibration = _calibration(options, model, pool)
    with progress("calibrating") as tell, progress("refining") as tell_step:
        made = make(
            model,
            calibration,
            weights=options.weights,
            activations=options.activations,
            observer=options.observer,  # type: ignore[arg-type]
            skip=kinds_of(options.skip),
            refine=refine,
            name=options.model,
            on_batch=tell,
            on_step=tell_step,
        )
    record = made.save(options.out, onnx=options.onnx, overwrite=options.overwrite)
    if options.json:
        print(json.dumps(record))
        return
    _print(record)
    print(f"written to {options.out}")


def _calibration(options: QuantizeOptions, model: Any, pool: Pool | None) -> Calibration:
    from smi.adapters.timm import SparseModel
    from smi.calibration import from_folder, from_noise, from_pool
    from smi.evaluation import data_config, data_transform

    if pool is not None:
        fill: Any = options.fill
        return from_pool(pool, images=options.images, batch_size=options.batch_size, fill=fill)
    if options.folder is not None:
        transform = data_transform(data_config(model))
        return from_folder(options.folder, transform, images=options.images, batch_size=options.batch_size)
    assert options.noise is not None
    info = SparseModel(model, device="cpu", backend="reference").info
    return from_noise(info, images=options.noise, batch_size=options.batch_size)


def _print(record: dict[str, Any]) -> None:
    scheme, sites = record["scheme"], record["sites"]
    table = Table(title="activations, by kind of site", title_justify="left")
    for name in ("kind", "sites", "mean error", "largest error", "at"):
        table.add_column(name, justify="left" if name in ("kind", "at") else "right")
    for kind in dict.fromkeys(site["kind"] for site in sites):
        some = [site for site in sites if site["kind"] == kind]
        worst = max(some, key=lambda site: site["error"])
        mean = sum(site["error"] for site in some) / len(some)
        table.add_row(kind, str(len(some)), f"{mean:.2%}", f"{worst['error']:.2%}", worst["name"])
    Console().print(table)
    source = record["calibration"]
    print(f"model       {record['model']['name']}, W{scheme['weights']}A{scheme['activations']}, {scheme['observer']}")
    print(f"calibrated  on {source['images']} images of {source.get('path', source['kind'])}")
    print(f"quantized   {len(sites)} activations, {len(record['weights'])} weights")
    if record["refinement"] is not None:
        done = record["refinement"]
        before, after = done["divergence"]["held_out"]
        print(f"refined     {done['steps']} steps; divergence of images held out {before:.4f}, then {after:.4f} nats")
    sizes = ", ".join(f"{name} {size(count)}" for name, count in record["bytes"].items())
    print(f"size        {sizes}")
    for file, share in record["agreement"].items():
        if file != "images":
            print(f"agreement   {file}: {share:.1%} of {record['agreement']['images']} images held out")
