"""The benchmark's baseline is the published computation: checked against its own numbers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from testing import published_form

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases lie beside a full checkout only")
@pytest.mark.parametrize("case", ["sd1-like", "sd2-like"])
def test_published_form_equals_golden(case):
    folder = GOLDEN / case
    unet = UNet2DConditionModel.from_pretrained(folder).double().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(folder)
    expected = load_file(folder / "expected.safetensors")
    steps = json.loads((folder / "case.json").read_text())["decoder_steps"]
    latents, prompt_embeds = expected["latents"].double(), expected["prompt_embeds"].double()

    scheduler.set_timesteps(steps)
    noise_pred = published_form.predict_noise(unet, latents, scheduler.timesteps, prompt_embeds)
    denoised = published_form.one_pass(unet, scheduler, steps, latents, prompt_embeds)

    torch.testing.assert_close(scheduler.timesteps, expected["timesteps"].long())
    torch.testing.assert_close(
        noise_pred.flatten(0, 1), expected["noise_pred"], rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(denoised, expected["pred_original"], rtol=1e-10, atol=1e-10)
