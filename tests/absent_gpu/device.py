"""The device of `device.cpp`, built and loaded; imports no torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_library(folder: Path) -> Path:
    """Compiles it; a few seconds.

    Args:
        folder: where the library goes.

    Returns:
        Its path.
    """
    torch, library = torch_folder(), folder / "libabsent_gpu.so"
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-fPIC", "-shared", str(SOURCE)),
            *("-o", str(library), f"-I{torch}/include"),
            *(f"-L{torch}/lib", "-lc10", "-ltorch_cpu"),
        ],
        check=True,
    )
    return library


def load(library: Path) -> None:
    """Loads it where torch finds it; to be called before torch is imported."""
    folder = torch_folder() / "lib"
    for path in (folder / "libc10.so", folder / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
