"""Times SiLU(GroupNorm(concat(hidden, skip))) of K rows a skip, forward and backward.

Memory-bound: bytes are hidden and skip, read once, and the two parts of the result. Eager torch
repeats the skip K times, concatenates, and reads the result twice more.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "shared_skip_group_norm_silu"
SHAPES = (
    "sd15_512_up1_res2",
    "sd15_512_up3_res1",
    "sdxl_1024_up2_res0",
    "sdxl_1024_up2_res0-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shared_skip_group_norm_silu(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
