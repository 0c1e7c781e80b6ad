"""Times rivals in turn in one run, and enters their times in pytest-benchmark's table."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture

Rival = Callable[[], object]


def wall_clock(rival: Rival) -> float:
    """Time one call on a CPU."""
    begin = time.perf_counter()
    rival()
    return time.perf_counter() - begin


class CudaClock:
    """Times calls on a GPU with CUDA events: inputs out of L2, launches hidden.

    Before each call the GPU reads a buffer of four times its L2, which leaves nothing of the call's
    tensors there and nothing to be written back. Then it waits until the call is queued as a whole,
    however long the host takes for that: what is timed is the GPU's work and not how fast Python
    launches it. The driver queues some thousand launches and then blocks the host: a call of more
    cannot be hidden whole, and is `exposed`; recorded as a graph it can.

    Args:
        device: The GPU.

    Attributes:
        exposed: Whether the last call's launches were not hidden.
    """

    LEAST_LEAD, LONGEST_LEAD = 0.002, 1.0  # seconds

    def __init__(self, device: torch.device) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        self._buffer = torch.zeros(max(l2_bytes, 2**24), dtype=torch.float32, device=device)
        self.exposed = False
        cycles = 10_000_000
        torch.cuda._sleep(cycles)
        self._cycles_a_second = cycles / self._elapsed(lambda: torch.cuda._sleep(cycles))[0]

    def __call__(self, rival: Rival) -> float:
        """The seconds of one call."""
        lead, blocked = self.LEAST_LEAD, False
        while True:
            self._buffer.sum()
            torch.cuda._sleep(int(lead * self._cycles_a_second))
            seconds, queued = self._elapsed(rival)
            self.exposed = queued >= lead
            # Twice behind a wait of twice its time, and no faster: it had waited for the GPU.
            if not self.exposed or blocked or queued > self.LONGEST_LEAD:
                return seconds
            blocked, lead = lead > self.LEAST_LEAD, 2 * queued

    @staticmethod
    def _elapsed(rival: Rival) -> tuple[float, float]:
        """Seconds between the events around a call, and seconds that it took to queue."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        queued = wall_clock(rival)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, queued


def interleave(
    rivals: dict[str, Rival],
    rounds: int | dict[str, int],
    device: torch.device,
    exposed: set[str] | None = None,
) -> dict[str, list[float]]:
    """Time rivals that have been warmed up, in turn, so that a busy machine slows all alike.

    Args:
        rivals: What to time, by name.
        rounds: Timings of each, or by name; a rival of fewer takes part in the first ones.
        device: Where they run.
        exposed: Gets the names of those whose launches a GPU's clock could not hide.

    Returns:
        The seconds of every round, by name.
    """
    clock = CudaClock(device) if device.type == "cuda" else wall_clock
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    by_name = rounds if isinstance(rounds, dict) else dict.fromkeys(rivals, rounds)
    for index in range(max(by_name.values(), default=0)):
        # A B, B A, A B, ...: a steady drift of the clock rate cancels out.
        for name in list(rivals)[:: -1 if index % 2 else 1]:
            if index < by_name[name]:
                seconds[name].append(clock(rivals[name]))
                if exposed is not None and getattr(clock, "exposed", False):
                    exposed.add(name)
    return seconds


def peak_bytes(rival: Rival, device: torch.device) -> int | None:
    """Return what one call allocates at most on a GPU.

    A CPU's allocator keeps no such count: `benchmarks.peak_memory` asks the kernel.
    """
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
