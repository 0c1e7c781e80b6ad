"""Times LayerNorm(x) * (1 + scale) + shift over K timesteps, forward and backward.

Memory-bound: bytes are x, read once for all timesteps, and K times as many written.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "adaptive_layer_norm"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_adaptive_layer_norm(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
