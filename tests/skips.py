"""Tests that were skipped for want of what a continuous integration has: there they are failures.

A skip that nobody reads looks like a pass; `CI=true` counts those for want of the golden cases or
of a compiler, and ends with an error.
"""

from __future__ import annotations

import os

import pytest

# Words of the reasons that tests give.
NEEDED = ("shared/golden", "no g++", "no nvcc")
# Told of as well, and no error: continuous integration has none.
TOLD = ("no Chromium",)


class NeededByCI:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.told: list[str] = []

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and any(word in str(report.longrepr) for word in NEEDED):
            self.skipped.append(report.nodeid)
        if report.skipped and any(word in str(report.longrepr) for word in TOLD):
            self.told.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and os.environ.get("CI") == "true":
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.write_line(
                f"{len(self.skipped)} tests skipped for want of the golden cases or of a compiler"
                " (an error where CI=true):"
            )
            for name in self.skipped:
                terminalreporter.write_line(f"  {name}")
        if self.told:
            terminalreporter.write_line(f"{len(self.told)} tests skipped: no Chromium")
