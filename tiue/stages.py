"""The stages of a call: progress, and their times where somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def untimed(_name: str) -> AbstractContextManager[None]:
    """A stage that nobody times."""
    return nullcontext()


class Stages:
    """Times the stages of one call and moves its progress bar.

    Args:
        timings: seconds by name, which the stages are added to; None to wait for no device.
        device: what runs them.
        progress: a bar with one step a stage.
    """

    def __init__(
        self, timings: dict[str, float] | None, device: torch.device, progress: Any
    ) -> None:
        self._timings = timings
        self._device = device
        self._progress = progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Name what runs inside."""
        timings = self._timings
        self._wait_for_device()
        start = time.perf_counter()
        yield
        self._wait_for_device()
        if timings is not None:
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
        self._progress.update()

    def _wait_for_device(self) -> None:
        if self._timings is not None and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
