"""What is built, what runs here, and why the rest does not: `python -m tiue_kernels.info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import tiue_kernels
from tiue_kernels import cpu, cuda, dispatch


def report() -> str:
    """The facts that a report of a bug needs, as text; nothing in it names this computer."""
    lines = [
        f"tiue_kernels {tiue_kernels.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {_version('triton')}, {platform.machine()}",
        f"{dispatch.VARIABLE}: {os.environ.get(dispatch.VARIABLE, 'not set')}",
        f"TRITON_INTERPRET: {os.environ.get('TRITON_INTERPRET', 'not set')}",
        f"CUDA library: {cuda.why_not() or 'loaded'}",
        f"CPU library: {cpu.why_not() or f'loaded, {cpu.library().form}'}",
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            lines.append(f"GPU {index}: {name}, compute capability {major}.{minor}")
    else:
        lines.append("GPU: none that torch sees")
    for device in devices:
        lines.append(f"\nfloat16 tensors on {device}:")
        for operator in dispatch.operators():
            example = torch.empty(1, dtype=torch.float16, device=device)
            lines.append(f" {operator}\n{dispatch.explain(operator, example)}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
