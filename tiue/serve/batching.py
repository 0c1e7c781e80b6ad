"""Drawings of one key that wait share the next pass.

Why not a library's: LitServe 0.2 batches, but its queue has no bound, a client that hangs up keeps
its place, and it lifts the limit on uploads; Gradio's queue batches whatever calls one function,
of equal shape or not, and serves its own pages alone; Ray's is for a cluster (`tiue.serve.ray`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tiue.serve.engine import Drawing, Picture


class QueueFullError(Exception):
    """More waits than may; `retry_after` says in how many whole seconds to come back."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too much is waiting; come back in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The service is ending, and takes nothing new."""


@dataclass(eq=False)
class _Entry:
    drawing: Drawing
    picture: asyncio.Future[Picture]


class Batcher:
    """Passes one after another in one thread, each of what waits with the oldest's key.

    Args:
        draw: checked drawings of equal keys to pictures; called in a thread.
        max_batch: pictures of one pass.
        max_wait: seconds that a pass which is not full waits for others to join.
        max_waiting: pictures that may wait.
        on_pass: told the size and the seconds of every pass.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Drawing]], list[Picture]],
        max_batch: int,
        max_wait: float,
        max_waiting: int,
        on_pass: Callable[[int, float], None] = lambda _size, _seconds: None,
    ) -> None:
        self._draw = draw
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._max_waiting = max_waiting
        self._on_pass = on_pass
        self._waiting: list[_Entry] = []
        self._changed = asyncio.Event()
        self._closing = False
        self._seconds = 1.0  # of the last pass
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._closing

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def draw(self, drawings: Sequence[Drawing]) -> list[Picture]:
        """Wait for pictures; who is cancelled while waiting frees the places at once.

        Args:
            drawings: checked; all are taken or none.

        Raises:
            QueueFullError: there is no room for all.
            ClosedError: the service is ending.
        """
        if self._closing:
            raise ClosedError("the service is ending")
        if len(self._waiting) + len(drawings) > self._max_waiting:
            passes = math.ceil(len(self._waiting) / self._max_batch)
            raise QueueFullError(max(1, math.ceil(passes * self._seconds)))
        loop = asyncio.get_running_loop()
        entries = [_Entry(drawing, loop.create_future()) for drawing in drawings]
        self._waiting += entries
        self._changed.set()
        try:
            return list(await asyncio.gather(*(entry.picture for entry in entries)))
        finally:
            for entry in entries:
                entry.picture.cancel()
            self._waiting = [entry for entry in self._waiting if not entry.picture.done()]

    async def close(self) -> None:
        """Take nothing new, finish what waits, end."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        while self._waiting or not self._closing:
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
                continue
            if len(self._next()) < self._max_batch and not self._closing:
                await asyncio.sleep(self._max_wait)
            batch = self._next()
            self._waiting = [entry for entry in self._waiting if entry not in batch]
            if batch:  # else all have hung up meanwhile
                await self._pass(batch)

    def _next(self) -> list[_Entry]:
        same = (e for e in self._waiting if e.drawing.key == self._waiting[0].drawing.key)
        return [entry for entry, _ in zip(same, range(self._max_batch), strict=False)]

    async def _pass(self, batch: list[_Entry]) -> None:
        start = time.perf_counter()
        try:
            drawings = [entry.drawing for entry in batch]
            loop = asyncio.get_running_loop()
            pictures = await loop.run_in_executor(self._thread, self._draw, drawings)
        except Exception as error:
            if len(batch) > 1:  # only who is at fault is to hear of it
                for entry in batch:
                    await self._pass([entry])
            elif not batch[0].picture.done():
                batch[0].picture.set_exception(error)
            return
        self._seconds = time.perf_counter() - start
        self._on_pass(len(batch), self._seconds)
        for entry, picture in zip(batch, pictures, strict=True):
            if not entry.picture.done():  # hung up while it was drawn
                entry.picture.set_result(picture)
