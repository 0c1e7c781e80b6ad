"""What a run shows where the system does not say how much memory a process holds."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tiue.distill import monitor
from tiue.distill.step import StepResult


@pytest.fixture
def without_resource(monkeypatch):
    """The module as Windows imports it."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("monitor_of_windows", monitor.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show(module, config) -> tuple[dict, dict, str]:
    """The line of one update, the summary, and what is said of it."""
    shown = module.Monitor(config, Accelerator(cpu=True), 0, torch.ones(1000))
    shown.after_step(1, StepResult({"vsd": 1.0}, [5], [0.5]), images=3, seconds=0.1, rate=1e-3)
    summary = shown.close(1, "done")
    (line,) = (config.output / module.LOG).read_text().splitlines()
    return json.loads(line), summary, module.describe(summary, config.output)


def test_memory_is_left_out_where_it_is_not_known(without_resource, make_config) -> None:
    line, summary, said = show(without_resource, make_config(log_every=1))
    assert "memory_gib" not in line
    assert line["vsd"] == 1.0
    assert summary["peak_memory_gib"] is None
    assert "peak memory not known" in said


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_of_a_peak_is_the_systems(system, unit, make_config, monkeypatch) -> None:
    monkeypatch.setattr(monitor, "sys", SimpleNamespace(platform=system))
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(monitor.resource, "getrusage", lambda _: usage)
    line, summary, said = show(monitor, make_config(log_every=1))
    assert line["memory_gib"] == summary["peak_memory_gib"] == 3
    assert "peak memory 3.00 GiB" in said
