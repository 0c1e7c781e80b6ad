"""The queue: who shares a pass, who waits, who is sent away; draws are told by their prompts."""

import asyncio
import threading
import time

import pytest

from tiue.serve.batching import Batcher, ClosedError, QueueFullError
from tiue.serve.engine import Drawing


class Drawer:
    """Draws slowly and remembers its passes; a prompt `bad` fails."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.passes: list[list[str]] = []
        self.threads: set[int] = set()
        self.seconds = seconds

    def __call__(self, drawings):
        self.passes.append([drawing.prompt for drawing in drawings])
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if any(drawing.prompt == "bad" for drawing in drawings):
            raise ArithmeticError("bad")
        return [drawing.prompt.upper() for drawing in drawings]


def run(work, drawer, max_batch=4, max_wait=0.01, max_waiting=8):
    async def all_of_it():
        batcher = Batcher(drawer, max_batch, max_wait, max_waiting)
        batcher.start()
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            await batcher.close()

    return asyncio.run(all_of_it())


def ask(batcher, *prompts, **settings):
    return asyncio.ensure_future(batcher.draw([Drawing(p, **settings) for p in prompts]))


def test_requests_of_one_key_share_passes_in_order():
    async def work(batcher):
        asked = [ask(batcher, *"ab"), ask(batcher, "x", height=8), ask(batcher, *"cde")]
        return await asyncio.gather(*asked)

    drawer = Drawer()
    assert run(work, drawer) == [["A", "B"], ["X"], ["C", "D", "E"]]
    assert drawer.passes == [["a", "b", "c", "d"], ["x"], ["e"]]
    assert len(drawer.threads) == 1


def test_a_pass_waits_for_company_and_no_longer():
    async def work(batcher):
        first = ask(batcher, "a")
        await asyncio.sleep(0.05)
        second = ask(batcher, "b")
        await asyncio.gather(first, second)

    waiting, hasty = Drawer(), Drawer(0.0)
    run(work, waiting, max_wait=0.5)
    run(work, hasty, max_wait=0.0)
    assert (waiting.passes, hasty.passes) == ([["a", "b"]], [["a"], ["b"]])


def test_one_bad_request_does_not_spoil_its_batch():
    async def work(batcher):
        asked = [ask(batcher, "a"), ask(batcher, "bad"), ask(batcher, "c")]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, bad, third = run(work, Drawer())
    assert (first, third) == (["A"], ["C"])
    assert isinstance(bad, ArithmeticError)


def test_past_its_bound_the_queue_says_when_to_come_back():
    async def work(batcher):
        taken = ask(batcher, *"abcdefgh")
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await batcher.draw([Drawing("z")])
        assert full.value.retry_after == 2  # two passes of what a pass takes at first, 1 s
        await taken
        return await batcher.draw([Drawing("z")])

    assert run(work, Drawer(0.0)) == ["Z"]


def test_who_hangs_up_frees_the_place_at_once():
    async def work(batcher):
        drawn = ask(batcher, "a", height=8)
        await asyncio.sleep(0.02)  # it is being drawn
        gone = ask(batcher, *"bcdefghi"[:8])
        await asyncio.sleep(0)
        assert len(batcher) == 8
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert len(batcher) == 0
        stays = ask(batcher, *"stuvwxyz")
        return await drawn, await stays

    drawer = Drawer(0.1)
    assert run(work, drawer, max_wait=0.0) == (["A"], list("STUVWXYZ"))
    assert drawer.passes == [["a"], list("stuv"), list("wxyz")]


def test_who_hangs_up_while_drawn_leaves_the_rest_alone():
    async def work(batcher):
        gone, stays = ask(batcher, "a"), ask(batcher, "b")
        await asyncio.sleep(0.05)
        gone.cancel()
        return await stays

    assert run(work, Drawer(0.1), max_wait=0.0) == ["B"]


def test_closing_finishes_what_waits_and_takes_nothing_new():
    async def work():
        drawer = Drawer()
        batcher = Batcher(drawer, 2, 0.0, 8)
        batcher.start()
        asked = ask(batcher, *"abcde")
        await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.draw([Drawing("late")])
        await closing
        return await asked

    assert asyncio.run(work()) == list("ABCDE")
