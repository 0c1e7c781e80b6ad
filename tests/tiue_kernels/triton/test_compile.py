"""Every Triton kernel compiles for GPUs that are not here, and no register is spilled to memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiue_kernels.spills import Allowed, complaints
from tiue_kernels import dispatch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
# Whatever a launcher launches ends in _kernel.
KERNELS = {
    f"{path.stem}.{name}"
    for path in (ROOT / "tiue_kernels" / "triton").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
CAPABILITIES = (80, 90, 100)
# Table of cases, part of their names, compute capability: half on all, float32's norms on one.
RUNS = [
    *(("norm", "f16", capability) for capability in CAPABILITIES),
    ("norm", "f32", 90),
    *(("attention", "", capability) for capability in CAPABILITIES),
]
_ROUND = (
    "ptxas stops by itself at 64 or 128 registers, for four or two programs of 8 warps a processor,"
    " and spills two words where it could take more"
)
# Table and capability to the cases that may spill.
ALLOWED = {
    ("norm", 80): {"up2-straddling-f16-nhwc-forward": Allowed(8, _ROUND)},
    ("norm", 90): {"up3-add-f16-backward": Allowed(8, _ROUND)},
    ("norm", 100): {
        "up3-add-f16-backward": Allowed(8, _ROUND),
        # gated_residual's: at 48 registers, for five programs
        "pointwise-f16-forward-1": Allowed(8, _ROUND),
    },
}


def compile_for(capability: int | str, table: str, words: str, cache: Path) -> dict[str, dict]:
    """What ptxas says of each case."""
    # Compiled kernels cannot be had in a process whose triton interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiue_kernels.triton.compile_kernels", str(capability), table,
         words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = {result.pop("case"): result for result in map(json.loads, done.stdout.splitlines())}
    assert results
    return results


@pytest.mark.parametrize(("table", "words", "capability"), RUNS)
def test_kernels_compile_without_spills(table, words, capability, tmp_path):
    results = compile_for(capability, table, words, tmp_path)
    allowed = {
        name: entry for name, entry in ALLOWED.get((table, capability), {}).items() if words in name
    }
    # A constant of the caller's choice would be compiled anew for every value of it.
    assert {name: result["floats"] for name, result in results.items() if result["floats"]} == {}
    own = {kernel for kernel in KERNELS if ("attention" in kernel) == (table == "attention")}
    assert own == {result["kernel"] for result in results.values()}
    assert complaints({name: result["spills"] for name, result in results.items()}, allowed) == []


# Cards that nothing was tuned for: each norm and pointwise kernel compiles; a column, no promise.
OTHERS = [("norm", "120"), ("norm", "gfx942"), ("norm", "gfx1100")]


@pytest.mark.parametrize(("table", "target"), OTHERS)
def test_each_kernel_compiles_for_other_cards(table, target, tmp_path):
    results = compile_for(target, table, "each", tmp_path)
    own = {kernel for kernel in KERNELS if ("attention" in kernel) == (table == "attention")}
    assert own == {result["kernel"] for result in results.values()}


def test_the_docs_count_every_kernel_that_is_compiled_for_other_cards():
    count = sum("attention" not in kernel for kernel in KERNELS)
    text = (ROOT / "docs" / "gpu_checks.md").read_text(encoding="utf-8")
    assert f"| kernels compiled, of {count} |{f' {count} |' * len(OTHERS)}" in text


def test_the_table_refuses_what_99_kib_of_shared_memory_do_not_hold(tmp_path):
    limit = dispatch.TABLE["cross_timestep_attention"]["triton"].limit
    most: dict[tuple[str, str, bool], int] = {}
    for name, result in compile_for(86, "heads", "", tmp_path).items():
        dtype, size, kernel = name.split("-")
        direction = (dtype, size, kernel.startswith("grad"))
        most[direction] = max(result["shared"], most.get(direction, 0))
    assert len(most) == 10
    for (dtype, size, is_backward), shared in most.items():
        query = torch.empty(1, 1, int(size), dtype=getattr(torch, dtype))
        call = {"query": query, "num_heads": 1}
        fits = shared <= dispatch.block_memory((8, 6))
        assert (limit("bwd" if is_backward else "fwd", call, (8, 6)) is None) == fits, (
            dtype,
            size,
            is_backward,
            shared,
        )
