"""Times the whole one pass, noise to latents, against its published form in the same run."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import published_form
from benchmarks.interleave import enter, interleave, peak_bytes
from benchmarks.models import random_inputs, random_unet, stable_diffusion_scheduler
from tiue import OnePassSchedule, TiUEUNet

NUM_DECODER_STEPS = 4
BATCH = 1
FORMS = ("published", "tiue")


@dataclass(frozen=True)
class Race:
    """Both forms' timings of one case, interleaved."""

    case: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int | None]
    facts: dict[str, Any]

    def extra_info(self, form: str) -> dict[str, Any]:
        medians = {name: statistics.median(rounds) for name, rounds in self.seconds.items()}
        info = self.facts | {"case": self.case, "form": form}
        info["speedup_over_published"] = medians["published"] / medians[form]
        if (peak := self.peak_bytes[form]) is not None:
            info["peak_mib"] = round(peak / 2**20, 1)
        return info


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.item()


def assert_equal_forms(
    outputs: dict[str, torch.Tensor], unet: UNet2DConditionModel, inputs: dict[str, Any]
) -> float:
    """Refuse to time a form that computes something else; return how far the two are apart."""
    difference = relative_difference(outputs["tiue"], outputs["published"])
    if unet.dtype == torch.float32:
        assert difference < 2e-5, f"the forms differ by {difference:.1e} of the largest value"
        return difference
    # Half types: no further from float32 than the published form itself, up to a factor of two.
    wide_inputs = {name: value.float() for name, value in inputs.items() if torch.is_tensor(value)}
    if "added_cond_kwargs" in inputs:
        added = inputs["added_cond_kwargs"]
        wide_inputs["added_cond_kwargs"] = {name: rows.float() for name, rows in added.items()}
    reference = published_form.one_pass(
        copy.deepcopy(unet).float(), stable_diffusion_scheduler(), NUM_DECODER_STEPS, **wide_inputs
    )
    errors = {form: relative_difference(output, reference) for form, output in outputs.items()}
    assert errors["tiue"] < 2 * errors["published"] + torch.finfo(unet.dtype).eps, errors
    return difference


@pytest.fixture(scope="module")
def unet(request, device, dtype) -> UNet2DConditionModel:
    return random_unet(request.config.getoption("--bench-model"), device, dtype)


@pytest.fixture(scope="module")
def race(request, unet, latent_size, device, dtype) -> Race:
    rounds = request.config.getoption("--bench-rounds")
    scheduler = stable_diffusion_scheduler()
    schedule = OnePassSchedule.from_scheduler(scheduler, NUM_DECODER_STEPS)
    inputs = random_inputs(unet, BATCH, latent_size)
    rivals = {
        "published": partial(published_form.one_pass, unet, scheduler, NUM_DECODER_STEPS, **inputs),
        "tiue": partial(TiUEUNet.from_unet(unet).one_pass, schedule=schedule, **inputs),
    }
    # The call that is compared is also the warm-up.
    difference = assert_equal_forms({form: rivals[form]() for form in FORMS}, unet, inputs)
    model = request.config.getoption("--bench-model")
    return Race(
        case=f"{model}, {latent_size} x {latent_size} latents",
        seconds=interleave(rivals, rounds, device),
        peak_bytes={form: peak_bytes(rivals[form], device) for form in FORMS},
        facts={
            "model": model,
            "latent_size": latent_size,
            "batch": BATCH,
            "num_decoder_steps": NUM_DECODER_STEPS,
            "dtype": str(dtype).removeprefix("torch."),
            "relative_difference": difference,
            "order": "interleaved",
        },
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_pass(benchmark, race, form):
    benchmark.group = race.case
    benchmark.extra_info.update(race.extra_info(form))
    enter(benchmark, race.seconds[form])
