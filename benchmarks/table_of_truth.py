#!/usr/bin/env python
"""What images of every kind are worth: accuracy of networks calibrated on them, and of students taught by them.

    python -m benchmarks.table_of_truth --work truth --test SOMEWHERE/test --real SOMEWHERE/train
    python -m benchmarks.table_of_truth --work truth-deit --model deit_base_patch16_224.fb_in1k \
        --student deit_tiny_patch16_224 --preset fast --images 64 --test imagenet:IMAGENET --real IMAGENET/train

Laid out as the two tables of Hu et al., ICML 2024 (section 4): a row for every source of images, real ones and Gaussian
noise among them, and a column for every use. All rows share targets, image count and seeds; one row has as many sparse
images as cost what the dense ones did. Every pool, student and figure is kept under --work as it is done, so that the
same command goes on after an interruption. Writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import smi
from benchmarks.agreement import ROWS as RANKED
from benchmarks.timing import RESULTS, environment, interleaved, write_result
from smi.calibration import from_pool
from smi.config import preset_or_file
from smi.devices import resolve_device
from smi.errors import SmiError
from smi.evaluation import data_config, data_transform, open_dataset
from smi.files import atomic_write
from smi.flops import count_flops
from smi.given import RealImages, check_real, given_pool, noise_images
from smi.run import run

INVERTED: dict[str, dict[str, Any]] = {**RANKED, "rebirth": {"strategy": "rebirth"}}
EQUAL_COST = "sparse strict, at the cost of dense"
ROWS = ("real images", *INVERTED, EQUAL_COST, "gaussian noise")
WHOLE = ", whole image"  # of a sparse pool, with the mean in dropped patches; where none are dropped it is the same
QUANTIZED = {
    f"W{weights}A{activations} {observer}{WHOLE if fill else ''}": {
        "fill": fill,
        "how": {"weights": weights, "activations": activations, "observer": observer},
    }
    for weights, activations, observer, fill in (
        (8, 8, "minmax", None),
        (4, 8, "minmax", None),
        (4, 4, "minmax", None),
        (3, 4, "minmax", None),
        (4, 4, "mse", None),
        (3, 4, "mse", None),
        (4, 4, "mse", "mean"),
        (3, 4, "mse", "mean"),
    )
}
AS_IT_IS = ", image as it is"
CALIBRATING = 32  # images, [SMI] section 4.1


@dataclass(frozen=True)
class Lesson:
    """A column of students: how they are made, and how they are taught."""

    make: Callable[[], nn.Module]
    config: smi.TransferConfig


class Bench:
    """Everything that the cells share.

    Attributes:
        work: folder of pools, students and finished cells.
        images: of every row but that of equal cost.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.images = Path(args.work), args.images
        self.network = smi.load_model(args.model, pretrained=not args.no_pretrained)
        self.model = smi.SparseModel(self.network, name=args.model, device=resolve_device(args.device))
        self.base = preset_or_file(args.preset).replace(snapshots=0)
        self.test, self.real, self.limit = args.test, args.real, args.limit
        self._tests: dict[str, Any] = {}

    def config(self, row: str, seed: int) -> smi.Config:
        return self.base.replace(seed=seed, **INVERTED.get(row, INVERTED["dense"])).resolved()

    def plan(self, images: int, row: str = "dense") -> smi.WorkPlan:
        classes, repeat = self.model.info.num_classes, self.config(row, 0).images_per_trajectory
        return smi.WorkPlan.balanced(range(classes), images, self.base.batch_size, classes, repeat=repeat)

    def pool(self, row: str, seed: int) -> smi.Pool:
        """The images of a row, made now as far as they are missing."""
        folder = self.work / "pools" / f"{row.replace(' ', '-').replace(',', '')}-{seed}"
        if row in INVERTED:
            run(self.model, self.plan(self.images, row), self.config(row, seed), folder, on_batch=_told(row, seed))
        elif row == EQUAL_COST:
            self._enlarge(self.pool("sparse strict", seed), self.config("sparse strict", seed), folder, seed)
        else:
            plan = self.plan(self.images)
            made = noise_images(self.model.info, seed) if row == "gaussian noise" else self._real(plan, seed)
            given_pool(folder, self.model, self.config(row, seed), plan, made)
        return smi.Pool(folder)

    def _enlarge(self, pool: smi.Pool, config: smi.Config, folder: Path, seed: int) -> None:
        """The pool's own images and as many more as the time of the dense ones would have made."""
        plan = self.plan(round(self.images * self.flops("dense") / self.flops("sparse strict")))
        writer = smi.PoolWriter(folder, pool.info, config, plan, device=self.model.where)
        whole = [b for b in writer.missing if b in pool.batches and pool.plan.batch(b) == plan.batch(b)]
        for batch in whole:
            writer.write(batch, pool.load(batch))
        run(self.model, plan, config, folder, on_batch=_told(EQUAL_COST, seed))

    def flops(self, row: str) -> float:
        """Of the inversion of one image, over the whole schedule; a trajectory's are shared by its images."""
        config = self.config(row, 0)
        stages = [(0, self.model.info.num_patches), *config.schedule(self.model.info.num_patches).items()]
        ends = [start for start, _ in stages[1:]] + [config.iterations]
        whole = sum(
            (end - start) * count_flops(self.model, kept) for (start, kept), end in zip(stages, ends, strict=True)
        )
        return whole / config.images_per_trajectory

    def _real(self, plan: smi.WorkPlan, seed: int) -> Callable[[range], Tensor]:
        found = RealImages(self.real, data_transform(data_config(self.network)), self.model.info, tests=self.test)
        found.check(plan)
        return found.images(plan.targets, seed)

    def dataset(self, data: dict[str, Any]) -> Any:
        """The test images as a network with that data config wants them, read once and for all."""
        key = json.dumps(data, sort_keys=True)
        if key not in self._tests:
            info = self.model.info
            found = open_dataset(
                self.test, data_transform(data), num_classes=info.num_classes, class_names=info.class_names
            )
            total = min(self.limit or len(found), len(found))
            items = [found[i * len(found) // total] for i in range(total)]
            self._tests[key] = TensorDataset(torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items]))
        return self._tests[key]

    def top1(self, network: nn.Module, data: dict[str, Any], device: Any = "cpu", batch_size: int = 100) -> float:
        return smi.evaluate(network, self.dataset(data), batch_size=batch_size, device=device).top1


def quantized(bench: Bench, row: str, seed: int, fill: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the teacher with so few bits, its ranges taken from the row's first images."""
    made = smi.quantize(bench.network, from_pool(bench.pool(row, seed), images=CALIBRATING, fill=fill), **how)
    return {"top1": bench.top1(made.model, made.data, batch_size=16)}  # its many passes stay in the cache


def taught(bench: Bench, row: str, seed: int, column: str, lesson: Lesson) -> dict[str, Any]:
    """Accuracy of a student that has learnt from the row's images; those held out choose it, never the test's."""
    torch.manual_seed(seed)  # of fresh weights
    student = lesson.make()
    folder = bench.work / "students" / f"{row}-{seed}-{column}".replace(" ", "-").replace(",", "")
    config = dataclasses.replace(lesson.config, seed=seed)
    device = bench.model.device
    found = smi.teach(student, bench.pool(row, seed), folder, config, name=column, device=device)
    from safetensors.torch import load_file

    student.load_state_dict(load_file(found.path / "student.safetensors"))
    top1 = bench.top1(student.to(device), data_config(student), device)
    return {"top1": top1, "agreement": found.curve[found.best].agreement, "epoch": found.best, "fed": found.fed}


def lessons(args: argparse.Namespace, bench: Bench) -> dict[str, Lesson]:
    """The three kinds of student. The embedded teacher's own are the judge's features and a smaller Transformer."""
    classes = bench.model.info.num_classes

    def trained() -> nn.Module:
        model: Any = smi.load_model(args.student or "embedded:judge")
        model.reset_classifier(classes)
        network: nn.Module = model
        return network

    def fresh() -> nn.Module:
        if args.student:
            return smi.load_model(args.student, pretrained=False, num_classes=classes)
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=classes, drop_path_rate=0.1
        )
        model.pretrained_cfg = bench.network.pretrained_cfg  # type: ignore[assignment]  # same pixels
        return model

    probe = smi.TransferConfig(mode="probe", epochs=args.epochs, batch_size=32, fill="mean")
    tune = smi.TransferConfig(mode="finetune", epochs=args.epochs, batch_size=32, fill="mean")
    long = dataclasses.replace(tune, epochs=3 * args.epochs, learning_rate=1e-3, weight_decay=0.05)
    return {
        "linear probe": Lesson(trained, probe),
        f"linear probe{AS_IT_IS}": Lesson(trained, dataclasses.replace(probe, fill="as-is")),
        "full fine-tuning": Lesson(trained, tune),
        "from scratch": Lesson(fresh, long),
    }


def cells(args: argparse.Namespace, bench: Bench) -> dict[str, Callable[[str, int], dict[str, Any]]]:
    """Column -> what measures it for a row and a seed."""
    found: dict[str, Callable[[str, int], dict[str, Any]]] = {}
    for column, how in QUANTIZED.items():
        found[column] = lambda row, seed, how=how: quantized(bench, row, seed, **how)  # type: ignore[misc]
    for column, lesson in lessons(args, bench).items():
        found[column] = lambda row, seed, c=column, x=lesson: taught(bench, row, seed, c, x)  # type: ignore[misc]
    return {column: cell for column, cell in found.items() if not args.columns or column in args.columns}


def same(row: str, column: str) -> str:
    """The column that says the same of a row without dropped patches."""
    sparse = INVERTED.get(row, {}).get("strategy", "dense") != "dense" or row == EQUAL_COST
    return column if sparse else column.removesuffix(WHOLE).removesuffix(AS_IT_IS)


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file says, or else what `measure` gives, which the file says from then on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(measure()).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def cost(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds and memory of one batch of every inverted row, in turns."""
    device, peak = bench.model.device, {}
    # Of the same pixels: every row optimises as many images at once, of which rebirth makes several each.
    number = {row: bench.base.batch_size * bench.config(row, 0).images_per_trajectory for row in INVERTED}

    def invert(row: str) -> None:
        targets = list(bench.plan(number[row], row).targets)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        smi.invert(bench.model, targets, bench.config(row, 0))
        peak[row] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    times = interleaved({row: lambda row=row: invert(row) for row in INVERTED}, rounds=rounds, device=device)
    return {
        row: {
            "seconds_per_image": times[row]["median"] / number[row],
            "spread": times[row]["spread"],
            "peak_bytes": peak[row],
        }
        for row in INVERTED
    }


def _told(row: str, seed: int) -> Callable[[int, smi.Result, float], None]:
    return lambda batch, _, seconds: print(f"seed {seed}: {row}, batch {batch}: {seconds:.0f} s", flush=True)


def settings(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What a figure depends on; one work folder holds figures of one setting."""
    given = {key: getattr(args, key) for key in ("model", "preset", "images", "limit", "student", "epochs")}
    return {**given, "config": bench.base.to_dict(), "weights_sha256": bench.model.info.weights_sha256}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for pools, students and finished cells")
    parser.add_argument("--test", required=True, help="as --data of smi evaluate")
    parser.add_argument("--real", help="folder of classes to take in place of synthetic images; default: no such row")
    parser.add_argument("--model", default="embedded:teacher")
    parser.add_argument("--no-pretrained", action="store_true")
    parser.add_argument("--student", help="timm name; default, for CIFAR-10: the embedded teacher's own")
    parser.add_argument("--preset", default="demo", help="of the inversion, or a YAML file of options")
    parser.add_argument("--images", type=int, default=120, help="a row and seed")
    parser.add_argument("--limit", type=int, help="test images; default all")
    parser.add_argument("--epochs", type=int, default=40, help="of probes and fine-tuning; from scratch three times")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", help="default all")
    parser.add_argument("--rounds", type=int, default=1, help="of timing; 0 leaves it out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.real:
        check_real(args.real, args.test)
    bench = Bench(args)
    if not args.student and (bench.model.info.input_size, bench.model.info.num_classes) != ((3, 32, 32), 10):
        parser.error("name a --student: the embedded ones know ten classes of 32 x 32 pixels")
    mine = settings(args, bench)
    theirs = once(bench.work / "settings.json", lambda: mine)
    if theirs != json.loads(json.dumps(mine)):
        raise SmiError(f"{args.work!r} holds figures of other settings; choose another --work.")
    for name in ("test", "real"):  # apart, since a result is to name no folder of anyone's
        place = {"place": getattr(args, name)}
        if place["place"] and once(bench.work / f"{name}.json", lambda place=place: place) != place:  # type: ignore[misc]
            raise SmiError(f"{args.work!r} holds figures of other --{name} images; choose another --work.")
    columns = cells(args, bench)
    table: dict[str, Any] = {}
    for seed in args.seeds:  # outermost, so that whole seeds are done when time runs out
        for row in [row for row in args.rows if row != "real images" or args.real]:
            entry = table.setdefault(row, {"images": len(bench.pool(row, seed)), "cells": {}})
            for column, cell in columns.items():
                file = (
                    bench.work / "cells" / f"{row}-{seed}-{same(row, column)}.json".replace(" ", "-").replace(",", "")
                )
                found = once(file, lambda row=row, seed=seed, cell=cell: cell(row, seed))  # type: ignore[misc]
                entry["cells"].setdefault(column, []).append(found)
                print(f"seed {seed}: {row}: {column}: {found['top1']:.1%}", flush=True)
    for row, entry in table.items():
        inverted = "sparse strict" if row == EQUAL_COST else row
        entry["gflop_per_image"] = bench.flops(inverted) / 1e9 if inverted in INVERTED else 0.0
    teacher = once(
        bench.work / "cells" / "teacher.json",
        lambda: {"top1": bench.top1(bench.network, data_config(bench.network))},
    )
    record = {
        "benchmark": "table_of_truth",
        **mine,
        "seeds": args.seeds,
        "calibrating": CALIBRATING,
        "teacher_top1": teacher["top1"],
        "rows": table,
        "cost": once(bench.work / "cells" / "cost.json", lambda: cost(bench, args.rounds)) if args.rounds else {},
        "environment": environment(bench.model.device),
    }
    print(f"written to {write_result(args.out, f'table_of_truth-{args.model}', record)}")


if __name__ == "__main__":
    main()
