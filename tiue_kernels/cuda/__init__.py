"""The compiled library: schemas, loading, and why it is not there.

`libtiue_cuda.so` lies beside this file when the package was built with TIUE_CUDA=1. It registers
kernels for CUDA tensors. `TIUE_HOST_LIBRARY`, or `load_host_library`, adds the same kernels
executed on the CPU, for tests.
"""

import os
import warnings
from pathlib import Path

import torch

SCHEMAS = {
    "shared_skip_group_norm_silu": (
        "(Tensor hidden, Tensor skip, int num_groups, Tensor weight, Tensor bias, float eps)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        "(Tensor grad_hidden_out, Tensor grad_skip_out, Tensor hidden, Tensor skip, int num_groups,"
        " Tensor weight, Tensor bias, Tensor hidden_stats, Tensor skip_stats)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "cross_timestep_attention": (
        "(Tensor query, Tensor key, Tensor value, int num_heads, float scale,"
        " Tensor? attention_bias) -> (Tensor, Tensor)",
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, int num_heads, float scale,"
        " Tensor? attention_bias, Tensor out, Tensor logsumexp, bool needs_bias_grad)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    ),
}

_NO_HOST_LIBRARY = (
    "on a CPU it needs the host-executed library: python -m tiue_kernels.cuda.build --host prints "
    "its path, for TIUE_HOST_LIBRARY"
)

# A library must outlive its registrations.
_library = torch.library.Library("tiue_cuda", "DEF")
for _name, (_forward, _backward) in SCHEMAS.items():
    _library.define(f"{_name}_fwd{_forward}")
    _library.define(f"{_name}_bwd{_backward}")

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
        return _why_not
    if device_type == "cpu":
        return None if _host_libraries else _NO_HOST_LIBRARY
    return f"no kernels for {device_type} tensors"


def load_host_library(path: str | os.PathLike[str]) -> None:
    """Register the kernels of a host build (`python -m tiue_kernels.cuda.build --host`) for CPU."""
    resolved = Path(path).resolve()
    if resolved not in _host_libraries:
        torch.ops.load_library(resolved)
        _host_libraries.add(resolved)


def _load(path: Path) -> str | None:
    """Load the library; the reason and the cure where that fails."""
    if not path.exists():
        return (
            "the CUDA library is not built: TIUE_CUDA=1 pip install --no-build-isolation . "
            "(needs nvcc)"
        )
    try:
        torch.ops.load_library(path)
    except Exception as error:
        # A broken library must never keep the package from being imported.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = (
            f"{path} does not load beside torch {torch.__version__}: {cause}. Rebuild it with "
            "TIUE_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation . "
            "or delete it; the other backends go on without it"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    return None


_why_not = _load(Path(__file__).parent / "libtiue_cuda.so")
if os.environ.get("TIUE_HOST_LIBRARY"):
    load_host_library(os.environ["TIUE_HOST_LIBRARY"])
