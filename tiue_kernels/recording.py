"""Whether autograd records the operator that runs, in which case its weights may soon change.

Below autograd, where launchers run, grad mode is off at any call; who enters an operator says it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _State(threading.local):
    on = False


_state = _State()


def is_recording() -> bool:
    """Whether an operator runs that has to be differentiated."""
    return _state.on


@contextmanager
def recording() -> Iterator[None]:
    """While an operator runs that has to be differentiated."""
    before, _state.on = _state.on, True
    try:
        yield
    finally:
        _state.on = before
