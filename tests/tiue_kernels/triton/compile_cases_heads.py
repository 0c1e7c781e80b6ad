"""Attention with the widest heads, to be compiled for GPUs with little shared memory."""

from __future__ import annotations

from functools import partial

from tests.tiue_kernels.triton.compile_cases_attention import HALF, SINGLE, Call, run_launchers
from tiue_kernels.triton.compilation import Compilation, launches_of

SIZES = {HALF: (160, 192, 200, 256), SINGLE: (256,)}
DTYPES = {"float16": HALF, "float32": SINGLE}


def compilations() -> dict[str, Compilation]:
    """By dtype and head size, in the form that takes most: several heads, a bias, 77 keys."""
    found = {}
    for label, dtype in DTYPES.items():
        for size in SIZES[dtype]:
            call = Call(4, size, 1024, dtype, has_bias=True, needs_bias_grad=True)
            for launch in launches_of(partial(run_launchers, call)):
                name = launch.kernel.__name__.removesuffix("_kernel")
                found[f"{label}-{size}-{name}"] = launch
    return found
