"""What `CudaRecorder` asks of torch.cuda, on a stand-in that keeps CUDA's rules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from tiue.compiled.graphs import CudaRecorder

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class StandInCuda:
    """Streams and events of two devices; an event stays with the device that it was recorded on.

    Attributes:
        current: the device that is current.
        capture_modes: of every capture.
        capture_devices: the device of the stream that each capture was on.
        benchmark: `torch.backends.cudnn.benchmark` while each call ran.
    """

    def __init__(self) -> None:
        self.current = FIRST
        self.capture_modes: list[str] = []
        self.capture_devices: list[torch.device] = []
        self.default_capture_stream: Any = None  # one of the process, as torch.cuda.graph has it
        self.benchmark: list[bool] = []
        cuda = self

        class Stream:
            def __init__(self) -> None:
                self.device = cuda.current

            def wait_event(self, event: Event) -> None:
                event.waited.append(self.device)

            def wait_stream(self, other: Stream) -> None:
                assert other.device == self.device

        class Event:
            def __init__(self) -> None:
                self.device: torch.device | None = None
                self.waited: list[torch.device] = []

            def record(self) -> None:
                if self.device not in (None, cuda.current):
                    raise RuntimeError(f"recorded on {cuda.current}, the event is of {self.device}")
                self.device = cuda.current

        class CUDAGraph:
            def replay(self) -> None:
                pass

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: object, pool: object, stream=None, capture_error_mode: str = "global"):
        if self.default_capture_stream is None:
            self.default_capture_stream = self.Stream()
        self.capture_devices.append((stream or self.default_capture_stream).device)
        self.capture_modes.append(capture_error_mode)
        yield

    def current_device(self) -> int:
        return self.current.index

    def current_stream(self) -> object:
        return self.Stream()

    def graph_pool_handle(self) -> object:
        return object()

    def call(self) -> torch.Tensor:
        self.benchmark.append(torch.backends.cudnn.benchmark)
        return torch.ones(1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandInCuda:
    stand_in = StandInCuda()
    names = ("device", "stream", "graph", "current_device", "current_stream", "graph_pool_handle")
    for name in (*names, "Stream", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_each_device_has_its_own_event(cuda: StandInCuda) -> None:
    recorder = CudaRecorder()
    for device in (FIRST, SECOND, FIRST):
        with recorder.in_order(device):
            assert cuda.current == device
    events = recorder._done
    assert {device: event.device for device, event in events.items()} == {
        FIRST: FIRST, SECOND: SECOND
    }  # fmt: skip
    assert events[FIRST].waited == [FIRST, FIRST]


def test_a_capture_is_on_the_device_whose_work_it_records(cuda: StandInCuda) -> None:
    recorder = CudaRecorder()
    for device in (FIRST, SECOND, FIRST):
        with recorder.in_order(device):
            recorder.record(cuda.call)
    assert cuda.capture_devices == [FIRST, SECOND, FIRST]
    # Graphs share a pool's memory where they are captured on one stream.
    assert len(recorder._streams) == 2


def test_threads_take_turns(cuda: StandInCuda) -> None:
    recorder, inside, most, other = CudaRecorder(), [], [], threading.Barrier(2)

    def run(_: int) -> None:
        with recorder.in_order(FIRST):
            inside.append(1)
            most.append(len(inside))
            with suppress(threading.BrokenBarrierError):
                other.wait(0.5)  # for the other thread, if it can come
            inside.pop()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert most == [1, 1]


def test_other_threads_do_not_end_a_capture(cuda: StandInCuda) -> None:
    CudaRecorder().record(cuda.call)
    assert cuda.capture_modes == ["thread_local"]


@pytest.mark.parametrize("timed", [False, True])
def test_the_settings_of_cudnn_stay_the_processs_own(cuda, timed: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", timed)
    recorder = CudaRecorder()
    with recorder.in_order(FIRST):
        recorder.warm_up(cuda.call)
        recorder.record(cuda.call)
    assert len(cuda.benchmark) >= 2
    assert set(cuda.benchmark) == {timed}
