"""Times x + gate * y over K timesteps, forward and backward.

Memory-bound: bytes are x, read once for all timesteps, the branch, and the sum.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "gated_residual"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gated_residual(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
