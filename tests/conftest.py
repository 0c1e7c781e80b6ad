"""Triton's interpreter where there is no GPU, and csrc built once a session for all who run it.

Triton and huggingface_hub read their variables where they are imported, and diffusers imports both:
so they are set first of all, in the folder that pytest reads before it collects a test.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.skips import NeededByCI
from tiue_kernels import build, cpu, cuda, dispatch
from tiue_kernels.cpu.library import Library

# A CPU library that lies in the package is for the tests that ask for it (`with_cpu_library`);
# processes that tests start do without it too.
os.environ["TIUE_CPU"] = "0"
cpu._library, cpu._why_not, cpu._said = None, "tests ask for it", True

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test needs the hub, and none waits for one that cannot be reached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NeededByCI())


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Workers of one session, or of two, share a build folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def host_library() -> Path:
    """The library whose kernels the CPU executes, loaded."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the CUDA kernels cannot be executed on the CPU")
    with one_at_a_time(build.cache_folder()):
        library = build.build("host", build.cache_folder())
    cuda.load_host_library(library)
    dispatch.reset()
    return library


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """The CPU path's own library; the package goes on without it."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"no g++ or clang++: the CPU library cannot be built ({error})")
    with one_at_a_time(build.cache_folder()):
        return build.build("cpu", build.cache_folder())


@pytest.fixture
def cpu_form() -> str | None:
    """Which form of the CPU library runs; None: the widest that this computer has."""
    return None


@pytest.fixture
def loaded_cpu_library(cpu_library, cpu_form) -> Library:
    return Library(cpu_library, cpu_form)


@pytest.fixture
def with_cpu_library(loaded_cpu_library, monkeypatch) -> Iterator[None]:
    """For one test: others hold float32 to bounds that torch's own convolutions keep."""
    monkeypatch.setattr(cpu, "_library", loaded_cpu_library)
    monkeypatch.setattr(cpu, "_why_not", None)
    dispatch.reset()
    yield
    monkeypatch.undo()
    dispatch.reset()


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The library for GPUs, freshly built from what lies here; not loaded."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(f"no nvcc: csrc is not compiled for GPUs ({error})")
    with one_at_a_time(build.cache_folder()):
        return build.build("cuda", build.cache_folder())
