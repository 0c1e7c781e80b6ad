"""Times group norm of a map that a transformer reads as tokens, forward and backward.

Memory-bound: bytes are the map, read, and as many tokens, written.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "group_norm_tokens"
SHAPES = (
    "sd15_512_up3_transformer-nhwc",
    "sdxl_1024_up1_transformer-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_norm_tokens(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
