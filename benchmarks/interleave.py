"""Times rivals in turn in one run, and enters their times in pytest-benchmark's table."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture

Rival = Callable[[], torch.Tensor]


def seconds_of(rival: Rival, device: torch.device) -> float:
    """Time one call: CUDA events on a GPU, the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        rival()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    rival()
    return time.perf_counter() - begin


def interleave(
    rivals: dict[str, Rival], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time rivals that have been warmed up, in turn, so that a busy machine slows all alike.

    Args:
        rivals: What to time, by name.
        rounds: Timings of each.
        device: Where they run.

    Returns:
        The seconds of every round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(rounds):
        # A B, B A, A B, ...: a steady drift of the clock rate cancels out.
        for name in list(rivals)[:: -1 if index % 2 else 1]:
            seconds[name].append(seconds_of(rivals[name], device))
    return seconds


def peak_bytes(rival: Rival, device: torch.device) -> int | None:
    """Return what one call allocates at most on a GPU; a CPU's allocator keeps no such count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    rival()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def enter(benchmark: BenchmarkFixture, seconds: list[float]) -> None:
    """Enter rounds that are already timed as the rounds of this benchmark.

    Args:
        benchmark: pytest-benchmark's fixture; its runner, which would time one rival after the
            other, is replaced by one that reads out the rounds.
        seconds: The rounds.
    """
    recorded = iter(seconds)
    benchmark._make_runner = lambda *call: lambda loops_range: (next(recorded), None)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
