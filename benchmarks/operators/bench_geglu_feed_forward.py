"""Times a transformer block's feed-forward, norm to projection, forward and backward.

FLOPs are 24 x rows x tokens x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "geglu_feed_forward"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_geglu_feed_forward(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
