"""Times linear(LayerNorm(concat(hidden, skip))), the skip shared by the timesteps, both directions.

Compute-bound: of 2 K halves of a product K + 1 are left.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "shared_skip_layer_norm_linear"
SHAPES = (
    "sd15_512_up3_transformer",
    "sdxl_1024_up1_transformer",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shared_skip_layer_norm_linear(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
