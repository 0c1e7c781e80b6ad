"""Times SiLU(GroupNorm(hidden + shared + time embedding)), forward and backward.

Memory-bound: bytes are the K*B rows, read and written once, and the B shared ones, read once.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "broadcast_add_group_norm_silu"
SHAPES = (
    "sd15_512_up1_res1",
    "sd15_512_up3_res1",
    "sdxl_1024_up2_res1",
    "sdxl_1024_up2_res1-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_broadcast_add_group_norm_silu(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
