"""Times nearest x2 upsampling and a 3 x 3 convolution, forward and backward.

FLOPs are those of the phase form, 32 x rows x pixels x channels squared; eager torch needs 2.25
times as many.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "upsample_conv2d"
SHAPES = (
    "sd15_512_up1_upsampler",
    "sd15_512_up2_upsampler",
    "sdxl_1024_up1_upsampler",
    "sdxl_1024_up1_upsampler-nhwc",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_upsample_conv2d(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
