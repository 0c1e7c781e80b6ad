"""Options of the benchmarks, and what they record about the machine."""

from pathlib import Path

import pytest
import torch

from benchmarks import ceilings as ceilings_of
from benchmarks.configs import CONFIGS
from benchmarks.machine import default_device, describe
from benchmarks.operator_race import FORMS, Case, Race, run_race, tiny_cases


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-model", choices=sorted(CONFIGS), default="sd15")
    group.addoption("--bench-latents", type=int, nargs="+", default=[32, 64], metavar="SIZE")
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
    group.addoption("--bench-forms", choices=FORMS, nargs="+", default=list(FORMS))
    group.addoption(
        "--bench-ceilings", type=Path, help="JSON of benchmarks.ceilings; by default measured"
    )


def pytest_generate_tests(metafunc):
    if "latent_size" in metafunc.fixturenames:
        sizes = metafunc.config.getoption("--bench-latents")
        metafunc.parametrize("latent_size", sizes, scope="module")
    if "race_of" in metafunc.fixturenames:
        operator, names = metafunc.module.OPERATOR, metafunc.module.SHAPES
        if default_device().type == "cpu":
            names = tiny_cases(operator)
        names = metafunc.config.getoption("--bench-shapes") or names
        cases = [Case.parse(operator, name) for name in names]
        metafunc.parametrize("race_of", cases, ids=lambda case: case.label, indirect=True)
        metafunc.parametrize("form", metafunc.config.getoption("--bench-forms"))


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
    forms = tuple(request.config.getoption("--bench-forms"))
    return run_race(request.param, device, dtype, rounds, forms, ceilings)
