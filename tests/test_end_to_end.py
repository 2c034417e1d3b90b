"""The end-to-end benchmark on a network of no size, and its tables. No test here depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import one_thread, tiny  # noqa: F401

import smi
import smi_kernels.descent
from benchmarks import end_to_end, gate, implementations, readme_end_to_end
from benchmarks import end_to_end_rows as rows
from benchmarks.implementations import begin, random_weights

CPU = torch.device("cpu")
CONFIG = smi.Config(iterations=14, prune_at=(3, 6, 9), prune_ratio=(0.3, 0.3, 0.3), batch_size=3)


def network() -> Any:
    model = tiny()
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


def run(folder: Path, minutes: float = 5, **options: Any) -> dict[str, Any]:
    record = end_to_end.new_record(CPU, random_weights=True, steps=1, rounds=2)
    given: dict[str, Any] = {"implementations": ("SMI", "E32d", "E32s", "ToMe"), "whole": ("SMI",), **options}
    clock = end_to_end.Clock(minutes)
    end_to_end.measure("tiny", network(), CONFIG, record, folder, device=CPU, clock=clock, steps=1, rounds=2, **given)
    return record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    found = run(folder)
    assert json.loads((folder / "end_to_end-cpu.json").read_text()) == found
    return found


def test_every_implementation_passes_its_gate_and_has_a_row(record: dict[str, Any]) -> None:
    found = rows.steady_rows(record)["tiny", 3]
    assert list(found) == ["SMI", "E32d", "E32s", "ToMe"]
    assert all(row["gate"]["passed"] for row in found.values()), [row["gate"] for row in found.values()]
    assert [p["fed"] for p in found["SMI"]["phases"]] == [16, 11, 7, 4]
    assert [p["iterations"] for p in found["SMI"]["phases"]] == [3, 3, 3, 5]
    assert [p["fed"] for p in found["E32d"]["phases"]] == [16]
    assert found["E32d"]["flops"] > 3 * found["E32s"]["flops"]
    assert found["ToMe"]["flops"] is None
    assert all(row["launches"] is None and row["memory"] is None for row in found.values())


def test_on_a_gpu_what_is_timed_of_ours_is_replayed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for graphs: captures and launches by the host fall outside of all timed stretches."""
    monkeypatch.setattr(implementations, "WARM", implementations.WARM_ON_GPU)
    model = smi.SparseModel(network())
    start = begin(network(), model.info, CONFIG, CPU)
    made = implementations.Implementation("SMI", network(), model, start, steps=24, rounds=2)
    stretches: list[list[str]] = [[]]
    monkeypatch.setattr(made, "wait", lambda: stretches.append([]))  # before and after each
    descent = made._run._descent

    class Graph:
        def __init__(self, body: Any, device: torch.device) -> None:
            stretches[-1].append("capture")
            self.replay = body

    iterate = descent._iterate

    def told(iterations: int) -> None:
        stretches[-1].append("replay" if iterations == 8 else "launched")
        iterate(iterations)

    monkeypatch.setattr(smi_kernels.descent, "Graph", Graph)
    monkeypatch.setattr(descent, "_iterate", told)
    descent.in_graphs = True
    rows.phases(made, gate.judged([1.0], 1.0, "bf16"), steps=24)
    rows.steady({"SMI": made}, 24, 2, CPU, end_to_end.Clock(5))
    timed, between = stretches[1::2], stretches[::2]
    assert timed == [["replay"] * 3] * 6  # four phases and two rounds
    later = ["launched", "launched", "capture", "replay"]  # the first for the ranking
    assert between == [["launched", "capture", "replay"], later, later, later, [], [], []]


def test_a_composed_schedule_adds_up_its_phases(record: dict[str, Any]) -> None:
    row = rows.steady_rows(record)["tiny", 3]["SMI"]
    early = [3 * p["seconds_per_iteration"] for p in row["phases"][:3]]
    assert row["schedule"] == "composed"
    assert row["schedule_seconds"] == pytest.approx(sum(early) + 5 * row["seconds"])
    assert row["images_per_gpu_hour"] == pytest.approx(3600 * 3 / row["schedule_seconds"])


def test_a_whole_schedule_ends_where_the_library_does(record: dict[str, Any]) -> None:
    (row,) = [r for r in record["rows"] if r["phase"] == "whole"]
    expected = smi.invert(network(), [0, 1, 2], CONFIG.replace(semantics="official", result_mask="carried"))
    assert row["schedule"] == "measured" and row["final"]["iterations"] == 14
    assert row["final"]["cross_entropy"] == pytest.approx(expected.losses["cross_entropy"].mean().item(), rel=1e-4)
    agreed = (expected.logits.argmax(1) == expected.targets).float().mean().item()
    assert row["final"]["teacher_agreement"] == pytest.approx(agreed)


def test_without_time_nothing_begins_and_the_record_says_so(tmp_path: Path) -> None:
    found = run(tmp_path, minutes=0)
    assert not found["rows"]
    assert [s["reason"] for s in found["skipped"]] == ["no time left"] * 4
    assert "no time left" in readme_end_to_end.section(found, "here")


def test_no_network_is_loaded_once_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["end_to_end", "--minutes", "0", "--models", "L", "--batch-sizes", "1", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--implementations", "SMI", "E32s", "--out", str(tmp_path)])
    monkeypatch.setattr(smi, "load_model", lambda *_, **__: pytest.fail("a network was loaded"))
    end_to_end.main()
    (file,) = tmp_path.glob("*.json")
    skipped = json.loads(file.read_text())["skipped"]
    assert [(s["batch_size"], s["implementation"], s["reason"]) for s in skipped] == [
        (batch, which, "no time left") for batch in (1, 2) for which in ("SMI", "E32s")
    ]


def test_what_fails_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("no such kernel\nand more")  # Triton's errors are no RuntimeErrors either

    monkeypatch.setattr(gate.Reference, "of_baseline", fail)
    found = run(tmp_path, implementations=("SMI", "E32s"), whole=())
    assert [r["implementation"] for r in found["rows"]] == ["SMI"]
    assert [s["reason"] for s in found["skipped"]] == ["LookupError: no such kernel"]


def test_what_fails_when_all_take_turns_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that suffices for each alone need not suffice for all; and a profiler may fail."""
    advance, count, done = implementations.Implementation.advance, rows.launches, dict[str, int]()

    def starving(made: Any, iterations: int) -> None:
        done[made.name] = done.get(made.name, 0) + 1
        if made.name == "E32d" and done[made.name] > 2:  # after the one phase that it has
            raise torch.cuda.OutOfMemoryError("no room")
        advance(made, iterations)

    def failing(made: Any) -> Any:
        if made.name == "ToMe":
            raise RuntimeError("no profiler")
        return count(made)

    monkeypatch.setattr(implementations.Implementation, "advance", starving)
    monkeypatch.setattr(rows, "launches", failing)
    found = run(tmp_path, whole=())
    assert [row["implementation"] for row in found["rows"]] == ["SMI", "E32s"]
    assert [(s["implementation"], s["reason"]) for s in found["skipped"]] == [
        ("E32d", "out of memory beside the others"),
        ("ToMe", "RuntimeError: no profiler"),
    ]


def test_the_gate_fails_another_network_and_the_verdict_names_the_figure() -> None:
    ours, other = network(), tiny(seed=8)
    other.pretrained_cfg = ours.pretrained_cfg
    model = smi.SparseModel(ours)
    reference = gate.Reference(ours, begin(ours, model.info, CONFIG, CPU), kept=4)
    assert reference.gate("SMI", model).passed
    found = reference.gate("SMI", smi.SparseModel(other))
    assert not found.passed and "expected at least 0.9999" in found.reason
    nan = float("nan")
    assert not any(gate.judged(found, None, "bf16").passed for found in ([nan], [1.0, nan], [nan, 1.0], [1.0, 0.99]))
    assert not gate.judged([1.0], 0.5, "bf16").passed and not gate.judged([1.0], nan, "bf16").passed
    assert gate.judged([0.9995, 1.0], 0.96, "bf16").passed and not gate.judged([0.9995], 0.96, "fp32").passed


def test_shared_patches_by_hand() -> None:
    assert gate.shared(torch.tensor([[0, 1, 5], [2, 3, 4]]), torch.tensor([[1, 5, 7], [2, 3, 4]])) == pytest.approx(
        5 / 6
    )


def test_bf16_passes_the_gate_with_the_random_weights_of_the_benchmark() -> None:
    model = tiny(embed_dim=48, depth=6, num_heads=3)
    random_weights(model)
    model.pretrained_cfg = network().pretrained_cfg
    sparse = smi.SparseModel(model)
    reference = gate.Reference(model, begin(model, sparse.info, CONFIG, CPU), kept=4)
    assert reference.gate("A16", sparse).passed
    assert reference.gate("PatchDropout", sparse).passed


# performance.md of the project, section 3: GFLOP and microseconds at 790 TFLOP/s and 4.3 TB/s, as printed there.
FLOORS = [
    (12, 192, 46, 32, 33, 68), (12, 192, 196, 128, 660, 943), (12, 384, 46, 128, 500, 741),
    (12, 768, 46, 32, 488, 645), (24, 1024, 46, 128, 7133, 9136),
]  # fmt: skip


@pytest.mark.parametrize(("depth", "width", "kept", "batch", "gflop", "microseconds"), FLOORS)
def test_floors(depth: int, width: int, kept: int, batch: int, gflop: float, microseconds: float) -> None:
    info = smi.ModelInfo("", "", (3, 224, 224), (), (), (16, 16), (14, 14), 1, 1000, "class_attention")
    shape = (depth, width, 4.0)
    assert rows.needed_flops(info, shape, kept, batch) / 1e9 == pytest.approx(gflop, rel=0.02)
    floor = rows.floor_seconds(info, shape, kept, batch, 4.3e12, 790e12)
    assert 1e6 * floor == pytest.approx(microseconds, rel=0.02)


def row(name: str, seconds: float, passed: bool = True, memory: int | None = None) -> dict[str, Any]:
    return {
        "model": "deit_tiny_patch16_224",
        "batch_size": 32,
        "implementation": name,
        "about": "as described",
        "notes": [],
        "gate": {"passed": passed, "reason": "" if passed else "cosine of the gradient 0.5"},
        "phase": "steady",
        "seconds": seconds,
        "low": 0.9 * seconds,
        "high": 1.1 * seconds,
        "memory": memory,
        "flops": 2e9,
        "mfu": 0.25,
        "of_floor": 0.5,
        "launches": 130.0,
        "sm_clock_mhz": [1980, 1970],
        "final": {"iterations": 70, "cross_entropy": 1.5, "teacher_agreement": 0.75},
        **rows.throughput(4000 * seconds, 32, "composed"),
    }


def synthetic(*found: dict[str, Any], gpu: str = "NVIDIA H200") -> dict[str, Any]:
    environment = {"gpu": {"name": gpu}}
    about = {"random_weights": True, "rounds": 5, "steps": 20, "ceilings": {"bf16": {}}, "skipped": []}
    return {"benchmark": "end_to_end", **about, "environment": environment, "rows": list(found)}


def goal(text: str, *words: str) -> str:
    (line,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return line.split(" | ")[1].removesuffix(" |")


def test_ratios_are_marked_within_the_spread_and_absent_where_a_gate_failed() -> None:
    assert rows.speed_up(row("SMI", 1e-3), row("C16", 2e-3)) == "2.00x"
    assert rows.speed_up(row("SMI", 1e-3), row("C16", 1.1e-3)) == "~1.10x"
    assert rows.speed_up(row("SMI", 1e-3), row("C16", 2e-3, passed=False)) == ""
    assert rows.speed_up(row("SMI", 1e-3, passed=False), row("C16", 2e-3)) == ""


def test_goals_say_not_measured_until_that_gpu_has_run_them() -> None:
    nothing = readme_end_to_end.goals([])
    assert nothing.count("| not measured |") == 24 + 8
    found = [row("SMI", 1e-3, memory=100), row("C16", 2.5e-3), row("E32s", 9e-3, memory=500), row("E32d", 9e-2, False)]
    text = readme_end_to_end.goals([synthetic(*found)])
    assert goal(text, "Ti, batch 32", "2x over C16") == "2.50x"
    assert goal(text, "Ti, batch 32", "over E32s") == "9.00x"
    assert goal(text, "Ti, batch 32", "over E32d") == "gate failed"
    assert goal(text, "Ti, batch 32", "memory") == "0.20"
    assert goal(text, "Ti, batch 128", "over C16") == "not measured"
    assert readme_end_to_end.goals([synthetic(*found, gpu="NVIDIA A100")]) == nothing
    apart = [synthetic(row("SMI", 2e-3), row("C16", 9e-3)), synthetic(found[0], *found[2:])]  # in files of their own
    text = readme_end_to_end.goals(apart)
    assert goal(text, "Ti, batch 32", "2x over C16") == "4.50x"
    assert goal(text, "Ti, batch 32", "over E32s") == "9.00x" and goal(text, "Ti, batch 32", "memory") == "0.20"


def test_the_table_prints_a_measured_schedule_in_place_of_the_composed_one() -> None:
    measured = {**row("SMI", 1e-3), "phase": "whole", **rows.throughput(5.0, 32, "measured")}
    record = synthetic(row("SMI", 1e-3), row("E32d", 5e-2), row("E32s", 1e-2, passed=False), measured)
    text = readme_end_to_end.section(record, "one GPU")
    ours, dense, failed = [line.split(" | ") for line in text.splitlines() if "as described" in line]
    assert ours[6:9] == ["5", "6.4", "23040"]
    assert dense[5:9] == ["50.00x", "200 composed", "0.16", "576"]
    assert failed[5] == "" and "gate failed: cosine of the gradient 0.5" in failed[2]
    assert "SMI over E32d 40.00x, composed" in text and "E32s over E32d" not in text
