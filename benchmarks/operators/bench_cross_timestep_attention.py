"""Times attention over keys that K timesteps share, and self-attention, forward and backward.

FLOPs are 4 x rows x tokens x keys x channels, 2.5 times that for backward. Eager torch is
`scaled_dot_product_attention`, over K copies of the text's keys and values. Head sizes 40, 80, 160
(Stable Diffusion 1.5) and 64 (2.1, XL).
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "cross_timestep_attention"
SHAPES = (
    "sd15_512_up3_text",
    "sd15_512_up2_text",
    "sd15_512_up1_text",
    "sdxl_1024_up1_text",
    "sd15_512_up3_self",
    "sd15_512_up2_self",
    "sd15_512_up1_self",
    "sdxl_1024_up1_self",
    "sdxl_1024_up0_self",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cross_timestep_attention(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
