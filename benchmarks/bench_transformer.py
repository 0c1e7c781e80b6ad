"""Times one pass of a transformer, and its decoder alone, against the repeated form.

PixArt-alpha's size unless `--bench-transformer` says otherwise: 0.6 G weights, 2.4 GB in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import transformer_counts
from benchmarks.forms import repeated_transformers
from benchmarks.forms.models import random_transformer, transformer_inputs
from benchmarks.forms.transformers import FORMS, passes, schedules
from benchmarks.measure.ceilings import matmul_tflop_s
from benchmarks.measure.interleave import Rival
from benchmarks.measure.race import Case, Race, relative_difference, short
from benchmarks.measure.shares import time_shares
from tiue.dit.student import OnePassTransformer

WHATS = ("decoder", "pass")
# Plain sampling, which a CPU needs half a minute for, is timed twice.
MOST_ROUNDS = {"full-steps": 2}
# Of the largest output, in float32: 4e-6 seen.
TOLERANCE = 2e-5


def run_race(
    what: str, student: OnePassTransformer, case: Case, forms: list[str], rounds: int
) -> Race:
    """Hold the forms against the repeated one, then time them in turn.

    Args:
        what: One of `WHATS`: "decoder", from features to model outputs, or the whole "pass".
        student: Whose weights all have.
        case: What is raced; its model is a key of `testing.configs.TRANSFORMERS`.
        forms: Of `FORMS`; a decoder has the first two alone.
        rounds: Timings of a form.

    Returns:
        The race.

    Raises:
        AssertionError: The one pass differs from the repeated form.
    """
    model: Any = student
    inputs = transformer_inputs(student, case.model, case.batch)
    both = schedules(case.model, case.num_decoder_steps)
    if what == "decoder":
        given = dict(inputs)
        latents, text = given.pop("latents"), given.pop("prompt_embeds")
        timesteps = both[0].timesteps.to(model.device)
        with torch.no_grad():
            features = student.encode(latents, timesteps[0], text, **given)
        calls: dict[str, Rival] = {
            "repeated": partial(repeated_transformers.decode, student, features, timesteps),
            "tiue": partial(student.decode, features, timesteps),
        }
    else:
        calls = dict(passes(student, case.model, inputs, both))
    rivals = {form: torch.no_grad()(calls[form]) for form in forms if form in calls}
    facts = {
        "what": what,
        "model": case.model,
        "batch": case.batch,
        "num_decoder_steps": case.num_decoder_steps,
        "num_shared_blocks": student.num_shared_blocks,
        "dtype": short(model.dtype),
        "matmul_tflop_s": matmul_tflop_s(model.device, model.dtype),
    }
    race = Race(f"{what}, {case.label}", facts)
    outputs: dict[str, Any] = {form: rival() for form, rival in rivals.items()}  # and the warm-up
    for form in rivals:
        parts = transformer_counts.multiply_adds(
            form, case.model, case.batch, case.num_decoder_steps, student.num_shared_blocks
        )
        counts = [part.total for name, part in parts.items() if what in ("pass", name)]
        race.of_form[form] = {"multiply_adds": sum(counts)}
    if {"repeated", "tiue"} <= rivals.keys():
        difference = relative_difference(outputs["tiue"], outputs["repeated"])
        narrow = 10 * torch.finfo(model.dtype).eps
        limit = TOLERANCE if model.dtype == torch.float32 else narrow
        assert difference <= limit, f"the forms differ by {difference:.1e} of the largest value"
        race.of_form["tiue"]["relative_difference"] = difference
    counts_of = {form: min(rounds, MOST_ROUNDS.get(form, rounds)) for form in rivals}
    race.run(rivals, counts_of, model.device)
    if model.device.type == "cpu":
        for form in rivals.keys() & {"repeated", "tiue"}:
            race.of_form[form]["time_shares"] = time_shares(rivals[form])
    return race


@pytest.fixture(scope="module")
def student(request, device, dtype) -> OnePassTransformer:
    return random_transformer(request.config.getoption("--bench-transformer"), device, dtype)


@pytest.fixture(scope="module", params=WHATS)
def race(request, student) -> Race:
    option = request.config.getoption
    model = option("--bench-transformer")
    (batch, *_), (steps, *_) = option("--bench-batch"), option("--bench-steps")
    case = Case(model, student.config.sample_size, batch, steps)
    forms = option("--bench-forms") or list(FORMS)
    return run_race(request.param, student, case, forms, option("--bench-rounds"))


@pytest.mark.parametrize("form", FORMS)
def test_transformer(benchmark, race, form):
    if form not in race.seconds:
        pytest.skip("not asked for, or of the whole pass alone")
    race.enter(benchmark, form)
