"""Times a training step of the student, forward and backward, against its published form.

The step is that of the distillation without the teacher: noise to denoised latents, a loss of
their distance from a target and the KL term, and the gradients of all weights. What the decoder
keeps for backward is counted beside, on tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.forms.models import random_unet
from benchmarks.forms.rivals import Setting
from benchmarks.measure.interleave import Rival, peak_bytes
from benchmarks.measure.race import Race, relative_difference, short
from benchmarks.saved_bytes import decoder_bytes
from testing import published_form
from tiue import TiUEUNet
from tiue.devices import keep_freed_memory
from tiue_kernels import cpu, functional

LATENTS = (32,)
FORMS = ("published", "tiue", "tiue-recompute")
# Of the largest gradient of a weight; 2e-6 seen in float32.
TOLERANCE = 1e-4
KL_WEIGHT = 0.1
COMPARED = 40  # of so many weights one is compared


def default_forms(_device: torch.device) -> tuple[str, ...]:
    """All."""
    return FORMS


def step(
    predict: Callable[..., torch.Tensor], kl: Callable[..., torch.Tensor], setting: Setting
) -> Rival:
    """A step of one form.

    Args:
        predict: [K, B, C, h, w] of latents, timesteps and conditioning.
        kl: The KL term of each of the K*B maps.
        setting: Weights and inputs.

    Returns:
        A call that leaves new gradients with the weights.
    """
    schedule, timesteps = setting.schedule, setting.timesteps
    latents = setting.inputs["latents"]
    target = torch.zeros_like(latents)

    def run() -> None:
        setting.unet.zero_grad(set_to_none=True)
        noise_pred = predict(timesteps=timesteps, **setting.inputs)
        pictures = schedule.combine(latents, noise_pred)
        loss = 0.5 * (pictures - target).square().mean() + KL_WEIGHT * kl(noise_pred).mean()
        loss.backward()

    return run


@pytest.fixture(scope="module")
def unet(request, device, dtype) -> UNet2DConditionModel:
    return random_unet(request.config.getoption("--bench-model"), device, dtype).train()


@pytest.fixture(scope="module")
def race(request, unet, case, device, dtype) -> Race:
    unet.requires_grad_(True)
    # As `tiue distill` does; all forms gain alike.
    keeps_memory = device.type == "cpu" and keep_freed_memory()
    setting = Setting.build(case, device, dtype, unet)
    recompute = TiUEUNet.from_unet(unet)
    recompute.recompute_feed_forward = True
    rivals = {
        "published": step(
            lambda **inputs: published_form.predict_noise(unet, **inputs),
            published_form.noise_kl,
            setting,
        ),
        "tiue": step(TiUEUNet.from_unet(unet).predict_noise, functional.noise_kl, setting),
        "tiue-recompute": step(recompute.predict_noise, functional.noise_kl, setting),
    }
    forms = request.config.getoption("--bench-forms") or FORMS
    rivals = {name: rival for name, rival in rivals.items() if name in (*forms, "published")}
    facts = {
        "model": case.model,
        "dtype": short(dtype),
        "keeps_freed_memory": keeps_memory,
        "winograd": device.type == "cpu" and cpu.loaded(),
    }
    race = Race(case.label, facts)
    gradients = {name: _gradients(rival, unet) for name, rival in rivals.items()}
    for name in rivals:
        error = max(
            relative_difference(own, expected)
            for own, expected in zip(gradients[name], gradients["published"], strict=True)
        )
        tolerance = TOLERANCE if dtype == torch.float32 else 100 * torch.finfo(dtype).eps
        assert error < tolerance, f"{name}: a gradient differs by {error:.1e} of its largest value"
        options = {"recompute_feed_forward": True} if name == "tiue-recompute" else {}
        saved = decoder_bytes(
            name.partition("-")[0], case.model, case.latent_size, case.batch, **options
        )
        race.of_form[name] = {"relative_difference": error, "saved_mib": round(saved / 2**20, 1)}
    gradients.clear()
    race.run(rivals, request.config.getoption("--bench-rounds"), device)
    peaks = {name: peak_bytes(rival, device) for name, rival in rivals.items()}
    race.facts["peaks_mib"] = {
        name: round(peak / 2**20, 1) for name, peak in peaks.items() if peak is not None
    }
    return race


def _gradients(rival: Rival, unet: UNet2DConditionModel) -> list[torch.Tensor]:
    rival()
    return [parameter.grad.clone() for parameter in list(unet.parameters())[::COMPARED]]


def test_train_step(benchmark, race, form):
    race.enter(benchmark, form)
