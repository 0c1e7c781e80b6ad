"""Times layer norm and the projections to query, key and value, forward and backward.

FLOPs are 6 x rows x tokens x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "layer_norm_linear"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer_norm_linear(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
