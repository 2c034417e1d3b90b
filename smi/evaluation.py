"""How often a network is right on images with labels, and how fast it is."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from smi.errors import SmiError, did_you_mean
from smi.modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Sequence

DATASETS = ("cifar10", "cifar100", "imagenet")


@dataclass(frozen=True)
class Evaluation:
    """What was counted.

    Attributes:
        images, classes: how many.
        top1: share of the images whose label has the largest logit; never of those with a logit that is no number.
        top5: share whose label is among the five largest, or among all where there are fewer.
        model_seconds: in the network alone, from pixels on its device to logits.
        seconds: in all, reading and preparing images included.
    """

    images: int
    classes: int
    top1: float
    top5: float
    model_seconds: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of the network alone."""
        return self.images / self.model_seconds


def evaluate(
    model: Callable[[Tensor], Tensor],
    dataset: Any,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Top-1 and top-5 accuracy, and images per second.

    Args:
        model: (B, C, H, W) float32 -> logits (B, classes). A module is put into evaluation mode for the while, and must
            be on `device`.
        dataset: map-style items (image (C, H, W) float32 as the model wants it, class index).
        limit: at most so many images, spread evenly over the data set, which may be sorted by class.
        workers: processes that read images; 0 reads them here.
        on_batch: called with the number of images done and of all.

    Raises:
        SmiError: no image, items that are no pairs, batch size or limit below 1, logits that are not (B, classes), a
            label that is no class.
    """
    pairs = [(model, dataset)]
    (found,) = evaluate_together(
        pairs, batch_size=batch_size, limit=limit, device=device, workers=workers, on_batch=on_batch
    )
    return found


def evaluate_together(
    pairs: Sequence[tuple[Callable[[Tensor], Tensor], Any]],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """As `evaluate`, of several models in one run.

    They take turns at every batch, so that drift of the machine falls on all alike, and each has run once before it is
    timed. `Evaluation.seconds` is of them all.

    Args:
        pairs: model, and the data set as that model wants it; of the same images with the same labels.

    Raises:
        SmiError: as `evaluate`; data sets that differ in their labels.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise SmiError(f"{name} is {value}; expected at least 1.")
    sizes = [len(dataset) if isinstance(dataset, Sized) else 0 for _, dataset in pairs]
    total = min(sizes)
    if not total:
        raise SmiError("the data set is empty; expected at least one image with a label.")
    if max(sizes) > total:
        raise SmiError(f"the data sets have {sizes} images; expected the same ones for every model.")
    chosen = None if limit is None or limit >= total else [place * total // limit for place in range(limit)]
    total = total if chosen is None else len(chosen)
    tallies = [_Tally(model, torch.device(device)) for model, _ in pairs]
    loaders = [
        DataLoader(dataset if chosen is None else Subset(dataset, chosen), batch_size=batch_size, num_workers=workers)
        for _, dataset in pairs
    ]
    done, began = 0, time.perf_counter()
    with contextlib.ExitStack() as modes, torch.no_grad():
        for model, _ in pairs:
            modes.enter_context(evaluating(model))
        for number, batches in enumerate(zip(*loaders, strict=True)):
            for batch in batches:
                if not (isinstance(batch, (list, tuple)) and len(batch) == 2):
                    raise SmiError(f"the data set gives {_contents(batch)}; expected pairs (image, class index).")
            labels = batches[0][1]
            if not all(torch.equal(labels, others) for _, others in batches):
                raise SmiError("the data sets have other labels for the same images; expected the same ones.")
            if len(pairs) > 1 and not number:
                for tally, (images, _) in zip(tallies, batches, strict=True):
                    tally.run(images)
            turns = list(zip(tallies, batches, strict=True))
            for tally, (images, _) in turns if number % 2 == 0 else reversed(turns):
                tally.count(images, labels)
            done += len(labels)
            if on_batch is not None:
                on_batch(done, total)
    seconds = time.perf_counter() - began
    return [tally.evaluation(done, seconds) for tally in tallies]


def _contents(batch: Any) -> str:
    """What the items of a batch are, for a message."""
    return f"{len(batch)} values an item" if isinstance(batch, (list, tuple)) else f"{type(batch).__name__} batches"


class _Tally:
    """What was counted of one model so far."""

    def __init__(self, model: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._model, self._device = model, device
        self._classes = self._first = self._among = 0
        self._inside = 0.0

    def run(self, images: Tensor) -> tuple[Tensor, float]:
        """Logits on the CPU, and the seconds from pixels on the device to logits there."""
        images = images.to(self._device)
        _wait(self._device)
        start = time.perf_counter()
        logits = self._model(images)
        _wait(self._device)
        return logits.cpu(), time.perf_counter() - start

    def count(self, images: Tensor, labels: Tensor) -> None:
        logits, seconds = self.run(images)
        if logits.ndim != 2 or len(logits) != len(labels):
            raise SmiError(f"the model gives {tuple(logits.shape)}; expected ({len(labels)}, classes) logits.")
        self._classes = classes = logits.shape[1]
        strange = labels[(labels < 0) | (labels >= classes)]
        if len(strange):
            raise SmiError(
                f"the data set has a label {int(strange[0])}, the model has classes 0 to {classes - 1}; "
                f"use a data set of the model's own classes."
            )
        ranked = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        ranked &= ~logits.isnan().any(1)[:, None]  # which topk takes for the largest
        self._first += int(ranked[:, 0].sum())
        self._among += int(ranked.any(1).sum())
        self._inside += seconds

    def evaluation(self, images: int, seconds: float) -> Evaluation:
        return Evaluation(images, self._classes, self._first / images, self._among / images, self._inside, seconds)


def compiled(model: nn.Module, batch_size: int, input_size: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """`model` through inductor with frozen weights, for batches of up to `batch_size` images; compiled here and now.

    Smaller batches are filled up with zeros, so that the last one does not compile again.

    Raises:
        SmiError: it cannot be compiled, or not here (inductor needs a C++ compiler).
    """
    from torch._inductor import config as inductor

    first: Tensor = next(iter(model.state_dict().values()), torch.zeros(0))  # a network in onnxruntime shows none
    filled = torch.zeros(batch_size, *input_size, device=first.device)
    _know_integer_kernels()
    run = torch.compile(model)

    def call(images: Tensor) -> Tensor:
        if len(images) == batch_size:
            return run(images)
        return run(torch.cat((images, filled[len(images) :])))[: len(images)]

    try:
        # An option of torch.compile would come too late: whether weights are constants is decided before it is read.
        with torch.no_grad(), inductor.patch(freezing=True):
            call(filled)
    except Exception as error:  # compilers fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SmiError(f"the model cannot be compiled here: {reason}. Leave out --compile.") from error
    return call


def _know_integer_kernels() -> None:
    """Have torchao, where it is installed, teach inductor to make oneDNN's integer layers of quantized ones."""
    with contextlib.suppress(ImportError, SmiError):
        importlib.import_module("smi.quantizer")  # imports torchao without its warnings
        importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


def open_dataset(
    data: str,
    transform: Callable[[Any], Tensor],
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
    download: bool = False,
) -> Any:
    """The test images of a data set, with labels.

    Args:
        data: ``cifar10:PATH``, ``cifar100:PATH``, ``imagenet:PATH`` as torchvision lays them out there, or a folder
            with one folder of images for each class.
        num_classes: of the model.
        class_names: of the model; folders named like all of them, or numbered (as ``smi export`` names them), are taken
            by name, any others, such as ImageNet's own, in alphabetical order.
        download: fetch what is not at PATH; the CIFARs alone.

    Raises:
        SmiError: no such data set, no images in it, another number of classes than the model's.
    """
    from torchvision import datasets

    name, colon, place = data.partition(":")
    if not data:
        raise SmiError(f"name the images with --data: {', '.join(f'{n}:PATH' for n in DATASETS)} or a folder.")
    try:
        if colon and name in DATASETS:
            found: Any
            if name == "imagenet":
                if download:
                    raise SmiError(
                        "ImageNet cannot be downloaded; put its archives into PATH and leave out --download."
                    )
                if not Path(place).is_dir():
                    raise FileNotFoundError(f"there is no folder {place!r}")
                found = datasets.ImageNet(place, split="val", transform=transform)
            else:
                kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                found = kind(place, train=False, transform=transform, download=download)
        elif Path(data).is_dir():
            if download:
                raise SmiError(f"--download goes with cifar10: and cifar100: alone; {data!r} is a folder.")
            found = datasets.ImageFolder(data, transform=transform)
        elif colon and name.isidentifier():
            raise SmiError(f"unknown data set {name!r}.{did_you_mean(name, DATASETS)}")
        else:
            raise SmiError(
                f"there are no images at {data!r}; expected a folder of class folders, or one of "
                f"{', '.join(f'{n}:PATH' for n in DATASETS)}."
            )
    except ImportError as error:
        raise SmiError(
            f"torchvision needs {error.name} to read ImageNet's archives; install it, or name the unpacked folder of "
            f"class folders, e.g. {str(Path(place) / 'val')!r}."
        ) from None
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        mend = " Fetch it with --download." if name.startswith("cifar") and not download else " Name another PATH."
        raise SmiError(f"{data!r} holds no such images: {reason}.{mend}") from None
    if len(found.classes) != num_classes:
        raise SmiError(
            f"{data!r} has {len(found.classes)} classes, the model has {num_classes}; "
            f"use a data set of the model's own classes."
        )
    if isinstance(found, datasets.ImageFolder) and not isinstance(found, datasets.ImageNet):
        _label_by_name(found, num_classes, class_names)
    return found


def _label_by_name(folder: Any, num_classes: int, class_names: Sequence[str]) -> None:
    """Where folders are named as an export names them, let names decide: ``10`` sorts before ``2``."""
    from smi.pool import slug

    names, numbers = [slug(name) for name in class_names], [str(number) for number in range(num_classes)]
    ways = (names, [f"{name}-{number}".lstrip("-") for number, name in enumerate(names)], numbers)
    for way in ways:
        # Slugs are cut, numbers behind them too: cut once more they would be other names.
        mine = [name if name in way else slug(name) for name in folder.classes]
        if len(set(way)) == len(way) and set(mine) == set(way):
            label = {number: way.index(name) for number, name in enumerate(mine)}
            folder.target_transform = label.__getitem__
            return


def data_transform(config: dict[str, Any]) -> Callable[[Any], Tensor]:
    """From a picture to what the model wants: timm's evaluation transform of its data config."""
    from timm.data import create_transform

    made: Callable[[Any], Tensor] = create_transform(**config, is_training=False)
    return made


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model, as JSON can hold it; size and channels are those that the model was built for."""
    from timm.data import resolve_model_data_config

    from smi.adapters.timm import for_channels

    config = resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        channels = embed.proj.in_channels
        config["input_size"] = (channels, *embed.img_size)
        config |= {key: tuple(for_channels(config[key], channels)) for key in ("mean", "std")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
