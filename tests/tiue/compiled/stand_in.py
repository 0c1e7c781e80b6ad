"""What stands for a GPU that records calls: it replays the Python that it was given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StandInGraph:
    """Writes to the same output at every replay, as a CUDA graph does."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.output = torch.full_like(run(), float("nan"))  # recording computes nothing
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._run())


class StandInRecorder:
    """Counts what is asked of it.

    Attributes:
        fails: raised by the next recordings, or None.
    """

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.recorded: list[StandInGraph] = []
        self.warm_ups = 0
        self.inside = False

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    @contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        assert self.inside
        self.warm_ups += 1
        run()

    def record(self, run: Callable[[], torch.Tensor]) -> StandInGraph:
        assert self.inside
        if self.fails is not None:
            raise self.fails
        self.recorded.append(StandInGraph(run))
        return self.recorded[-1]

    def forget(self) -> None:
        pass
