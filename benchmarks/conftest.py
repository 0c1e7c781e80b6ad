"""Options of the benchmarks, and what they record about the machine."""

import pytest
import torch

from benchmarks.configs import CONFIGS
from benchmarks.machine import default_device, describe


def pytest_addoption(parser):
    group = parser.getgroup("one pass")
    group.addoption("--bench-model", choices=sorted(CONFIGS), default="sd15")
    group.addoption("--bench-latents", type=int, nargs="+", default=[32, 64], metavar="SIZE")
    group.addoption("--bench-rounds", type=int, default=5, help="timings of each form (default 5)")
    group.addoption(
        "--bench-dtype",
        choices=["float32", "float16", "bfloat16"],
        help="default float32 on a CPU, float16 on CUDA",
    )


def pytest_generate_tests(metafunc):
    if "latent_size" in metafunc.fixturenames:
        sizes = metafunc.config.getoption("--bench-latents")
        metafunc.parametrize("latent_size", sizes, scope="module")


def pytest_benchmark_generate_machine_info(config):
    return describe(default_device())


@pytest.fixture(scope="module")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="module")
def dtype(request, device) -> torch.dtype:
    default = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, request.config.getoption("--bench-dtype") or default)
