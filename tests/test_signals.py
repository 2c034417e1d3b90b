"""Commands that are told to stop: they leave all in order, say how to go on, and exit with 128 and the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pools import fill_pool
from typer.testing import CliRunner

import smi
from smi.cli import _stoppable, app
from smi.pool import Pool

STUDENT = ["vit_tiny_patch16_224", "--no-pretrained", "--img-size", "8", "--num-classes", "4"]
SIGNALS = [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped"), (signal.SIGHUP, "stopped")]


@pytest.mark.parametrize(("number", "said"), SIGNALS)
@pytest.mark.parametrize("command", ["transfer", "quantize", "export"])
def test_commands_stop_and_say_how_to_go_on(
    command: str, number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    for module, name in (("smi.cli_transfer", "TransferOptions.build"), ("smi.cli_quantize", "QuantizeOptions.build")):
        monkeypatch.setattr(f"{module}.{name}", stopped)
    monkeypatch.setattr("smi.export.export_pool", stopped)
    pool = str(fill_pool(tmp_path / "pool"))
    arguments = {
        "transfer": ["transfer", *STUDENT, "--pool", pool, "--out", str(tmp_path / "out")],
        "quantize": ["quantize", "embedded:teacher", "--pool", pool, "--out", str(tmp_path / "out")],
        "export": ["export", pool, str(tmp_path / "out")],
    }[command]
    inherited = {n: signal.signal(n, signal.SIG_DFL) for n in {number, signal.SIGINT}}  # nohup leaves hang-ups ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(app, arguments)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for each, handler in inherited.items():
            signal.signal(each, handler)
    again = "to go on" if command == "transfer" else "to begin again"
    assert (result.exit_code, result.stderr) == (128 + number, f"{said}; run the same command again {again}\n")


def test_a_second_signal_kills_and_what_is_ignored_stays_so() -> None:
    code = """if True:
        import os, signal, time
        from smi.cli import Stopped, _stoppable
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with _stoppable():
                os.kill(os.getpid(), signal.SIGHUP)
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
                except Stopped as stop:
                    print(stop.number, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
        finally:
            print("never", flush=True)
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, f"{int(signal.SIGTERM)}\n"), ended.stderr


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with _stoppable():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_a_joined_worker_that_is_told_to_stop_gives_back_what_it_has_in_hand(tmp_path: Path) -> None:
    out = tmp_path / "pool"
    arguments = ["invert", "embedded:teacher", "-b", "1", "-n", "3", "--device", "cpu", "--join", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "smi.cli", *arguments], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list((out / "workers").glob("*.claim")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143
    assert told.splitlines()[-1] == "stopped; run the same command again to go on"
    assert not (out / "workers").exists()
    assert smi.Pool is Pool and Pool(out).batches == []
