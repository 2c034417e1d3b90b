#!/usr/bin/env python
"""Write the measured figures of the README and docs/benchmarks.md from the result files, so that none is ever typed.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.readme_end_to_end import digits, published

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: made by python -m benchmarks.readme -->", "<!-- end of measured -->"


def results(benchmark: str) -> list[dict[str, Any]]:
    """All result files of one benchmark, by file name."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return [record for record in records if record["benchmark"] == benchmark]


def measured() -> str:
    parts = [_speed(record) for record in results("sparse_vs_dense")]
    parts += [_operators(record) for record in results("cpu_operators")]
    parts += [_agreement(record) for record in results("agreement")]
    for record in results("end_to_end"):
        weights = "random weights" if record["random_weights"] else "published weights"
        text = " ".join(line for line in published(record) if line)
        head = f"Against plain PyTorch as others write it ([what each is](docs/benchmarks.md)), {weights}"
        parts.append(f"{head}; {where(record)}. {text}")
    return "\n\n".join(parts)


def where(record: dict[str, Any]) -> str:
    where = record["environment"]
    cores = f"{where['cpu_threads']} core{'s' if where['cpu_threads'] > 1 else ''}"
    hardware = where["gpu"]["name"] if where["gpu"] else f"{cores} of {where['cpu']}"
    return f"{hardware}, torch {where['torch']}, commit {where['commit']}"


def _speed(record: dict[str, Any]) -> str:
    final, whole = record["final_phase"], record["whole_schedule"]
    weights = ", random weights" if record["random_weights"] else ""
    lines = [
        f"Sparse against dense: `{record['model']}`{weights}, preset `{record['preset']}` ({record['iterations']} "
        f"iterations), batch {record['batch_size']}; {where(record)}; medians of "
        f"{record['rounds']['final_phase']} and {record['rounds']['whole_schedule']} interleaved rounds.",
        "",
        "| | patches | final phase, ms/iteration | whole schedule, s | GFLOP/image | teacher agreement |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("dense", "sparse"):
        lines.append(
            f"| {name} | {final[name]['kept']} | {digits(1e3 * final[name]['seconds_per_iteration'])} | "
            f"{digits(whole[name]['seconds'])} | {whole[name]['gflop_per_image']:.0f} | "
            f"{whole[name]['teacher_agreement']:.1%} |"
        )
    lines.append(
        f"| **ratio** | | **{final['ratios']['speed_up']:.2f}x**, of {final['ratios']['flop_ratio']:.2f}x in work "
        f"| **{whole['ratios']['speed_up']:.2f}x** | {whole['ratios']['flop_ratio']:.2f}x | |"
    )
    return "\n".join(lines)


def _operators(record: dict[str, Any]) -> str:
    lines = [
        f"Compiled operators against plain PyTorch doing the same sparse work: {record['kept']} patches of 224 x 224 "
        f"pixels, float32; operators {record['operators'].split(',')[0]}; {where(record)}; medians of "
        f"{record['rounds']} interleaved rounds.",
        "",
        "| | PyTorch, ms | compiled, ms | ratio |",
        "|---|---|---|---|",
    ]
    titles = {
        "image_side": "image side alone: read under roll and flip, priors, Adam, clamp; batch 32",
        "whole_iteration": f"whole iteration of `{record['model']}`; batch {record['batch_size']}",
    }
    for name, title in titles.items():
        row = record[name]
        plain, compiled = (1e3 * row[side]["seconds"] for side in ("plain", "compiled"))
        lines.append(f"| {title} | {plain:.1f} | {compiled:.1f} | **{row['speed_up']:.2f}x** |")
    return "\n".join(lines)


def _agreement(record: dict[str, Any]) -> str:
    lines = [
        f"Do the images carry the class? {record['images']} images of `{record['model']}` a row and seed, "
        f"{record['seeds']} seed{'s' if record['seeds'] > 1 else ''}, preset `{record['preset']}`; the judge is an "
        f"independent network that took no part; {where(record)}.",
        "",
        "| | teacher agrees | judge agrees, image as is | judge agrees, dropped patches mean | TFLOP |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        shares = [row["teacher_agreement"], *row["judge_agreement"].values()]
        lines.append(f"| {name} | {' | '.join(_share(s) for s in shares)} | {row['flops'] / 1e12:.1f} |")
    return "\n".join(lines)


def _share(values: list[float]) -> str:
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


def filled(readme: str) -> str:
    """`readme` with the measured part made anew."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{measured()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
    (ROOT / "docs" / "benchmarks.md").write_text(page(results, where))


if __name__ == "__main__":
    main()
