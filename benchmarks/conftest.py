"""Options of the benchmarks, and what they record about the machine."""

from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.measure import ceilings as ceilings_of
from benchmarks.measure import race
from benchmarks.measure.machine import describe
from benchmarks.operators.race import FORMS, Case, Race, run_race, tiny_cases
from testing.configs import CONFIGS, TRANSFORMERS
from testing.problem import default_device


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-model", choices=sorted(CONFIGS), default="sd15")
    group.addoption("--bench-transformer", choices=sorted(TRANSFORMERS), default="pixart")
    group.addoption("--bench-latents", type=int, nargs="+", metavar="SIZE")
    group.addoption("--bench-batch", type=int, nargs="+", default=[1], metavar="B")
    group.addoption("--bench-steps", type=int, nargs="+", default=[4], metavar="K")
    group.addoption("--bench-rounds", type=int, default=5, help="timings of each form (default 5)")
    group.addoption(
        "--bench-dtype",
        choices=["float32", "float16", "bfloat16"],
        help="default float32 on a CPU, float16 on CUDA; operators: bfloat16 on CUDA",
    )
    group.addoption(
        "--bench-shapes",
        nargs="+",
        metavar="NAME",
        help="of an operator; default: the file's own on CUDA, a tiny one on a CPU",
    )
    group.addoption(
        "--bench-forms", nargs="+", metavar="FORM", help="default: all that the file has for here"
    )
    group.addoption(
        "--bench-memory",
        nargs="*",
        metavar="FORM",
        help="of the one pass on a CPU: whose peak memory is measured, in a process each",
    )
    group.addoption(
        "--bench-ceilings",
        type=Path,
        help="of benchmarks.measure.ceilings; by default measured",
    )


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    if "case" in metafunc.fixturenames:
        module = metafunc.module
        latents = option("--bench-latents") or module.LATENTS
        sizes = product(latents, option("--bench-batch"), option("--bench-steps"))
        cases = [race.Case(option("--bench-model"), *size) for size in sizes]
        metafunc.parametrize("case", cases, ids=lambda case: case.label, scope="module")
        default = module.default_forms(default_device())
        metafunc.parametrize("form", chosen_forms(metafunc.config, module.FORMS, default))
    if "race_of" in metafunc.fixturenames:
        operator, names = metafunc.module.OPERATOR, metafunc.module.SHAPES
        if default_device().type == "cpu":
            names = tiny_cases(operator)
        names = option("--bench-shapes") or names
        cases = [Case.parse(operator, name) for name in names]
        metafunc.parametrize("race_of", cases, ids=lambda case: case.label, indirect=True)
        metafunc.parametrize("form", chosen_forms(metafunc.config, FORMS, FORMS))


def chosen_forms(config, known, default):
    """The forms asked for, or the default, all of them known."""
    asked = config.getoption("--bench-forms") or default
    if unknown := [form for form in asked if form not in known]:
        raise pytest.UsageError(f"no form {unknown[0]!r}: choose of {', '.join(known)}")
    return asked


def pytest_benchmark_generate_machine_info(config):
    return describe(default_device())


@pytest.fixture(scope="module")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="module")
def dtype(request, device) -> torch.dtype:
    default = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, request.config.getoption("--bench-dtype") or default)


@pytest.fixture(scope="session")
def ceilings(request):
    path = request.config.getoption("--bench-ceilings")
    return ceilings_of.load(path) if path else ceilings_of.measure(default_device())


@pytest.fixture(scope="module")
def race_of(request, device, ceilings) -> Race:
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, request.config.getoption("--bench-dtype") or default)
    rounds = request.config.getoption("--bench-rounds")
    forms = tuple(chosen_forms(request.config, FORMS, FORMS))
    return run_race(request.param, device, dtype, rounds, forms, ceilings)
