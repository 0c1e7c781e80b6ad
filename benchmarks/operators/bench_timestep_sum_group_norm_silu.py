"""Times sum_k E_k SiLU(GroupNorm(hidden_k)), forward and backward.

Memory-bound: bytes are the K*B rows, read once, and the B rows of the sum.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "timestep_sum_group_norm_silu"
SHAPES = (
    "sd15_512_out",
    "sdxl_1024_out",
    "sdxl_1024_out-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_timestep_sum_group_norm_silu(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
