"""Times conv2d(SiLU(GroupNorm(x))) of the decoder's first resnet, forward and backward.

FLOPs are 18 x rows x pixels x channels in x channels out.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "group_norm_silu_conv2d"
SHAPES = (
    "sd15_512_up0_res0",
    "sdxl_1024_up0_res0-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_norm_silu_conv2d(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
