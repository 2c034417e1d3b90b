"""Hostile input: nothing is unpickled or executed, no file of a pool leads out of it, absurd values are one line."""

from __future__ import annotations

import ast
import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import INFO, fill_pool

from smi.cli_words import parse_classes, parse_duration, parse_numbers, parse_setting, parse_shard
from smi.config import Config
from smi.errors import SmiError
from smi.models import read_state_dict
from smi.pool import Pool
from smi.quantization_file import _check, load_program

SOURCE = Path(__file__).parent.parent
fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_loader_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Malicious()}, "model.pth")
    with pytest.raises(SmiError, match="would have to run code"):
        read_state_dict(Path("model.pth"))
    with zipfile.ZipFile("model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/archive_version", "0")
        archive.writestr("model/version", "3")
        archive.write("model.pth", "model/data/sample_inputs/model.pt")
    with pytest.raises(Exception, match=r"(?i)weights"):
        load_program(Path("model.pt2"))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "told",
    [
        {"config": {"weight": {"use_pickle": True}}},
        {"guards_code": ["__import__('os').mkdir('executed')"]},
        {"nodes": [{"target": "torch.os.system"}]},
        {"nodes": [{"target": "torch.ops.aten.from_file.default"}]},
        {"expr": {"expr_str": "__import__('os').mkdir('executed')"}},
        {"expr": {"expr_str": "9**9**9"}},
    ],
)
def test_programs_that_would_run_code_are_refused(told: Any) -> None:
    with pytest.raises(ValueError):
        _check(told)


def test_the_source_unpickles_nothing() -> None:
    found = []
    for file in [*SOURCE.glob("smi/**/*.py"), *SOURCE.glob("scripts/*.py"), *SOURCE.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                bad = call in ("pickle.load", "pickle.loads", "yaml.load") or given.get("allow_pickle") == "True"
                if bad or (call == "torch.load" and given.get("weights_only") != "True"):
                    found.append(f"{file.name}:{node.lineno}")
    assert found == []


def test_links_out_of_a_pool_are_not_followed(tmp_path: Path) -> None:
    path = fill_pool(tmp_path / "pool")
    shard = path / "shards" / "00000.safetensors"
    os.rename(shard, tmp_path / "away")
    shard.symlink_to(tmp_path / "away")
    with pytest.raises(SmiError, match="is a link"):
        Pool(path).load(0)


@pytest.mark.parametrize("text", ["iterations: " + "9" * 5000, "self: 1", "seed: 2001-99-99", "1: 2", "[" * 5000])
def test_absurd_configs_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SmiError) as told:
        Config.load(tmp_path / "c.yaml")
    assert len(str(told.value)) < 1500


@fuzz
@given(st.text(max_size=40) | st.text("0123456789,-/.hms[]=", max_size=40))
def test_option_strings_give_values_or_errors(text: str) -> None:
    calls = (parse_duration, parse_shard, parse_setting, lambda t: parse_numbers("--x", t))
    for call in (*calls, lambda t: parse_setting(f"tv2={t}"), lambda t: parse_classes(t, INFO)):
        with contextlib.suppress(SmiError):
            call(text)
