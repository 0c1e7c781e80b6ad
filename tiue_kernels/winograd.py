"""3 x 3 convolutions on a CPU as Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308).

A tile of 4 x 4 outputs takes 36 multiplications a pair of channels instead of 144. Sums are of the
same numbers in another order and with factors up to 8, so float32 results differ from torch's by
some 5e-5 where outputs are of unit size. For inference; needs the compiled transforms
(`tiue_kernels.cpu`).

The transformed weight is four times the size of the weight. Some are kept, up to a bound in bytes,
under the contents of the weight: whatever changes a weight, however it does, no stale one is used.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import torch

from tiue_kernels import cpu

POINTS = 36
# Tiles from which a convolution gains though its weight is transformed anew, and with it kept.
LEAST_TILES = 16
LEAST_TILES_KEPT = 8
# Of transformed inputs, or weights, at a time. Above 32 MiB malloc hands out fresh pages at every
# call: 640 channels of 2 rows of 64 x 64 took 42 ms in one piece of 47 MB.
MOST_BYTES = 24 << 20
# Up to so many tiles our own products are faster than MKL's: 1280 channels of 4 rows of 8 x 8 take
# 18 ms against 31, of 16 x 16 54 ms against 62. Of more they are as fast, and panels fill slowly.
MOST_PANEL_TILES = 64
# The transforms cost as much as they save under these.
LEAST_CHANNELS = 64
VARIABLE = "TIUE_WINOGRAD_MIB"
# Of the memory that this process may use: 3 GiB of 24 GiB, where Stable Diffusion 1.5 takes 2.8 GiB
# and its one pass at 32 x 32 latents 3.2 s with all weights kept, 3.9 s with 1 GiB, 4.4 s with none
# (two cores).
DEFAULT_SHARE = 1 / 8

_Key = tuple[int, int, int]


class WeightCache:
    """Transformed weights under the contents of what they were made of.

    Args:
        limit: bytes that it holds at most.
    """

    # A weight that so many others were asked for since is no longer in use: some ten passes of the
    # largest UNet. Until then it stays, since a pass asks for more than fit, in a circle, and the
    # least recently used one would always be the next that is needed.
    STALE_AFTER = 1000

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weights: OrderedDict[_Key, torch.Tensor] = OrderedDict()
        self._last_use: dict[_Key, int] = {}
        self._clock = 0
        self._lock = Lock()

    @property
    def limit(self) -> int:
        """Bytes that it holds at most, 0 for none; set it, and what is over is dropped."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"the limit is a number of bytes, 0 for none; got {value}")
        with self._lock:
            self._limit = value
            while self.bytes > value:
                self._drop_oldest()

    @property
    def bytes(self) -> int:
        """Bytes that it holds."""
        return sum(weight.nbytes for weight in self._weights.values())

    def get(self, weight: torch.Tensor, start: int, channels: int) -> torch.Tensor | None:
        """weight[:, start : start + channels] transformed, [36, C_out, channels].

        None where it is not held and does not fit.
        """
        size = POINTS * weight.shape[0] * channels * weight.element_size()
        if size > self._limit:
            return None
        # 59 MB take 3 ms to read, and 20 to transform (two cores).
        contents = torch.ops.tiue_cpu.winograd_fingerprint(weight, start, channels)
        key = (contents, weight.shape[0], channels)
        with self._lock:
            self._clock += 1
            if key in self._weights:
                self._weights.move_to_end(key)
                self._last_use[key] = self._clock
                return self._weights[key]
            while self.bytes + size > self._limit:
                oldest = next(iter(self._weights))
                if self._clock - self._last_use[oldest] < self.STALE_AFTER:
                    return None
                self._drop_oldest()
            transformed = transform(weight, start, channels)
            self._weights[key], self._last_use[key] = transformed, self._clock
            return transformed

    def _drop_oldest(self) -> None:
        key, _ = self._weights.popitem(last=False)
        del self._last_use[key]


def _memory() -> int:
    """Bytes of memory of this computer, or that its container may use; 0 where none can tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 0
    try:
        bound = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(bound)) if bound.isdigit() else total


def _default_limit() -> int:
    value = os.environ.get(VARIABLE, "")
    try:
        return int(float(value) * 2**20) if value else int(DEFAULT_SHARE * _memory())
    except ValueError:
        raise ValueError(f"{VARIABLE} is a number of MiB, got {value!r}") from None


cache = WeightCache(_default_limit())


def transform(weight: torch.Tensor, start: int, channels: int) -> torch.Tensor:
    """[C_out, C_in, 3, 3] -> [36, C_out, channels], of the channels from start on."""
    with torch.inference_mode(False):
        out = weight.new_empty(POINTS, weight.shape[0], channels)
        torch.ops.tiue_cpu.winograd_weight(weight.detach(), start, 0, out)
    return out


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: int | tuple[int, ...],
    start: int = 0,
) -> torch.Tensor | None:
    """conv2d(x, weight[:, start : start + C], bias) with padding 1, or None where it gains nothing.

    Args:
        x: [rows, C, H, W].
        weight: [C_out, C_in, 3, 3], C_in >= start + C.
        bias: [C_out].
        padding: anything but 1 is not served.
        start: the input channel of the weight that the first channel of x meets.

    Returns:
        [rows, C_out, H, W].
    """
    if not serves(x, weight, bias, padding):
        return None
    rows, channels, height, width = x.shape
    tiles = -(-height // 4) * -(-width // 4)
    if rows * tiles < LEAST_TILES_KEPT:
        return None
    transformed = cache.get(weight, start, channels)
    if transformed is None and rows * tiles < LEAST_TILES:
        return None
    out = x.new_empty(rows, weight.shape[0], height, width)
    step = max(1, MOST_BYTES // (POINTS * channels * tiles * x.element_size()))
    inputs = ((row, _Inputs(x[row : row + step])) for row in range(0, rows, step))
    if transformed is not None:
        for row, some in inputs:
            torch.ops.tiue_cpu.winograd_output(some.products(transformed), bias, out, row, 0)
        return out
    # Some output channels at a time, in one buffer: what is made of their weight stays in the CPU's
    # cache, and new pages would cost more than the transform (1280 x 1280: 21 against 108 ms).
    kept = list(inputs)
    step = max(32, MOST_BYTES // (POINTS * channels * x.element_size()))
    buffer = x.new_empty(POINTS * channels * min(step, weight.shape[0]))
    for first in range(0, weight.shape[0], step):
        outputs = min(step, weight.shape[0] - first)
        part = buffer[: POINTS * outputs * channels].view(POINTS, outputs, channels)
        torch.ops.tiue_cpu.winograd_weight(weight.detach(), start, first, part)
        for row, some in kept:
            torch.ops.tiue_cpu.winograd_output(some.products(part), bias, out, row, first)
    return out


class _Inputs:
    """Transformed rows of a map, in the layout that their products read.

    Args:
        x: [rows, C, H, W].
    """

    def __init__(self, x: torch.Tensor) -> None:
        rows, _, height, width = x.shape
        self._tiles = rows * -(-height // 4) * -(-width // 4)
        self._panels = self._tiles <= MOST_PANEL_TILES and cpu.has_products()
        self._values = torch.ops.tiue_cpu.winograd_input(x, self._panels)

    def products(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [36, n, C] -> [36, n, tiles]."""
        if self._panels:
            return torch.ops.tiue_cpu.winograd_product(weights, self._values, self._tiles)
        return torch.bmm(weights, self._values)


def serves(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: int | tuple[int, ...],
) -> bool:
    """Whether a convolution of stride 1 is of the kind, whatever its size."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        x.is_cpu
        and cpu.loaded()
        and not torch.is_grad_enabled()
        and weight.shape[2:] == (3, 3)
        and padding in (1, (1, 1), [1, 1])
        and all(t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
        and min(weight.shape[0], x.shape[1]) >= LEAST_CHANNELS
        and not torch.is_autocast_enabled("cpu")
    )
