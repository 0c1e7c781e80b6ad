"""Times the second half of a resnet, norm to convolution, forward and backward.

FLOPs are 18 x rows x pixels x channels squared.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "broadcast_add_group_norm_silu_conv2d"
SHAPES = (
    "sd15_512_up3_res1",
    "sdxl_1024_up2_res1-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_broadcast_add_group_norm_silu_conv2d(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
