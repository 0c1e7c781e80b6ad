"""Times S z + sum_k E_k eps_k, forward and backward.

Latents are small: on a large GPU the time is that of a launch.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "one_pass_combine"
SHAPES = (
    "sd15_512_latents",
    "sdxl_1024_latents",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_pass_combine(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
