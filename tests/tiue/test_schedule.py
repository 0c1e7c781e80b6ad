"""OnePassSchedule against stepping the scheduler itself."""

import copy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from testing.tolerances import EXACT_RELATIVE, relative_error
from tiue import OnePassSchedule
from tiue.errors import InputError, SchedulerError

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, **SD}
# The largest error against the scheduler's own steps. Those that step in float32 whatever they
# are given cannot be followed closer than that.
FOLLOWED: dict[str, tuple[dict[str, Any], float]] = {
    "DDIMScheduler": (DDIM, EXACT_RELATIVE),
    "DPMSolverMultistepScheduler": (SD, 1e-6),
    "DPMSolverSinglestepScheduler": (
        {"beta_schedule": "scaled_linear", "lower_order_final": True},
        EXACT_RELATIVE,
    ),
    "UniPCMultistepScheduler": (SD, EXACT_RELATIVE),
    "DEISMultistepScheduler": (SD, EXACT_RELATIVE),
    "EulerDiscreteScheduler": (SD, 1e-6),
}


def build(name: str, settings: dict[str, Any]) -> Any:
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("name", FOLLOWED)
def test_equals_the_schedulers_own_steps(name: str, steps: int, prediction_type: str) -> None:
    settings, tolerance = FOLLOWED[name]
    scheduler = build(name, {**settings, "prediction_type": prediction_type})
    schedule = OnePassSchedule.from_scheduler(scheduler, steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator)
    outputs = torch.randn(steps, 2, 4, 3, 3, dtype=torch.float64, generator=generator)

    scheduler.set_timesteps(steps)
    sample = latents
    for k, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep)
        if k == 0:
            assert relative_error(schedule.scale_model_input(latents), scaled) <= tolerance
        sample = scheduler.step(outputs[k], timestep, sample).prev_sample

    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    assert schedule.encoder_timestep == scheduler.timesteps[0]
    assert schedule.prediction_type == prediction_type
    assert schedule.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma))
    assert schedule.noise_coefficients.dtype == torch.float64
    assert relative_error(schedule.combine(latents, outputs), sample) <= tolerance


def test_the_figures_of_the_method() -> None:
    schedule = OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM))
    assert schedule.timesteps.tolist() == [751, 501, 251, 1]
    assert schedule.latent_coefficient == pytest.approx(4.2346, abs=5e-5)
    expected = torch.tensor([-2.4919, -0.9249, -0.6568, -0.0121], dtype=torch.float64)
    assert (schedule.noise_coefficients - expected).abs().max() < 5e-5


def test_nothing_outside_is_changed() -> None:
    scheduler = build("DPMSolverMultistepScheduler", SD)
    scheduler.set_timesteps(13)
    before = copy.deepcopy(vars(scheduler))
    state = torch.get_rng_state()
    OnePassSchedule.from_scheduler(scheduler, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(vars(scheduler)) == repr(before)


def test_combine_is_differentiable_and_keeps_the_dtype() -> None:
    schedule = OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM))
    latents = torch.ones(1, 1, 1, 1, requires_grad=True)
    outputs = torch.ones(4, 1, 1, 1, 1, requires_grad=True)
    schedule.combine(latents, outputs).sum().backward()
    assert latents.grad is not None
    assert outputs.grad is not None
    assert latents.grad.item() == pytest.approx(schedule.latent_coefficient)
    assert torch.allclose(outputs.grad.flatten().double(), schedule.noise_coefficients)
    half = schedule.combine(latents.half(), outputs.half())
    assert half.dtype == torch.float16


def test_skip_below_drops_rows_and_keeps_the_encoders_timestep() -> None:
    schedule = OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM))
    shorter = schedule.skip_below(0.05)
    assert shorter.timesteps.tolist() == [751, 501, 251]
    assert torch.equal(shorter.noise_coefficients, schedule.noise_coefficients[:3])
    # The least weight that is kept is the bound itself.
    assert len(schedule.skip_below(schedule.noise_coefficients[2].abs().item()).timesteps) == 3
    with pytest.raises(InputError, match="drops every decoder row"):
        schedule.skip_below(3.0)


def test_skip_below_of_the_first_timestep_keeps_it_for_the_encoder() -> None:
    schedule = OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM))
    schedule = replace(schedule, noise_coefficients=schedule.noise_coefficients.flip(0))
    shorter = schedule.skip_below(0.05)
    assert shorter.timesteps.tolist() == [501, 251, 1]
    assert shorter.encoder_timestep == 751


@pytest.mark.parametrize("name", ["timesteps", "noise_coefficients", "encoder_timestep"])
def test_a_copy_on_a_device_is_made_once_and_not_kept_when_the_original_changes(name: str) -> None:
    schedule = OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM))
    device = torch.device("meta")
    first = schedule.on(device)
    assert schedule.on(device) is first
    getattr(schedule, name).mul_(2)
    second = schedule.on(device)
    assert second is not first
    assert schedule.on(device) is second
    assert schedule.on(torch.device("cpu")) is schedule


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DDPMScheduler", {**SD, "clip_sample": False}, "draws noise"),
        ("EulerAncestralDiscreteScheduler", SD, "draws noise"),
        ("LCMScheduler", {**SD, "original_inference_steps": 50}, "draws noise"),
        ("HeunDiscreteScheduler", SD, "wants 7 model outputs"),
        ("PNDMScheduler", {**SD, "skip_prk_steps": True}, "wants 5 model outputs"),
        ("DDIMScheduler", {**DDIM, "clip_sample": True}, "clip_sample=False"),
        ("DDIMScheduler", {**DDIM, "thresholding": True}, "thresholding=False"),
        ("DPMSolverMultistepScheduler", {**SD, "thresholding": True}, "thresholding=False"),
    ],
)
def test_refusals_name_the_cure(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SchedulerError, match=message) as caught:
        OnePassSchedule.from_scheduler(build(name, settings), 4)
    assert "False" in str(caught.value) or "DDIMScheduler.from_config" in str(caught.value)


def test_a_nonlinear_step_is_noticed() -> None:
    class Saturating(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            (sample, *rest) = super().step(*args, **kwargs)
            return sample.clamp(-50, 50), *rest

    class Shifted(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            (sample, *rest) = super().step(*args, **kwargs)
            return sample + 1e-3, *rest

    class Bent(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            (sample, *rest) = super().step(*args, **kwargs)
            return sample + 1e-4 * sample.abs(), *rest  # a tenth of a thousandth of the value

    for kind in (Saturating, Shifted, Bent):
        with pytest.raises(SchedulerError, match="not a linear map"):
            OnePassSchedule.from_scheduler(kind(**DDIM), 4)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(InputError, match=str(steps)):
        OnePassSchedule.from_scheduler(build("DDIMScheduler", DDIM), steps)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("settings", "mu"),
    [({}, None), ({"shift": 3.0}, None), ({"use_dynamic_shifting": True}, 0.8)],
)
def test_flow_matching_equals_the_schedulers_own_steps(settings, mu, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    schedule = OnePassSchedule.from_scheduler(scheduler, steps, mu=mu)
    assert schedule.prediction_type == "flow_prediction"
    assert (schedule.init_noise_sigma, schedule.model_input_scale) == (1.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 3, generator=generator)
    outputs = torch.randn(steps, 2, 4, 3, 3, generator=generator)
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    sample = latents
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        sample = scheduler.step(output, timestep, sample).prev_sample
    assert schedule.timesteps.equal(scheduler.timesteps)
    assert relative_error(schedule.combine(latents, outputs), sample) <= 1e-6
    # From pure noise to data: the velocities' weights add up to -1, the noise's is 1.
    assert schedule.latent_coefficient == pytest.approx(1, abs=1e-6)
    assert schedule.noise_coefficients.sum().item() == pytest.approx(-1, abs=1e-6)


def test_a_flow_matching_scheduler_says_what_it_needs():
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(SchedulerError, match="give mu"):
        OnePassSchedule.from_scheduler(flow(use_dynamic_shifting=True), 4)
    with pytest.raises(SchedulerError, match="leave mu out"):
        OnePassSchedule.from_scheduler(flow(), 4, mu=1.0)
    with pytest.raises(SchedulerError, match="draws noise"):
        OnePassSchedule.from_scheduler(flow(stochastic_sampling=True), 4)
    with pytest.raises(SchedulerError, match="no noise levels"):
        OnePassSchedule.from_scheduler(flow(), 4, strength=0.5)
