"""The README's end-to-end tables, from the records of `benchmarks.end_to_end`."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end import MODELS
from benchmarks.end_to_end_rows import speed_up, steady_rows
from benchmarks.gate import OURS

NOT_MEASURED = "not measured"
GOAL_DEVICE = "H200"
# Least speed-up over a baseline in the steady phase, for Ti, S, B and L.
GOALS: dict[tuple[str, int], tuple[float, float, float, float]] = {
    ("C16", 128): (2.2, 1.8, 1.4, 1.25),
    ("C16", 32): (2.0, 1.8, 1.4, 1.25),
    ("E32s", 128): (10, 12, 12, 13),
    ("E32s", 32): (12, 8, 10, 12),
    ("E32d", 128): (40, 50, 50, 55),
    ("E32d", 32): (18, 28, 42, 50),
}
MEMORY_GOAL = 0.25  # of E32s, above weights and pixels


def digits(value: float) -> str:
    """One decimal, or three digits where that would leave fewer: an iteration is long on a CPU and short on a GPU."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def section(record: dict[str, Any], where: str) -> str:
    """One record as Markdown.

    Args:
        where: hardware, versions and commit, for people.
    """
    weights = "random weights" if record["random_weights"] else "published weights"
    lines = [
        f"End to end, {weights}; {where}; medians of up to {record['rounds']} interleaved rounds of {record['steps']} "
        "iterations. A ratio is over that row's time; it is absent where a gate failed, and ~ marks one whose spread "
        "exceeds the difference. Memory is the peak above weights, pixels and moments, from the dense start on. "
        f"MFU and floor are against the copies and {'/'.join(record['ceilings'])} products measured in the same run. A "
        "composed schedule adds up the times of its phases.",
        "",
        f"| model | batch | | ms/iteration | 20-80 % | {OURS} is faster | schedule, s | images/s | images/GPU-hour | "
        "memory, MiB | GFLOP | MFU | of floor | launches | teacher agrees (at iteration) | cross-entropy | SM MHz |",
        "|" + "---|" * 17,
    ]
    for rows in steady_rows(record).values():
        lines += [_line(row, rows.get(OURS), _whole(record, row)) for row in rows.values()]
    lines += ["", *published(record)]
    skipped = [f"{s['model']} batch {s['batch_size']} {s['implementation']}: {s['reason']}" for s in record["skipped"]]
    return "\n".join([*lines, *(["", "Left out: " + "; ".join(skipped) + "."] if skipped else [])])


def _line(row: dict[str, Any], ours: dict[str, Any] | None, whole: dict[str, Any] | None) -> str:
    shown = row if whole is None else {**row, **{k: whole[k] for k in _SCHEDULE}, "final": whole["final"]}
    composed = " composed" if shown.get("schedule") == "composed" else ""
    final, clocks = shown["final"], [c for c in row["sm_clock_mhz"] if c is not None]
    gate = "" if row["gate"]["passed"] else f", gate failed: {row['gate']['reason']}"
    notes = f" ({', '.join(row['notes'])})" if row["notes"] else ""
    cells = [
        row["model"],
        row["batch_size"],
        f"{row['implementation']}: {row['about']}{notes}{gate}",
        f"{1e3 * row['seconds']:.3g}",
        f"{1e3 * row['low']:.3g}-{1e3 * row['high']:.3g}",
        "" if ours is None or row is ours else speed_up(ours, row),
        _figure(shown.get("schedule_seconds"), "{:.4g}") + composed,
        _figure(shown.get("images_per_second"), "{:.3g}"),
        _figure(shown.get("images_per_gpu_hour"), "{:.0f}"),
        _figure(row["memory"] and row["memory"] / 2**20, "{:.0f}"),
        _figure(row["flops"] and row["flops"] / 1e9, "{:.4g}"),
        _figure(row["mfu"], "{:.1%}"),
        _figure(row["of_floor"], "{:.1%}"),
        _figure(row["launches"], "{:.0f}"),
        f"{final['teacher_agreement']:.1%} ({final['iterations'] or 'uncounted'})",
        f"{final['cross_entropy']:.3g}",
        "-".join(map(str, clocks)) or NOT_MEASURED,
    ]
    return f"| {' | '.join(map(str, cells))} |"


_SCHEDULE = ("schedule_seconds", "schedule", "images_per_second", "images_per_gpu_hour")


def _whole(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """The measured schedule that belongs to a row of the steady phase."""
    same = ("model", "batch_size", "implementation")
    found = [r for r in record["rows"] if r["phase"] == "whole" and all(r[k] == row[k] for k in same)]
    return found[-1] if found else None


def _figure(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


def published(record: dict[str, Any]) -> list[str]:
    """Ours in the terms of the papers: whole schedules, sparse over dense."""
    lines = []
    for (model, batch), rows in steady_rows(record).items():
        over = []
        for fast, slow in (("E32s", "E32d"), (OURS, "E32d"), (OURS, "E32s")):
            if fast not in rows or slow not in rows:
                continue
            if not (rows[fast]["gate"]["passed"] and rows[slow]["gate"]["passed"]):
                continue
            a, b = (_whole(record, rows[n]) or rows[n] for n in (fast, slow))
            composed = ", composed" if "composed" in (a["schedule"], b["schedule"]) else ""
            over.append(f"{fast} over {slow} {b['schedule_seconds'] / a['schedule_seconds']:.2f}x{composed}")
        if over:
            lines.append(
                f"Whole schedules of {model}, batch {batch}, in the papers' terms (over dense, Hu et al., ICML 2024, "
                f"state 3.79x, Heo & Choi, arXiv 2509.23235, 10x), one run of each: {'; '.join(over)}."
            )
    return lines


def goals(records: list[dict[str, Any]]) -> str:
    """Goal beside what was measured on the GPU that the goals are for, in bf16; "not measured" where nothing was."""
    gpus = [(record, record["environment"]["gpu"]) for record in records]
    found = [steady_rows(record) for record, gpu in gpus if gpu is not None and GOAL_DEVICE in gpu["name"]]
    lines = [
        f"Goals, steady phase, bf16, {GOAL_DEVICE} (`python -m benchmarks.end_to_end`):",
        "",
        "| goal | measured |",
        "|---|---|",
    ]
    for (baseline, batch), least in GOALS.items():
        for short, goal in zip(MODELS, least, strict=True):
            rows = _together(found, MODELS[short], batch, baseline)
            reached = speed_up(rows[OURS], rows[baseline]) or "gate failed" if rows else NOT_MEASURED
            lines.append(f"| {short}, batch {batch}: at least {goal:g}x over {baseline} | {reached} |")
    for short, model in MODELS.items():
        for batch in (128, 32):
            lines.append(
                f"| {short}, batch {batch}: memory above weights and pixels at most {MEMORY_GOAL:g} of E32s "
                f"| {_memory(_together(found, model, batch, 'E32s'))} |"
            )
    return "\n".join(lines)


def _together(found: list[dict[Any, dict[str, dict[str, Any]]]], model: str, batch: int, other: str) -> dict[str, Any]:
    """Rows of the last record in which ours and `other` took turns; nothing if there is none."""
    for rows in reversed([records.get((model, batch), {}) for records in found]):
        if OURS in rows and other in rows:
            return rows
    return {}


def _memory(rows: dict[str, dict[str, Any]]) -> str:
    used = [rows[name]["memory"] if name in rows else None for name in (OURS, "E32s")]
    if used[0] is None or not used[1]:
        return NOT_MEASURED
    return f"{used[0] / used[1]:.2f}"
