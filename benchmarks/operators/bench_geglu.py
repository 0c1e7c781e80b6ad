"""Times x1 * gelu(x2), forward and backward.

Memory-bound: bytes are x, read once, and half as many written.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "geglu"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_geglu(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
