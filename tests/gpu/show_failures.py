"""A pytest plugin: failures are shown at once, for time on a GPU may end before pytest sums up.

python -m pytest -p show_failures -m gpu tests/gpu/test_gpu.py     # with tests/gpu on PYTHONPATH
"""

from __future__ import annotations

import pytest

TERMINAL: list[pytest.TerminalReporter] = []


@pytest.hookimpl(trylast=True)  # the reporter of the terminal comes with the others
def pytest_configure(config: pytest.Config) -> None:
    found = config.pluginmanager.get_plugin("terminalreporter")
    if found is not None:
        TERMINAL.append(found)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if TERMINAL and report.failed:
        TERMINAL[0].write_line(
            f"\nFAILED NOW {report.nodeid} ({report.when})\n{report.longreprtext}"
        )
