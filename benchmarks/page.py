"""docs/benchmarks.md: everything that was measured, from the result files, and what was not."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.long_run import FLAT
from benchmarks.operations import VENDOR, clear
from benchmarks.readme_end_to_end import NOT_MEASURED, digits, goals, section
from benchmarks.table_of_truth import EQUAL_COST, INVERTED, QUANTIZED

Record = dict[str, Any]
Results = Callable[[str], list[Record]]
Where = Callable[[Record], str]


def page(results: Results, where: Where) -> str:
    """The whole page.

    Args:
        results: benchmark -> its records.
        where: hardware, versions and commit of a record, for people.
    """
    runs = results("end_to_end")
    parts = [
        "# What was measured",
        "Made by `python -m benchmarks.readme` from the files in `benchmarks/results/`; the README has the figures of "
        "everyday use. One command measures all that a GPU can tell, in nine minutes: `python -m benchmarks.everything "
        "--out FOLDER`.",
        "## End to end",
        *[section(record, where(record)) for record in runs],
        *([] if runs else [_nothing("benchmarks.end_to_end")]),
        goals(runs),
        "## Operators",
        *_all("operations", operations, results, where),
        "## How cost grows",
        *_all("scaling", scaling, results, where),
        "## What images are worth",
        "For most of its training the embedded teacher missed half of the patches of every image, drawn at random. "
        "`local-dir:whole` is a second one that missed none (`python scripts/train_embedded.py whole`; the first three "
        "of its five epochs had the learning rates of a run of eight).",
        *_all("table_of_truth", truth, results, where),
        "## Do rankings find the patches that matter?",
        *_all("rankings", rankings, results, where),
        "## When should pruning begin?",
        *_all("when_to_prune", when_to_prune, results, where),
        "## Eight bits on a CPU",
        *_all("int8", int8, results, where),
        "## Reliance on backgrounds",
        *_all("hallucination", hallucination, results, where),
        "## An hour on a CPU",
        *_all("long_run", long_run, results, where),
    ]
    return "\n\n".join(parts) + "\n"


def _all(name: str, shown: Callable[[Record, str], str], results: Results, where: Where) -> list[str]:
    return [shown(record, where(record)) for record in results(name)] or [_nothing(f"benchmarks.{name}")]


def _nothing(module: str) -> str:
    return f"{NOT_MEASURED.capitalize()}: `python -m {module}`."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def operations(record: Record, where: str) -> str:
    """Each operator of an iteration beside the fastest of what else computes it, and beside the vendor's product."""
    rows = []
    for row in record["rows"]:
        rivals = {name: times for name, times in row["rivals"].items() if name != VENDOR}
        best = min(rivals, key=lambda name: rivals[name]["median"], default="")
        ratios = [_ratio(row["warm"], rivals.get(best), row["passes"]), _ratio(row["warm"], row["rivals"].get(VENDOR), row["passes"])]  # fmt: skip  # noqa: E501
        launched = " with launches" if "launches" in rivals.get(best, {}) else ""
        seconds = row["warm"]["median"]
        rows.append(
            [
                f"`{row['operator']}`",
                "x".join(map(str, row["shape"])),
                str(row["calls"]),
                f"{1e6 * seconds:.1f} ({1e6 * row['warm']['low']:.1f}-{1e6 * row['warm']['high']:.1f})",
                f"{1e6 * row['cold']['median']:.1f}",
                f"{row['bytes'] / seconds / 1e9:.1f}",
                f"{row['flops'] / seconds / 1e9:.1f}",
                f"{best} {ratios[0]}{launched}" if best else "",
                ratios[1],
            ]
        )
    copy, matmul = record["ceilings"]["copy"], record["ceilings"]["matmul"]
    head = (
        f"`{record['model']}`, {record['kept']} patches, batch {record['batch_size']}, {record['precision']}, backend "
        f"`{record['backend']}`; {where}; medians of {record['rounds']} rounds (20-80 %). Measured in the same run: "
        f"copies {copy / 1e9:.1f} GB/s, products {matmul / 1e9:.0f} GFLOP/s. A ratio is over our time, ~ where "
        "quantiles overlap, and absent where the error gate failed. Cold: nothing of it in a cache."
    )
    columns = ["operator", "shape", "calls", "us warm", "us cold", "GB/s", "GFLOP/s", "fastest other", VENDOR]
    return f"{head}\n\n{_table(columns, rows)}"


def _ratio(ours: Record, theirs: Record | None, passes: bool) -> str:
    if theirs is None or not passes:
        return "" if theirs is None else "gate failed"
    return f"{'' if clear(ours, theirs) else '~'}{theirs['median'] / ours['median']:.2f}x"


def scaling(record: Record, where: str) -> str:
    """Milliseconds along each axis, with the fitted exponent."""
    rows = [
        [
            axis,
            "not fitted" if entry["exponent"] is None else f"{entry['exponent']:.2f}",
            ", ".join(f"{row[axis]}: {digits(1e3 * row['seconds']['median'])}" for row in entry["rows"]),
        ]
        for axis, entry in record["axes"].items()
    ]
    head = (
        f"Width and heads of DeiT-Tiny, {record['precision']}; {where}. Along each axis the rest stays at 46 patches, "
        "8 images, 12 blocks, 224 pixels; the exponent is fitted to the upper half."
    )
    picture = f"![cost along each axis](../benchmarks/results/scaling-{record['precision']}-{_kind(record)}.png)"
    return f"{head}\n\n{picture}\n\n{_table(['axis', 'exponent', 'size: ms an iteration'], rows)}"


def truth(record: Record, where: str) -> str:
    """The two tables of Hu et al. in layout: top-1 after quantization, and of students; a row for every source."""
    columns = list(next(iter(record["rows"].values()))["cells"])
    tested = f"{record['limit']:,} of its test images, spread evenly" if record["limit"] else "its test images"
    head = (
        f"Top-1 on {tested}; `{record['model']}` ({100 * record['teacher_top1']:.1f} % in float), preset "
        f"`{record['preset']}`, {record['images']} images a row and seed, {_seeds(record)}; {where}. Quantized "
        f"networks were calibrated on {record['calibrating']} images, sparse ones on their kept patches alone unless "
        "it says whole image (the mean in dropped patches)."
    )
    quantized = [c for c in columns if c in QUANTIZED]
    taught = [c for c in columns if c not in QUANTIZED]
    parts = [head, _cells(record, quantized), _cells(record, taught), _costs(record)]
    return "\n\n".join(part for part in parts if part)


def _cells(record: Record, columns: list[str]) -> str:
    rows = [
        [name, *(_share([found["top1"] for found in row["cells"][column]]) for column in columns)]
        for name, row in record["rows"].items()
    ]
    return _table(["images", *columns], rows) if columns else ""


def _seeds(record: Record) -> str:
    return f"{len(record['seeds'])} seeds (mean +- standard deviation)" if len(record["seeds"]) > 1 else "1 seed"


def _share(values: list[float]) -> str:
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _costs(record: Record) -> str:
    rows = []
    for name, row in record["rows"].items():
        cost = record["cost"].get("sparse strict" if name == EQUAL_COST else name)
        inverted = name in INVERTED or name == EQUAL_COST
        peak = cost and cost["peak_bytes"]
        rows.append(
            [
                name,
                str(row["images"]),
                f"{row['gflop_per_image'] * row['images'] / 1e3:.1f}" if inverted else "0",
                f"{cost['seconds_per_image'] * row['images']:.0f}" if cost else NOT_MEASURED if inverted else "0",
                f"{peak / 2**20:.0f}" if peak else NOT_MEASURED if inverted else "0",
            ]
        )
    return _table(["images", "number", "TFLOP of inversion", "seconds of inversion", "peak memory, MiB"], rows)


def rankings(record: Record, where: str) -> str:
    """What the patches that a ranking puts first or last still tell, against patches drawn at random."""
    columns = [
        (name, who, place)
        for name, entry in record["sets"].items()
        for who in ("judge" if "judge" in entry["told"]["random"] else "model",)
        for place in range(len(record["kept"]))
    ]
    head = (
        f"`{record['model']}`; {where}. Percent of images whose class so many of {record['patches']} patches tell, "
        "chosen once out of the whole image: of real images by the model itself, of inverted ones by a judge that took "
        f"no part. Random is the mean of {record['draws']} draws. "
        + "; ".join(f"{name}: {entry['images']}" for name, entry in record["sets"].items())
        + "."
    )
    chosen = next(iter(record["sets"].values()))["told"]
    rows = [
        [choice, *(f"{100 * record['sets'][n]['told'][choice][who][place]:.0f}" for n, who, place in columns)]
        for choice in chosen
    ]
    titles = [f"{name}: {record['kept'][place]}" for name, _, place in columns]
    return f"{head}\n\n{_table(['kept', *titles], rows)}"


def when_to_prune(record: Record, where: str) -> str:
    """Ranked patches against random ones by how long the inversion waits before it prunes."""
    base = record["config"]
    head = (
        f"`{record['model']}`, preset `{record['preset']}` with all steps of pruning moved by as many iterations of "
        f"{base['iterations']} (its own first is {base['prune_at'][0]}), {record['images']} images a cell and seed, "
        f"{_seeds(record)}; {where}. Percent of images in which a judge that took no part sees the class in the kept "
        "patches alone."
    )
    cells = record["cells"]
    cost = {start: found[0]["gflop_per_image"] for start, found in next(iter(cells.values())).items()}
    rows = [
        [start, *(_share([found["judge"] for found in of[start]]) for of in cells.values()), f"{gflop:.0f}"]
        for start, gflop in cost.items()
    ]
    return f"{head}\n\n{_table(['first pruning', *cells, 'GFLOP an image'], rows)}"


def int8(record: Record, where: str) -> str:
    """Quantized against float, both compiled."""
    sides, sizes = record["seconds"], record["bytes"]
    noisy = max(side["spread"] for side in sides.values()) > abs(
        sides["float32"]["median"] / sides["int8"]["median"] - 1
    )
    ratio = f"{'~' if noisy else ''}{record['speed_up']:.2f}x" if record["passed"] else "gate failed"
    weights = ", random weights" if record["random_weights"] else ""
    head = (
        f"`{record['model']}`{weights}, batch {record['batch_size']}, both through inductor with frozen weights; "
        f"{where}; medians of {record['rounds']} interleaved rounds. Of noise, eight bits change the logits by "
        f"{100 * record['errors']['quantized']:.1f} %, compiling them by {100 * record['errors']['compiled']:.1f} %."
    )
    rows = [
        ["float32", f"{1e3 * sides['float32']['median']:.1f}", "", f"{sizes['float32'] / 1e6:.1f}"],
        ["W8A8", f"{1e3 * sides['int8']['median']:.1f}", ratio, f"{sizes['int8'] / 1e6:.1f}"],
    ]
    return f"{head}\n\n{_table(['', 'ms a batch', 'faster', 'MB on disk'], rows)}"


def hallucination(record: Record, where: str) -> str:
    """What a reader sees in every kind of images, and how classifiers taught by them do on three tests."""
    columns = {
        "shape": "shape seen",
        "ground": "background seen",
        "matched": "matched background",
        "shifted": "any background",
        "conflicting": "another class's",
        "attention_outside": "attention outside",
        "gradient_outside": "gradient outside",
    }
    read = {name: f"{100 * share:.0f} %" for name, share in record["reader"].items()}
    head = (
        f"Drawn shapes whose background is of their class in {100 * record['matched']:.0f} % of the training images, "
        f"otherwise of any; {record['images']} images a row and seed, {_seeds(record)}; {where}. "
        "Seen: by a reader that knows shapes and backgrounds apart, in the kept patches alone (of new drawings it "
        f"reads {read['shape']} of the shapes and {read['ground']} of the backgrounds, of a random quarter of their "
        f"patches {read['shape in a quarter']} and {read['ground in a quarter']}). Then top-1, on three tests, of a "
        "linear classifier on the reader's features, taught by the images; and how much of its attention and gradient "
        "lies outside the shape: 1.00 is as much as if it looked anywhere alike."
    )
    rows = [
        [name, *(_measured([f[c] for f in found if c in f], "outside" in c) for c in columns)]
        for name, found in [("the teacher itself", [record["teacher"]]), *record["rows"].items()]
    ]
    picture = f"![what is seen, and what is learnt](../benchmarks/results/hallucination-{_kind(record)}.png)"
    return f"{head}\n\n{picture}\n\n{_table(['images', *columns.values()], rows)}"


def long_run(record: Record, where: str) -> str:
    """How much a process at work grows."""
    head = (
        f"`{record['model']}`, preset `{record['preset']}`, batch {record['batch_size']}, a pool on disk as of "
        f"`smi invert`; {where}; one process for {record['seconds'] / 60:.0f} minutes, looked at {record['samples']} "
        f"times. Growth is the slope of the least-squares line after the first {100 * record['warm_up']:.0f} % of the "
        f"time; memory counts as flat up to {100 * FLAT:.0f} % of itself an hour."
    )
    columns = {
        "images": f"{record['images']}",
        "batches": f"{record['batches']}",
        "resident, MB": f"{record['resident_mb']:.0f}",
        "peak, MB": f"{record['peak_mb']:.0f}",
        "growth, MB an hour": f"{record['mb_an_hour']:+.2f} ({'flat' if record['flat'] else 'not flat'})",
        "living tensors": f"{record['tensors_an_hour']:+.1f} an hour",
        "open files": f"{record['files_an_hour']:+.1f} an hour",
    }
    return f"{head}\n\n{_table(list(columns), [list(columns.values())])}"


def _measured(values: list[float], outside: bool) -> str:
    return (_outside if outside else _share)(values) if values else ""


def _kind(record: Record) -> str:
    """The end of the names of files of the device that `record` is of."""
    gpu = record["environment"]["gpu"]
    return "cpu" if gpu is None else str(gpu["name"]).lower().replace(" ", "-")


def _outside(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
