"""What `smi.compare` found, as a page for people: which method to use, and why one may believe it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smi.files import atomic_write, writing
from smi.report_figures import LIGHT, Panel, comparison

Read = Callable[[dict[str, Any], int], float]


def write_page(record: dict[str, Any], folder: Path) -> None:
    """Write ``compare.json``, ``compare.png`` and ``compare.md`` into `folder`, each whole or not at all."""
    with writing(folder):
        atomic_write(folder / "compare.json", json.dumps(record, indent=1).encode())
        atomic_write(folder / "compare.png", picture(record))
        atomic_write(folder / "compare.md", page(record).encode())


def picture(record: dict[str, Any]) -> bytes:
    """PNG: quality against cost for every measure, and how often every patch was updated."""
    cost, unit, scale = _cost(record)
    settings, controls = record["settings"], record["controls"]
    panels = []
    for title, (read, percent) in qualities(record).items():
        curves, counted = {}, {}
        for name, method in record["methods"].items():
            points = [_values(method, images, cost, read) for images in method["at_points"]]
            curves[name] = [(statistics.mean(spent) / scale, values) for spent, values in points]
            spent, values = _values(method, method["counted"], cost, read)
            counted[name] = (statistics.mean(spent) / scale, values)
        levels = {name: _values(control, settings["images"], cost, read)[1] for name, control in controls.items()}
        reference = record["teacher_top1"] if "top-1" in title else None
        # A number that grows with the budget is no line across.
        panels.append(Panel(title, curves, counted, levels if percent else {}, reference, percent))
    maps = {
        name: np.mean([cell["updates"]["map"] for cell in _largest(method)["images"]], 0)
        for name, method in record["methods"].items()
    }
    return comparison(panels, maps, unit, LIGHT)


def qualities(record: dict[str, Any]) -> dict[str, tuple[Read, bool]]:
    """Title -> how it is read from the cells of one number of images and seed, and whether it is a share."""
    settings = record["settings"]
    fill = settings["fill"] if settings["fill"] == "as-is" else "mean"
    found: dict[str, tuple[Read, bool]] = {}
    if settings["judge"] is not None:
        found[f"judge agrees (dropped patches {fill})"] = (
            lambda cells, seed: cells["images"][seed]["judge_agreement"][fill],
            True,
        )
        found["images that the judge recognises"] = (
            lambda cells, seed: cells["images"][seed]["judge_agreement"][fill] * cells["images"][seed]["images"],
            False,
        )
    else:
        found["teacher agrees"] = (lambda cells, seed: cells["images"][seed]["teacher_agreement"], True)
    any_cells = _largest(next(iter(record["methods"].values())))
    if "quantized" in any_cells:
        bits = f"W{settings['weights']}A{settings['activations']} {settings['observer']}"
        found[f"quantized teacher, {bits}, top-1"] = (lambda cells, seed: cells["quantized"][seed]["top1"], True)
    if "student" in any_cells:
        found["student, top-1"] = (lambda cells, seed: cells["student"][seed]["top1"], True)
    return found


def leader(values: Mapping[str, Sequence[float]]) -> str:
    """Which method is ahead, in words that say how sure that is: method -> one value for each seed."""
    ranked = sorted(values, key=lambda name: -statistics.mean(values[name]))
    first, *rest = ranked
    if not rest:
        return f"{first} was compared with nothing"
    ahead = statistics.mean(values[first]) - statistics.mean(values[rest[0]])
    if ahead == 0:
        return f"{first} and {rest[0]} are level"
    seeds = len(values[first])
    if seeds < 2:
        return f"{first} is ahead of {rest[0]}, with one seed, which does not tell how far chance goes"
    error = sum(statistics.variance(values[name]) / seeds for name in (first, rest[0])) ** 0.5
    if ahead > 2 * error:
        return f"**{first}** is ahead of {rest[0]} by more than two standard errors of {seeds} seeds"
    return f"{first} and {rest[0]} lie within two standard errors of {seeds} seeds"


def page(record: dict[str, Any]) -> str:
    """Markdown."""
    settings, methods = record["settings"], record["methods"]
    equal = {"flops": "number of operations", "seconds": "time", "images": "number of images"}[settings["equal"]]
    made = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Methods compared on {settings['model']['name']}",
        "",
        *(["**A quick trial of whether it runs: conclude nothing from it.**", ""] if record["quick"] else []),
        f"{settings['config']['iterations']} iterations, seeds {', '.join(map(str, record['seeds']))}, "
        f"{record['device']}, {made}. Cost is counted per image that is handed out: what one trajectory costs, over "
        "the images that come out of it. Round points: shares "
        f"{', '.join(f'{point:g}' for point in record['points'])} of an equal {equal}; squares: an equal number of "
        "images. Bands reach from the lowest seed to the highest.",
        "",
        "![quality against cost, and updates of each patch](compare.png)",
        "",
    ]
    if settings["equal"] != "images":
        lines += [f"## Equal {equal}", "", *_verdicts(record, lambda method: method["at_points"][-1]), ""]
        lines += [*_table(record, lambda method: method["at_points"][-1]), ""]
    lines += ["## Equal number of images", "", *_verdicts(record, lambda method: method["counted"]), ""]
    lines += [*_table(record, lambda method: method["counted"]), *_controls(record), "", _beside(record), ""]
    lines += ["## Updates of patches", "", *_updates(methods), ""]
    lines += [_how_to_read(record)]
    return "\n".join(lines) + "\n"


def _verdicts(record: dict[str, Any], chosen: Callable[[dict[str, Any]], int]) -> Iterator[str]:
    for title, (read, _) in qualities(record).items():
        values = {name: _values(method, chosen(method), "flops", read)[1] for name, method in record["methods"].items()}
        yield f"- {title}: {leader(values)}."


def _table(record: dict[str, Any], chosen: Callable[[dict[str, Any]], int]) -> Iterator[str]:
    shown = qualities(record)
    yield f"| method | images | TFLOP | seconds | images/s | {' | '.join(shown)} |"
    yield "|---" * (5 + len(shown)) + "|"
    for name, method in record["methods"].items():
        yield _row(name, method, chosen(method), shown)


def _row(name: str, method: dict[str, Any], images: int, shown: dict[str, tuple[Read, bool]]) -> str:
    flops = statistics.mean(_values(method, images, "flops", _nothing)[0])
    seconds = statistics.mean(_values(method, images, "seconds", _nothing)[0])
    cells = [_shown(_values(method, images, "flops", read)[1], percent=percent) for read, percent in shown.values()]
    rate = f"{images / seconds:.3g}" if seconds else "-"
    return f"| {name} | {images} | {flops / 1e12:.3g} | {seconds:.3g} | {rate} | {' | '.join(cells)} |"


def _controls(record: dict[str, Any]) -> Iterator[str]:
    """Rows that nothing was inverted for, the last that of the teacher itself."""
    shown = qualities(record)
    for name, control in record["controls"].items():
        yield _row(name, control, record["settings"]["images"], shown)
    if record["teacher_top1"] is not None:
        cells = [f"{record['teacher_top1']:.1%}" if "top-1" in title else "-" for title in shown]
        yield f"| none, the teacher in float | - | - | - | - | {' | '.join(cells)} |"


def _beside(record: dict[str, Any]) -> str:
    real = ", and `real`, pictures of the same classes" if "real" in record["controls"] else ""
    return (
        f"Controls cost no inversion, so they have no place at equal cost; there are as many of each as the equal "
        f"number: `noise`, Gaussian in the model's normalised space{real}. In the picture they are dotted lines."
    )


def _updates(methods: dict[str, Any]) -> Iterator[str]:
    yield "Times that a patch was fed and moved: of those that an image keeps, and of all together, per image."
    yield ""
    yield "| method | least | mean | most | of all patches, per image |"
    yield "|---|---|---|---|---|"
    for name, method in methods.items():
        every = [cell["updates"] for cell in _largest(method)["images"]]
        least, most = min(one["least"] for one in every), max(one["most"] for one in every)
        mean, together = (statistics.mean(one[key] for one in every) for key in ("mean", "per_image"))
        yield f"| {name} | {least} | {mean:.1f} | {most} | {together:.0f} |"


def _how_to_read(record: dict[str, Any]) -> str:
    judged = record["settings"]["judge"] is not None
    words = [
        "Seconds are those of the inversion alone, as it ran, methods in turns.",
        "With few images a share is coarse: n images give a standard error of up to 0.5 / sqrt(n)."
        + (" The judge saw none of the inversion." if judged else " No judge was named, so only the teacher speaks."),
    ]
    if record["teacher_top1"] is not None:
        words.append(f"The teacher itself has {record['teacher_top1']:.1%} (dashed).")
    return " ".join(words)


def _cost(record: dict[str, Any]) -> tuple[str, str, float]:
    """Key of the cost in a cell, name of the axis, and how many make its unit."""
    return ("seconds", "seconds", 1.0) if record["settings"]["equal"] == "seconds" else ("flops", "GFLOP", 1e9)


def _values(method: dict[str, Any], images: int, cost: str, read: Read) -> tuple[list[float], list[float]]:
    """Costs and qualities of so many images, one for each seed."""
    cells = _cells(method, images)
    seeds = range(len(cells["images"]))
    return [float(cells["images"][seed][cost]) for seed in seeds], [read(cells, seed) for seed in seeds]


def _cells(method: dict[str, Any], images: int) -> dict[str, Any]:
    found: dict[str, Any] = method["cells"][str(images)]
    return found


def _largest(method: dict[str, Any]) -> dict[str, Any]:
    return _cells(method, max(map(int, method["cells"])))


def _nothing(cells: dict[str, Any], seed: int) -> float:
    return 0.0


def _shown(values: Sequence[float], *, percent: bool) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.mean(values)
    if percent:
        return f"{mean:.1%}" + ("" if spread is None else f" +- {spread:.1%}")
    return f"{mean:.1f}" + ("" if spread is None else f" +- {spread:.1f}")
