"""A plugin of pytest that prints each failure at once: a suite that is ended before its end has told what it found.

pytest -p benchmarks.failures --no-summary tests
"""

from __future__ import annotations

from typing import Any


class _Teller:
    def __init__(self, config: Any) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\nFAILED {report.nodeid}\n{report.longreprtext}")
            terminal.flush()


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # the process in front of xdist's workers hears of all reports
        config.pluginmanager.register(_Teller(config))
