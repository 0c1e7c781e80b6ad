"""What every launcher needs around its kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of x the current one, where Triton launches; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(n: int) -> int:
    """The least power of two that is not below n; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def bound(n):
    """A bound of a loop: numpy 2.4 takes no array for an index, triton 3.6 interprets with one."""
    if INTERPRETED:
        item = getattr(n.handle.data, "item", None)  # none where a sanitizer goes over symbols
        if item is not None:
            return item()
    return n
