"""The compiled library: schemas, loading, and why it is not there.

`libtiue_cuda.so` lies beside this file when the package was built with TIUE_CUDA=1. It registers
kernels for CUDA tensors. `TIUE_HOST_LIBRARY`, or `load_host_library`, adds the same kernels
executed on the CPU, for tests.
"""

import functools
import os
from pathlib import Path

import torch

from tiue_kernels import dispatch, libraries
from tiue_kernels.ops._library import OPERATORS

# Those of the operators that have kernels in it.
SCHEMAS = {name: OPERATORS[name].schemas for name, row in dispatch.TABLE.items() if "cuda" in row}

_NO_HOST_LIBRARY = (
    "on a CPU it needs the host-executed library: python -m tiue_kernels.compile host prints "
    "its path, for TIUE_HOST_LIBRARY"
)

# A library must outlive its registrations.
_library = torch.library.Library("tiue_cuda", "DEF")
for _name, _schemas in SCHEMAS.items():
    for _direction, _schema in _schemas.items():
        _library.define(f"{_name}_{_direction}{_schema}")

_PATH = Path(__file__).parent / "libtiue_cuda.so"
_why_not: str | None = None
_host_libraries: set[Path] = set()


def loaded() -> bool:
    """Whether the compiled library is there and has registered its kernels for CUDA tensors."""
    return _why_not is None


def available_ops() -> set[str]:
    """Names of the operators that the compiled library serves."""
    return set(SCHEMAS) if loaded() else set()


def why_not(operator: str | None = None, device_type: str = "cuda") -> str | None:
    """Why an operator, or the whole library, cannot run here, with the cure; None when it can.

    Args:
        operator: a name in `available_ops`; by default, whether the library is loaded at all.
        device_type: of the tensors; on "cpu" the kernels run where a host library is loaded.
    """
    if operator is not None and operator not in SCHEMAS:
        return "not implemented"
    if device_type == "cuda":
        return _why_not or _why_no_driver()
    if device_type == "cpu":
        return None if _host_libraries else _NO_HOST_LIBRARY
    return f"no kernels for {device_type} tensors"


@functools.cache
def _why_no_driver() -> str | None:
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # torch for CPUs has none
    return libraries.why_no_driver(_PATH, version() if version is not None else 0)


def load_host_library(path: str | os.PathLike[str]) -> None:
    """Register the kernels of a host build (`python -m tiue_kernels.compile host`) for CPU."""
    resolved = Path(path).resolve()
    if resolved not in _host_libraries:
        torch.ops.load_library(resolved)
        _host_libraries.add(resolved)


_why_not = libraries.load(
    _PATH,
    "CUDA",
    "TIUE_CUDA=1 pip install --no-build-isolation . (needs nvcc)",
)
if os.environ.get("TIUE_HOST_LIBRARY"):
    load_host_library(os.environ["TIUE_HOST_LIBRARY"])
