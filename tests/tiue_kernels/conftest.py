"""Memory that shows what was not written, and what was written beside it."""

from collections.abc import Iterator

import pytest

from tests.tiue_kernels.fences import Fences


@pytest.fixture
def fences() -> Iterator[None]:
    """An element that no kernel writes fails the comparison, a store beside its tensor the test."""
    with Fences() as mode:
        yield
    mode.check()
