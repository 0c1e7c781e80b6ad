"""Skips that continuous integration must not have."""

import re
from types import SimpleNamespace

import pytest

from tests.skips import NeededByCI


@pytest.mark.parametrize(
    ("reason", "ci", "counted", "status"),
    [
        ("no g++: the CUDA kernels cannot be executed on the CPU", "true", 1, 1),
        ("no ../shared/golden beside the checkout", "true", 1, 1),
        ("no nvcc: csrc is not compiled for GPUs (no CUDA toolkit)", "true", 1, 1),
        ("no g++: the CPU library cannot be built", "", 1, 0),
        ("no CUDA device", "true", 0, 0),
    ],
)
def test_a_skip_for_want_of_a_compiler_is_an_error_in_ci(monkeypatch, reason, ci, counted, status):
    monkeypatch.setenv("CI", ci)
    plugin, session, lines = NeededByCI(), SimpleNamespace(exitstatus=0), []
    place = ("tests/a.py", 3, f"Skipped: {reason}")
    reports = [("tests/a.py::one", True, place), ("tests/a.py::two", False, None)]
    for name, skipped, longrepr in reports:
        plugin.pytest_runtest_logreport(
            SimpleNamespace(nodeid=name, skipped=skipped, longrepr=longrepr)
        )
    plugin.pytest_sessionfinish(session)
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert session.exitstatus == status
    assert len(plugin.skipped) == counted
    assert [line.strip() for line in lines[1:]] == ["tests/a.py::one"] * counted


def test_a_page_that_was_not_opened_is_told_of(monkeypatch):
    monkeypatch.setenv("CI", "true")
    plugin, session, lines = NeededByCI(), SimpleNamespace(exitstatus=0), []
    place = ("tests/a.py", 3, "Skipped: no Chromium: the page is not opened")
    report = SimpleNamespace(nodeid="tests/a.py::one", skipped=True, longrepr=place)
    plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish(session)
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert (session.exitstatus, lines) == (0, ["1 tests skipped: no Chromium"])


def test_the_suite_has_the_plugin(pytestconfig):
    assert any(isinstance(x, NeededByCI) for x in pytestconfig.pluginmanager.get_plugins())


def test_the_reasons_are_those_that_the_tests_give(request):
    """A fixture that is told otherwise would be skipped unseen."""
    text = (request.config.rootpath / "tests" / "conftest.py").read_text("utf-8")
    golden = (request.config.rootpath / "tests" / "golden.py").read_text("utf-8")
    assert len(re.findall(r'pytest\.skip\(f?"no (g\+\+|nvcc)', text)) == 3
    assert "shared/golden beside the checkout" in golden
