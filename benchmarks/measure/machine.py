"""What a figure was measured on; `python -m benchmarks.measure.machine` prints it as a folder."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from testing.problem import default_device

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    """Return the maker's name of the device, for a CPU with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpu_info.read_text()) if cpu_info.exists() else None
    name = match.group(1) if match else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name.strip()}, {cores} cores"


def slug(device: torch.device) -> str:
    """Return the device's name as one lower-case word."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a figure; no host name and no paths."""
    packages = ("torch", "diffusers", "transformers", "triton")
    installed = {str(package.metadata["Name"]).lower() for package in metadata.distributions()}
    description: dict[str, Any] = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    description |= {name: metadata.version(name) for name in packages if name in installed}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return description


def without_paths(text: str) -> str:
    """Text whose quoted logs do not say where this machine keeps things."""
    for path, name in ((f"{ROOT}/", ""), (sys.prefix, "PREFIX"), (str(Path.home()), "HOME")):
        text = text.replace(path, name)
    return text


if __name__ == "__main__":
    print(slug(default_device()))
