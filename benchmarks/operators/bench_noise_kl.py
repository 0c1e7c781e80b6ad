"""Times the KL term of every noise map, forward and backward.

Latents are small: on a large GPU the time is that of a launch.
"""

import pytest

from benchmarks.operators.race import DIRECTIONS

OPERATOR = "noise_kl"
SHAPES = (
    "sd15_512_latents",
    "sdxl_1024_latents",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise_kl(benchmark, race_of, direction, form):
    race_of.enter(benchmark, direction, form)
