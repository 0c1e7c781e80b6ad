"""One engine behind every door: checked, batched, timed and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tiue.serve.batching import Batcher
from tiue.serve.engine import Drawing, Engine, Picture, Rules


class Queue(Protocol):
    """Where drawings wait for their passes: a `Batcher`, or whoever has other machines draw."""

    def __len__(self) -> int: ...

    def start(self) -> None: ...

    async def draw(self, drawings: Sequence[Drawing]) -> list[Picture]: ...

    async def close(self) -> None: ...


class Service:
    """Draws for a page, an HTTP API, or whoever else is in the same event loop.

    Args:
        engine: what draws, or the rules of what draws elsewhere.
        queue: where; by default a `Batcher` of the engine.
    """

    batcher: Queue

    def __init__(self, engine: Rules, queue: Queue | None = None) -> None:
        self.engine = engine
        self.limits = limits = engine.limits
        self.ready = False
        self.registry = registry = CollectorRegistry()
        if queue is None:
            assert isinstance(engine, Engine)
            queue = Batcher(
                engine.draw, limits.max_batch, limits.max_wait, limits.max_waiting, self._on_pass
            )
        self.batcher = queue
        self._requests = Counter(
            "tiue_requests", "Requests that ended", ["door", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "tiue_request_seconds", "From arrival to pictures", ["door"], registry=registry
        )
        self._sizes = Histogram(
            "tiue_batch_size", "Pictures of a pass", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._passes = Histogram("tiue_pass_seconds", "Of a pass", registry=registry)
        waiting = Gauge("tiue_waiting_pictures", "Pictures in the queue", registry=registry)
        waiting.set_function(lambda: len(self.batcher))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Draw once, be ready; at the end finish what was begun."""
        self.batcher.start()
        await self.batcher.draw([self.engine.check(Drawing("warm"))])
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            await self.batcher.close()

    async def draw(self, drawings: Sequence[Drawing], door: str) -> list[Picture]:
        """Pictures of drawings, in order.

        Args:
            drawings: as they were asked for.
            door: that they came through, for the metrics.

        Raises:
            InputError: one may not be drawn.
            QueueFullError: too much is waiting.
            ClosedError: the service is ending.
            TimeoutError: it took longer than `limits.timeout`.
        """
        start = time.perf_counter()
        outcome = "error"
        try:
            self.limits.check_count(len(drawings))
            checked = [self.engine.check(drawing) for drawing in drawings]
            pictures = await asyncio.wait_for(self.batcher.draw(checked), self.limits.timeout)
            outcome = "ok"
            self._seconds.labels(door).observe(time.perf_counter() - start)
            return pictures
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._requests.labels(door, outcome).inc()

    def _on_pass(self, size: int, seconds: float) -> None:
        self._sizes.observe(size)
        self._passes.observe(seconds)
