"""Times a transformer block's modulated and gated feed-forward over K timesteps.

FLOPs are 16 x rows x tokens x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "adaptive_feed_forward"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_adaptive_feed_forward(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
