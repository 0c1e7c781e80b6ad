"""Times x + gate * linear(tokens) over K timesteps, forward and backward.

FLOPs are 2 x rows x tokens x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "linear_gated_residual"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_linear_gated_residual(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
