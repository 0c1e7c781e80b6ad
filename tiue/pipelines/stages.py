"""The stages of a pipeline call: progress, and their times where somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stages:
    """What a pipeline inherits to time its stages."""

    _execution_device: torch.device
    _timings: dict[str, float] | None = None

    @contextmanager
    def record_timings(self) -> Iterator[dict[str, float]]:
        """Time the stages of the calls inside a `with` block.

        Only there does the pipeline wait for the device at the end of each stage.

        Yields:
            Seconds of "text encoder", "encoder", "decoder" and "VAE", filled by the calls and
            summed over them.
        """
        self._timings = {}
        try:
            yield self._timings
        finally:
            self._timings = None

    @contextmanager
    def _stage(self, name: str, progress: Any) -> Iterator[None]:
        timings = self._timings
        if timings is not None:
            self._wait_for_device()
        start = time.perf_counter()
        yield
        if timings is not None:
            self._wait_for_device()
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
        progress.update()

    def _wait_for_device(self) -> None:
        device = self._execution_device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
