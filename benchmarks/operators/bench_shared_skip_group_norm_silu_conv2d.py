"""Times the first half of a resnet, norm to convolution, forward and backward.

FLOPs are 18 x pixels x channels out x channels in, the skip's own channels counted for B rows and
not for K*B.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "shared_skip_group_norm_silu_conv2d"
SHAPES = (
    "sd15_512_up3_res1",
    "sdxl_1024_up2_res0-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shared_skip_group_norm_silu_conv2d(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
