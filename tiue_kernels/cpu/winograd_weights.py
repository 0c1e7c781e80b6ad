"""Weights of Winograd's F(4 x 4, 3 x 3), transformed, and kept for the next call.

A transformed weight is four times the size of the weight. Some are kept, up to a bound in bytes,
under the contents of the weight: whatever changes a weight, however it does, no stale one is used.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import torch

from tiue_kernels import cpu
from tiue_kernels.cpu.library import POINTS

VARIABLE = "TIUE_WINOGRAD_MIB"
# Of the memory that this process may use: 3 GiB of 24 GiB, where Stable Diffusion 1.5 takes 2.8 GiB
# and its one pass at 32 x 32 latents 3.2 s with all weights kept, 3.9 s with 1 GiB, 4.4 s with none
# (two cores).
DEFAULT_SHARE = 1 / 8

_Key = tuple[int, int, int]  # contents, C_out, channels
_Place = tuple[int, int, int]  # address, start, channels


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
        self._made_of: dict[_Place, _Key] = {}
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
        contents = cpu.library().winograd_fingerprint(weight, start, channels)
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
            self._made_of[weight.data_ptr(), start, channels] = key
            return transformed

    def forget(self, weight: torch.Tensor, start: int, channels: int) -> None:
        """Drops what was last made of this weight, which is about to change."""
        with self._lock:
            key = self._made_of.get((weight.data_ptr(), start, channels))
            if key is not None:
                self._drop(key)

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._weights)))

    def _drop(self, key: _Key) -> None:
        del self._weights[key], self._last_use[key]
        for place in [place for place, made in self._made_of.items() if made == key]:
            del self._made_of[place]


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
        cpu.library().winograd_weight(weight.detach(), start, 0, out)
    return out
