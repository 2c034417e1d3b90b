"""torchrun itself: its processes share a pool unasked, one is killed, and the pool is that of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small import one_thread  # noqa: F401
from typer.testing import CliRunner

from smi.cli import app
from smi.cli_options import InvertOptions
from smi.pool import Pool
from smi.pool_tools import verify

ROOT = Path(__file__).parent.parent
INVERT = ["invert", "embedded:teacher", "--num-images", "16", "--batch-size", "2", "--iterations", "40"]
INVERT += ["--prune-at", "5,10", "--prune-ratio", "0.5,0.5", "--device", "cpu"]


def holders(pool: Path) -> list[int]:
    """Processes that have a batch in hand."""
    found = []
    for claim in (pool / "workers").glob("*.claim"):
        try:
            name = claim.read_text().strip()
            found.append(int(json.loads((pool / "workers" / f"{name}.json").read_text())["process"].split("@")[0]))
        except (OSError, ValueError):
            continue  # given back since it was listed
    return found


def test_a_killed_process_is_restarted_and_the_pool_is_that_of_one_run(tmp_path: Path) -> None:
    pool, alone = tmp_path / "pool", tmp_path / "alone"
    result = CliRunner().invoke(app, [*INVERT, "--out", str(alone)])
    assert result.exit_code == 0, result.output

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1", "-m", "smi", *INVERT, "--out", str(pool)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(launch, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until, killed = time.monotonic() + 240, 0
        while not killed and running.poll() is None and time.monotonic() < until:
            if list(pool.glob("shards/*")) and (busy := holders(pool)):
                os.kill(busy[0], signal.SIGKILL)
                killed = busy[0]
            time.sleep(0.01)
        said = running.communicate(timeout=240)[1]
    finally:
        running.kill()
    assert killed, said
    assert running.returncode == 0, said

    found = verify(pool)
    assert not found.problems and not found.missing and found.images == 16
    ours, theirs = Pool(pool), Pool(alone)
    assert ours.batches == theirs.batches
    for batch in theirs.batches:
        assert np.array_equal(ours.load(batch).images, theirs.load(batch).images)


@pytest.mark.parametrize(
    ("environment", "asked", "joins"),
    [
        ({}, None, False),
        ({"WORLD_SIZE": "8"}, None, False),  # other launchers set it too, and may mean fixed parts
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1"}, None, False),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, None, True),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, False, False),
        ({}, True, True),
    ],
)
def test_several_processes_of_torchrun_join_unless_told_otherwise(
    environment: dict[str, str], asked: bool | None, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert InvertOptions(model="embedded:teacher", join=asked).joins is joins
