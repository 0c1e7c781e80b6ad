"""Calls recorded as CUDA graphs: the host launches one thing where it launched a thousand."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock, RLock
from typing import Any, Protocol

import torch
from torch import nn

from tiue.compiled.calls import Call
from tiue.compiled.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

# Triton compiles, cuDNN chooses its algorithms and libraries allocate at the first calls; none of
# that can be recorded.
WARM_UP_CALLS = 2


class Recorded(Protocol):
    """A recorded call."""

    output: torch.Tensor

    def replay(self) -> None:
        """Compute `output` again, from what the inputs hold now."""


class Recorder(Protocol):
    """What records calls: a GPU, or in tests what stands for one."""

    def serves(self, device: torch.device) -> bool:
        """Whether calls on a device can be recorded now."""

    def in_order(self, device: torch.device) -> AbstractContextManager[None]:
        """What runs inside starts when what ran before has ended, on any stream, in any thread."""

    def warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        """Make a call until it compiles and allocates nothing new."""

    def record(self, run: Callable[[], torch.Tensor]) -> Recorded:
        """Record a call without making it."""

    def forget(self) -> None:
        """Give back what is held beside the recorded calls, none of which is left."""


class CudaRecorder:
    """Records calls as CUDA graphs.

    The memory of all is one pool: they run one after another, and an output is copied at once.
    What other threads do on the GPU meanwhile neither enters a recording nor ends it. Convolutions
    are recorded with the algorithms that cuDNN chooses under the process's own settings: with
    `torch.backends.cudnn.benchmark = True` those that it has timed in the warm-up.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._turn = RLock()
        # Both belong to a device.
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        # The calls of a pipeline's UNet and VAE have a lock each, and one memory: a thread in one
        # would not know of the event that another has yet to record for the other.
        with self._turn, torch.cuda.device(device):
            if device not in self._done:
                self._done[device] = torch.cuda.Event()
            torch.cuda.current_stream().wait_event(self._done[device])
            try:
                yield
            finally:
                self._done[device].record()

    def warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side), _without_cast_cache():
            for _ in range(WARM_UP_CALLS):
                run()
        current.wait_stream(side)

    def record(self, run: Callable[[], torch.Tensor]) -> Recorded:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        device = torch.cuda.current_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        return _CudaGraph(run, self._pool, self._streams[device])

    def forget(self) -> None:
        self._pool = None
        torch.cuda.empty_cache()


class _CudaGraph:
    def __init__(self, run: Callable[[], torch.Tensor], pool: Any, stream: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # By default a call of another thread, such as an allocation, would end the capture, and the
        # stream is one of the process, of the first device on which anything was recorded: what
        # runs on another device is then made once and not recorded.
        recording = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with _without_cast_cache(), recording:
            self.output = run()

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _without_cast_cache() -> Iterator[None]:
    """Autocast keeps no weights in half precision: a recorded call would go on reading those."""
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)


class GraphedCall:
    """A function of tensors that is recorded once a key (`Call.key`) and then replayed.

    A call copies its tensors into those that were recorded and returns a copy of the output.
    Weights are read where they lie; where `Fingerprint` sees a change, every recorded call is
    dropped. What cannot be recorded (weights that are offloaded, a graph that does not fit in
    memory, a layer that waits for the host) is called as it is, and the log says so once.

    Args:
        function: one tensor out, which depends on the arguments and the modules alone.
        modules: whose weights it reads.
        max_graphs: recorded calls kept; the least recently used goes first.
        recorder: what records; a GPU by default.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        modules: Sequence[nn.Module],
        max_graphs: int = 8,
        recorder: Recorder | None = None,
    ) -> None:
        self._function = function
        self._modules = modules
        self._max_graphs = max_graphs
        self._recorder = recorder or CudaRecorder()
        # None: this call cannot be recorded.
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._lock = Lock()
        self._told = False

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = Call.of(args, kwargs)
        device = next(self._modules[0].parameters()).device
        here = all(tensor.device == device and tensor.numel() for tensor in call.tensors)
        if not (here and self._recorder.serves(device)):
            return self._function(*args, **kwargs)
        # Tensors made in inference_mode could not be written to outside of it.
        normal = torch.inference_mode(False)
        with self._lock, normal, torch.no_grad(), self._recorder.in_order(device):
            graph = self._graph(call, device)
            if graph is not None:
                return graph(call.tensors)
        return self._function(*args, **kwargs)

    def _graph(self, call: Call, device: torch.device) -> _Graph | None:
        if self._fingerprint is None or not self._fingerprint.holds():
            self._drop_all()
            self._fingerprint = Fingerprint(self._modules)
        key = call.key()
        if key is None:
            self._tell("an argument is neither a tensor nor a number or text")
            return None
        if key not in self._graphs:
            while len(self._graphs) >= self._max_graphs:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._record(call.copied(device))
            # A LoRA that was scaled for the call and back need not come back to the last bit.
            self._fingerprint = Fingerprint(self._modules)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _record(self, call: Call) -> _Graph | None:
        if any("_hf_hook" in vars(m) for root in self._modules for m in root.modules()):
            self._tell("weights are offloaded between calls")
            return None

        def run() -> torch.Tensor:
            return call.run(self._function)

        try:
            self._recorder.warm_up(run)
        except torch.OutOfMemoryError as error:
            self._drop_all()
            self._tell(str(error))
            return None
        try:
            return _Graph(call, self._recorder.record(run))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._drop_all()
            self._tell(str(error))
            return None

    def _drop_all(self) -> None:
        self._graphs.clear()
        self._recorder.forget()

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("A call runs without a graph: %s. Said once.", reason.split("\n")[0])


class _Graph:
    """A recorded call and what it reads: the tensors that calls are copied into, the schedule."""

    def __init__(self, call: Call, recorded: Recorded) -> None:
        self._call = call
        self._recorded = recorded

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        for own, given in zip(self._call.tensors, tensors, strict=True):
            own.copy_(given)
        self._recorded.replay()
        return self._recorded.output.clone()
