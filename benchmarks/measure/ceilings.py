"""What a device reaches at its best: a large copy and a large matrix product.

`python -m benchmarks.measure.ceilings [--output FILE]` prints them as JSON; operators are held
against them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.interleave import interleave
from benchmarks.measure.machine import describe
from testing.problem import default_device

DTYPES = ("bfloat16", "float16", "float32")
ROUNDS = 10


def measure(device: torch.device) -> dict[str, Any]:
    """Measure the ceilings of a device.

    Args:
        device: A GPU; a CPU is measured on small sizes, which is enough to run every line.

    Returns:
        `copy_gb_s`, bytes read and written a second by a copy, and `matmul_tflop_s` by dtype, of
        a square product of random numbers; float32 without TF32. Medians.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn(2**28 if on_gpu else 2**20, device=device)  # 1 GiB
    target = torch.empty_like(source)
    seconds = _median(partial(target.copy_, source), device)
    copied = 2 * source.numel() * source.element_size()
    width = 8192 if on_gpu else 128
    products = {name: matmul_tflop_s(device, getattr(torch, name), width) for name in DTYPES}
    return {"copy_gb_s": copied / seconds / 1e9, "matmul_tflop_s": products}


@cache
def matmul_tflop_s(device: torch.device, dtype: torch.dtype, width: int | None = None) -> float:
    """Measure a square product of random numbers.

    Args:
        device: Where it runs.
        dtype: Of its numbers.
        width: Of the matrices; by default one that is large for the device.

    Returns:
        Median, in TFLOP/s.
    """
    if width is None:
        # Half types are emulated on a CPU of AVX2: 17 s for a product of 2048.
        width = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 256
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in "ab")
    return 2 * width**3 / _median(partial(torch.mm, a, b), device) / 1e12


def _median(rival: Any, device: torch.device) -> float:
    for _ in range(3):
        rival()
    return statistics.median(interleave({"best": rival}, ROUNDS, device)["best"])


def load(path: Path) -> dict[str, Any]:
    """Read what `main` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))["ceilings"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and, on request, write.

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file")
    output = parser.parse_args(arguments).output
    torch.backends.cuda.matmul.allow_tf32 = False
    device = default_device()
    text = json.dumps({"machine": describe(device), "ceilings": measure(device)}, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
