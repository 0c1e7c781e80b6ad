"""Times the embedded model from a prompt to a picture, and each stage's share of it."""

from __future__ import annotations

import statistics

import pytest
import torch

import tiue
from benchmarks.measure.interleave import wall_clock
from benchmarks.measure.race import Race, short
from tiue.openmoji.config import TEN_PROMPTS

FORMS = ("tiue",)
BATCHES = (1, 8)
# The decoder's stage ends with the combined latents.
STAGES = ("text encoder", "encoder", "decoder", "VAE")
ROUNDS_A_ROUND = 4  # a picture takes a tenth of a second: more of them steady the median


@pytest.fixture(scope="module")
def pipe(device) -> tiue.TiUEPipeline:
    pipe = tiue.load_openmoji().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=BATCHES, ids=lambda batch: f"B = {batch}")
def race(request, pipe) -> Race:
    batch = request.param
    prompts = list(TEN_PROMPTS[:batch])

    def draw() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        pipe(prompts, num_decoder_steps=4, generator=generators)

    draw()
    seconds, stages = [], {name: [] for name in STAGES}
    for _ in range(ROUNDS_A_ROUND * request.config.getoption("--bench-rounds")):
        with pipe.record_timings() as timings:
            seconds.append(wall_clock(draw) / batch)
        for name in STAGES:
            stages[name].append(timings[name] / batch)
    medians = {name: statistics.median(rounds) for name, rounds in stages.items()}
    facts = {
        "batch": batch,
        "num_decoder_steps": 4,
        "dtype": short(pipe.unet.dtype),
        "stages_s": medians | {"rest": statistics.median(seconds) - sum(medians.values())},
        "order": "one form",
    }
    return Race(f"a picture of the embedded model, B = {batch}", facts, {"tiue": seconds})


@pytest.mark.parametrize("form", FORMS)
def test_picture(benchmark, race, form):
    race.enter(benchmark, form)
