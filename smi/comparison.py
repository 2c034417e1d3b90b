"""Strategies side by side on one teacher: what their images are worth for what they cost.

Two measurements, both per sparse image: at equal cost, where a cheaper method makes more images, and at an equal number
of images. Every method has one pool a seed, and a point of a curve is the first so many images of it, so that a point
costs nothing but its own evaluation. Beside them stand controls that nobody inverted, as many as the equal number:
`noise`, and `real` pictures where a folder of them is named.

    OUT/settings.json              what the figures depend on; another comparison is refused
    OUT/rates.json                 what one image of every method costs
    OUT/real.json                  where the real pictures are from, if there are any
    OUT/pools/METHOD-SEED/         images, see `smi.pool`
    OUT/cells/METHOD-SEED-IMAGES-MEASURE.json   one finished figure
    OUT/students/                  see `smi.transfer`
    OUT/compare.json, .png, .md    the record, the picture and the page

Whatever interrupts a comparison, the same call goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smi.adapters.timm import SparseModel
from smi.calibration import from_pool, needed
from smi.comparison_plan import CompareConfig, allot, flops_per_image
from smi.config import Config
from smi.errors import SmiError
from smi.evaluation import data_config, data_transform, evaluate, open_dataset
from smi.files import atomic_write, check_own, writing
from smi.given import RealImages, given_pool, noise_images
from smi.pool import Pool
from smi.pool_tools import FirstImages
from smi.predict import predict
from smi.provenance import versions
from smi.rebirth import updates
from smi.report import own_judge
from smi.report_data import classify, collect
from smi.run import run
from smi.state import WorkPlan
from smi.transfer import TransferConfig, teach
from smi.weights import weights_hash

_ROUNDS = 3  # of timing, in turns


class Comparison:
    """One comparison at work on its folder; `compare` runs it.

    Attributes:
        steps: batches and cells, finished ones among them.
    """

    def __init__(
        self,
        model: SparseModel,
        out: Path,
        config: Config,
        how: CompareConfig,
        judge: nn.Module | None,
        data: str | None,
        real: str | None,
        student: Callable[[], nn.Module] | None,
        lesson: TransferConfig,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.model, self.out, self.config, self.how = model, out, config.replace(snapshots=0), how
        self.judge = own_judge(model.info) if judge is None else judge
        self.data, self.student, self.lesson = data, student if data is not None else None, lesson
        self._progress, self._done = progress, 0
        check_own(out, "comparison", ("settings.json",))
        self._check_uses()
        classes = range(model.info.num_classes) if how.classes is None else how.classes
        self.classes = list(classes)
        self._merging = {model.merge_to: model}
        for name in how.strategies:  # now, because some networks cannot
            self.model_of(name)
        self._real = self._open_real(real)
        self.controls = ("noise",) if self._real is None else ("noise", "real")
        self.repeats = {name: self.config_of(name, how.seeds[0]).images_per_trajectory for name in how.strategies}
        settings = self._settings()
        self._check_same(settings)
        rates = self._rates()
        self.allotments = allot(how, rates, self.repeats)
        self._check_counts()
        self._once(out / "settings.json", lambda: settings)  # not before, or a refused call would claim the folder
        if real is not None:
            self._once(out / "real.json", lambda: {"folder": real})
        if how.equal == "seconds":
            self._once(out / "rates.json", lambda: dict(rates or {}))
        self.measures = self._measures()
        batches = sum(self.plan(name).num_batches for name in how.strategies)
        points = sum(len(self.allotments[name].looked_at) for name in how.strategies) + len(self.controls)
        self.steps = len(how.seeds) * (batches + points * len(self.measures))

    def config_of(self, method: str, seed: int) -> Config:
        """As the method's pool is made."""
        return self.config.replace(strategy=method, seed=seed).resolved()

    def model_of(self, method: str) -> SparseModel:
        """The teacher, with tokens merged inside where the method says so."""
        merge_to = self.config_of(method, self.how.seeds[0]).model_merge_to
        if merge_to not in self._merging:
            self._merging[merge_to] = self.model.merging(merge_to)
        return self._merging[merge_to]

    def plan(self, method: str) -> WorkPlan:
        """As many images as the largest point, or the equal number, asks for."""
        images, repeat = self.allotments[method].looked_at[-1], self.repeats[method]
        info = self.model.info
        return WorkPlan.balanced(self.classes, images, self.config.batch_size, info.num_classes, repeat=repeat)

    def run(self) -> dict[str, Any]:
        """The record, as in ``compare.json``. Seeds are done one after the other, methods in turns."""
        for seed in self.how.seeds:
            for method, batch in self._in_turns():
                plan, config = self.plan(method), self.config_of(method, seed)
                shard = (batch, plan.num_batches)
                run(self.model_of(method), plan, config, self._pool(method, seed), shard=shard)
                self._tell(f"seed {seed}: {method}, batch {batch + 1} of {plan.num_batches}")
            for method in self.how.strategies:
                for images in self.allotments[method].looked_at:
                    self._look(method, seed, images)
            for control in self.controls:
                self._give(control, seed)
                self._look(control, seed, self.how.images)
        return self._record()

    def _give(self, control: str, seed: int) -> None:
        """The pool of a control, for the targets that an equal number of dense images has."""
        plan = self._given_plan()
        if control == "real":
            assert self._real is not None
            images = self._real.images(plan.targets, seed)
        else:
            images = noise_images(self.model.info, seed)
        given_pool(self._pool(control, seed), self.model, self.config_of("dense", seed), plan, images)

    def _given_plan(self) -> WorkPlan:
        return WorkPlan.balanced(self.classes, self.how.images, self.config.batch_size, self.model.info.num_classes)

    def _open_real(self, folder: str | None) -> RealImages | None:
        """Raises `SmiError` where they are no use, or others than those of the comparison that is there."""
        if folder is None:
            return None
        theirs = (_read(self.out / "real.json") or {"folder": folder}).get("folder")
        if theirs != folder:
            raise SmiError(
                f"{str(self.out)!r} holds a comparison with the real images {theirs!r}, this one has {folder!r}; "
                f"choose another folder."
            )
        transform = data_transform(data_config(self.model.original))
        found = RealImages(folder, transform, self.model.info, tests=self.data)
        found.check(self._given_plan())
        return found

    def _in_turns(self) -> Iterator[tuple[str, int]]:
        """Batches of all methods, each method's spread evenly over the whole time, so that none has the best hour."""
        batches = {name: self.plan(name).num_batches for name in self.how.strategies}
        every = [(Fraction(b + 1, n), place, b) for place, n in enumerate(batches.values()) for b in range(n)]
        for _, place, batch in sorted(every):
            yield self.how.strategies[place], batch

    def _look(self, method: str, seed: int, images: int) -> None:
        for measure in self.measures:
            work = functools.partial(self._measure, measure, method, seed, images)
            self._once(self._cell(method, seed, images, measure), work)
            self._tell(f"seed {seed}: {method}, {images} images, {measure}")

    def _measure(self, measure: str, method: str, seed: int, images: int) -> dict[str, Any]:
        return self.measures[measure](FirstImages(self._pool(method, seed), images), method, seed)

    def _measures(self) -> dict[str, Callable[[Pool, str, int], dict[str, Any]]]:
        found: dict[str, Any] = {"images": self._images}
        if self.data is not None and self.how.weights:
            found["quantized"] = self._quantized
        if self.student is not None:
            found["student"] = self._taught
        return found

    def _images(self, pool: Pool, method: str, seed: int) -> dict[str, Any]:
        """What the images cost, whether teacher and judge see the class in them, and how often patches moved if any."""
        tally = collect(pool, pool.info, pool.config, judge=self.judge, max_images=0)
        found = tally.summary()
        wanted = ("images", "flops", "seconds", "tokens", "teacher_agreement", "judge_agreement")
        moved = None if method in self.controls else count_updates(pool)
        return {**{name: found[name] for name in wanted}, "updates": moved}

    def _quantized(self, pool: Pool, method: str, seed: int) -> dict[str, Any]:
        """Top-1 of the teacher in few bits, its ranges taken from these images."""
        from smi.quantization import quantize

        fill = None if pool.load(0).keep.shape[1] == pool.info.num_patches else self.how.fill
        made = quantize(
            self.model.original,
            from_pool(pool, fill=fill),
            weights=self.how.weights,
            activations=self.how.activations,
            observer=self.how.observer,
        )
        return {"top1": self._top1(made.model, made.data, "cpu", batch_size=16)}

    def _taught(self, pool: Pool, method: str, seed: int) -> dict[str, Any]:
        """Top-1 of a student that has learnt from these images alone."""
        from safetensors.torch import load_file

        student = self._new_student(seed)
        lesson = dataclasses.replace(self.lesson, seed=seed, fill=self.how.fill)
        folder = self.out / "students" / f"{method}-{seed}-{len(pool)}"
        found = teach(student, pool, folder, lesson, device=self.model.device)
        student.load_state_dict(load_file(found.path / "student.safetensors"))
        top1 = self._top1(student, data_config(student), self.model.device)
        return {"top1": top1, "agreement": found.curve[found.best].agreement, "fed": found.fed}

    def _new_student(self, seed: int) -> nn.Module:
        assert self.student is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.student()

    def _top1(self, network: nn.Module, data: dict[str, Any], device: Any, batch_size: int = 64) -> float:
        found = evaluate(network, self._tests(data), batch_size=batch_size, device=device, limit=self.how.limit)
        return found.top1

    def _tests(self, data: dict[str, Any]) -> Any:
        assert self.data is not None
        info = self.model.info
        return open_dataset(self.data, data_transform(data), num_classes=info.num_classes, class_names=info.class_names)

    def _rates(self) -> Mapping[str, Fraction | float] | None:
        if self.how.equal == "images":
            return None
        if self.how.equal == "flops":
            return {name: flops_per_image(self.model_of(name), self.config_of(name, 0)) for name in self.how.strategies}
        return _read(self.out / "rates.json") or self._time()

    def _time(self) -> dict[str, float]:
        """Method -> seconds of one image out of a full batch, methods in turns."""
        found: dict[str, list[float]] = {name: [] for name in self.how.strategies}
        for _ in range(_ROUNDS):
            for name, seconds in found.items():
                repeat = self.repeats[name]
                images = self.config.batch_size * repeat
                plan = WorkPlan((self.classes[0],) * images, images)
                seconds.append(predict(self.model_of(name), plan, self.config_of(name, 0)).seconds / images)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def _check_uses(self) -> None:
        """Refuse before hours of inversion what would fail after them."""
        info = self.model.info
        if self.judge is not None:
            classify(self.judge, torch.zeros(1, *info.input_size), info)
        if self.student is not None:
            for seed in self.how.seeds:
                dataclasses.replace(self.lesson, seed=seed)
            classes = getattr(self._new_student(0), "num_classes", info.num_classes)
            if classes != info.num_classes:
                raise SmiError(f"the student has {classes} classes, the model {info.num_classes}; make one of as many.")
        if self.data is None:
            return
        self._tests(data_config(self.model.original))
        if self.how.weights:
            from smi.adapters.timm_quantize import TokenModel
            from smi.quantizer import Scheme

            Scheme(self.how.weights, self.how.activations, self.how.observer, ())
            TokenModel(self.model.original)

    def _check_counts(self) -> None:
        for name, allotment in self.allotments.items():
            repeat, wanted = self.repeats[name], 1
            if self.data is not None and self.how.weights:
                wanted = needed(repeat=repeat)
            if self.student is not None:  # a trajectory to hold out, and one to learn from
                wanted = max(wanted, math.ceil(1 / self.lesson.holdout), 2 * repeat)
            if allotment.looked_at[0] < wanted:
                raise SmiError(
                    f"the first point has {allotment.looked_at[0]} images of {name}, and judging them needs {wanted}; "
                    f"use more images than {self.how.images}, or larger points."
                )

    def _settings(self) -> dict[str, Any]:
        """What a figure depends on. Seeds and points may be added later."""
        apart = ("seeds", "points", "quick")
        how = {key: value for key, value in dataclasses.asdict(self.how).items() if key not in apart}
        settings = {
            **how,
            "config": self.config.replace(strategy="dense").to_dict(),
            "model": {k: v for k, v in dataclasses.asdict(self.model.info).items() if k != "class_names"},
            "judge": None if self.judge is None else weights_hash(self.judge),
            "data": self.data,
            "student": None if self.student is None else weights_hash(self._new_student(0)),
            "lesson": None if self.student is None else dataclasses.asdict(self.lesson),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def _check_same(self, settings: dict[str, Any]) -> None:
        theirs = _read(self.out / "settings.json") or settings
        if isinstance(theirs.get("model"), dict):  # of a version that told them
            theirs["model"].pop("class_names", None)
        for name in settings:
            if theirs.get(name) != settings[name]:
                what, old, new = _first_difference(name, theirs.get(name), settings[name])
                raise SmiError(
                    f"{str(self.out)!r} holds a comparison with another {what}: {str(old)[:80]}, this one has "
                    f"{str(new)[:80]}; choose another folder."
                )

    def _pool(self, method: str, seed: int) -> Path:
        return self.out / "pools" / f"{method}-{seed}"

    def _cell(self, method: str, seed: int, images: int, measure: str) -> Path:
        return self.out / "cells" / f"{method}-{seed}-{images}-{measure}.json"

    def _once(self, path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file says, or else what `measure` gives, which the file says from then on."""
        said = _read(path)
        if said is None:
            said = measure()
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(said).encode())
        return said

    def _tell(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self.steps, what)

    def _record(self) -> dict[str, Any]:
        reference = None
        if self.data is not None:
            network, data = self.model.original, data_config(self.model.original)
            file = self.out / "cells" / "teacher.json"
            where = next(network.parameters()).device
            reference = self._once(file, lambda: {"top1": self._top1(network, data, where)})["top1"]
        return {
            "settings": self._settings(),
            "seeds": list(self.how.seeds),
            "points": list(self.how.points),
            "quick": self.how.quick,
            "device": self.model.where,
            "versions": versions(),
            "teacher_top1": reference,
            "methods": {name: self._method(name) for name in self.how.strategies},
            "controls": {name: {"cells": self._cells(name, (self.how.images,))} for name in self.controls},
        }

    def _method(self, name: str) -> dict[str, Any]:
        allotment = self.allotments[name]
        return {
            "per_image": None if allotment.per_image is None else float(allotment.per_image),
            "at_points": list(allotment.at_points),
            "counted": allotment.counted,
            "cells": self._cells(name, allotment.looked_at),
        }

    def _cells(self, name: str, numbers: Sequence[int]) -> dict[str, Any]:
        """Number of images -> measure -> figures of all seeds."""
        return {
            str(images): {
                measure: [_read(self._cell(name, seed, images, measure)) for seed in self.how.seeds]
                for measure in self.measures
            }
            for images in numbers
        }


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Where two settings that differ do so first: its name, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:
            if old.get(key) != new.get(key):
                return _first_difference(f"{name}: {key}", old.get(key), new.get(key))
    return name, old, new


def _read(path: Path) -> dict[str, Any] | None:
    """What a finished file says, None if there is none. Raises `SmiError` if it is damaged."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SmiError(f"{str(path)!r} is damaged ({error}); delete it and run the same command again.") from None
    except OSError as error:
        raise SmiError(f"cannot read {str(path)!r}: {error.strerror}; choose another folder.") from None
    return said


def count_updates(pool: Pool) -> dict[str, Any]:
    """How often patches were fed and moved, see `smi.rebirth.updates`.

    Returns:
        ``least``, ``mean``, ``most``: of a patch that an image keeps. ``per_image``: of all patches of a trajectory
        together, over the images that come out of it. ``map``: of every place in the grid, rows of the mean over the
        trajectories.
    """
    config, info = pool.config, pool.info
    repeat, kept, places = config.images_per_trajectory, [], []
    for result in pool:
        counts = updates(result, config)
        kept.append(counts.gather(1, result.keep).flatten())
        places.append(counts[repeat - 1 :: repeat])  # the last image of a trajectory has seen all of it
    of_kept, mean = torch.cat(kept).double(), torch.cat(places).double().mean(0)
    return {
        "least": int(of_kept.min()),
        "mean": float(of_kept.mean()),
        "most": int(of_kept.max()),
        "per_image": float(mean.sum()) / repeat,
        "map": mean.view(info.grid).tolist(),
    }


def compare(
    model: nn.Module | SparseModel,
    out: str | Path,
    config: Config | None = None,
    how: CompareConfig | None = None,
    *,
    judge: nn.Module | None = None,
    data: str | None = None,
    real: str | None = None,
    student: Callable[[], nn.Module] | None = None,
    lesson: TransferConfig | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Run methods side by side on one teacher, and draw what their images are worth against what they cost.

    The two measurements that the published reviews of Patch Rebirth (Heo & Choi, arXiv 2509.23235) asked for, an equal
    time and an equal number of images, with throughput counted per sparse image. Quality is the share of images in
    which an independent network sees the class, the accuracy of the quantized teacher calibrated on them, and that of a
    student taught by them. The same is asked of controls: Gaussian noise, and real pictures.

    Args:
        model: the teacher, a supported timm model or a `SparseModel`.
        out: folder; the same call on it goes on where an earlier one was interrupted, and repeats nothing.
        config: of the inversion, but for strategy and seed.
        how: see `CompareConfig`.
        judge: a second classifier of the same classes; default the embedded one for an embedded teacher, else none.
        data: test images with labels, as for `smi.evaluation.open_dataset`; without them there is no accuracy.
        real: a folder of classes of real pictures, other than the test images; it may be added later.
        student: makes a fresh student; called with torch's seed set. None teaches none.
        lesson: how it is taught; its seed and fill are those of the comparison.
        progress: called with the steps done, all steps, and what was done.

    Returns:
        The record in ``compare.json``; beside it lie the picture ``compare.png`` and the page ``compare.md``.

    Raises:
        SmiError: settings that do not fit, a folder of another comparison, data or a judge of other classes, torchao
            (for quantization) or matplotlib missing.
    """
    try:
        from smi.comparison_page import write_page
    except ModuleNotFoundError as error:
        raise SmiError(f"a comparison needs {error.name}; install it with: pip install {error.name}.") from None
    config, folder = config or Config(), Path(out)
    if not isinstance(model, SparseModel):
        model = SparseModel(model, precision=config.precision, ranking=config.model_ranking)
    lesson = lesson or TransferConfig(mode="finetune", batch_size=32, learning_rate=1e-3, weight_decay=0.05)
    how = how or CompareConfig()
    work = Comparison(model, folder, config, how, judge, data, real, student, lesson, progress)
    record = work.run()
    write_page(record, folder)
    return record
