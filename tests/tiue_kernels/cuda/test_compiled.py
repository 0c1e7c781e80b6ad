"""csrc compiled for GPUs, without one: registers, what the library needs, whether it loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.tiue_kernels.spills import Allowed, complaints
from tiue_kernels import build

ROOT = Path(__file__).parents[3]

# Kernels that may spill, by architecture and mangled name. None does.
ALLOWED: dict[str, Allowed] = {}


def kernels(log: str) -> list[tuple[str, str, int]]:
    """Architecture, mangled name and bytes spilled of every kernel in ptxas's log."""
    pattern = r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores"
    return [(arch, name, int(size)) for name, arch, size in re.findall(pattern, log, re.DOTALL)]


def test_no_register_spills(cuda_library: Path) -> None:
    found = []
    for source in build.sources("cuda"):
        if source.suffix == ".cu":
            log = build.cache_folder() / "cuda" / f"{source.parent.name}_{source.stem}.o.log"
            compiled = kernels(log.read_text())
            assert {arch for arch, *_ in compiled} == {"sm_80", "sm_90a"}, source
            found += compiled
    assert len(found) > 200
    assert complaints({f"{arch} {name}": size for arch, name, size in found}, ALLOWED) == []


def test_loads_beside_this_torch(cuda_library: Path) -> None:
    code = (
        "import torch, tiue_kernels.cuda\n"
        f"torch.ops.load_library({str(cuda_library)!r})\n"
        "for name in tiue_kernels.cuda.SCHEMAS:\n"
        "    for direction in ('fwd', 'bwd'):\n"
        "        full = f'tiue_cuda::{name}_{direction}'\n"
        "        assert torch._C._dispatch_has_kernel_for_dispatch_key(full, 'CUDA'), full\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
