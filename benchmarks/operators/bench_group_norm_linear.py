"""Times group norm and a transformer's projection of every pixel, forward and backward.

FLOPs are 2 x rows x pixels x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "group_norm_linear"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_norm_linear(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
