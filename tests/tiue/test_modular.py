"""The block of diffusers' modular pipelines gives the pipeline's latents."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from tests.tiue.tiny import tiny_pipeline, tiny_scheduler
from tiue import TiUEPipeline
from tiue.pipelines.modular import OnePassStep


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("steps", [2, 4])
def test_the_block_draws_what_the_pipeline_draws(scheduler, steps):
    plain = tiny_pipeline(scheduler=tiny_scheduler(scheduler))
    pipe = TiUEPipeline(**plain.components)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = pipe(
        ["apple", "pear"], latents=noise, num_decoder_steps=steps, output_type="latent"
    ).images
    block = OnePassStep().init_pipeline()
    block.update_components(unet=pipe.unet, scheduler=pipe.scheduler)
    embeds, _ = pipe.encode_prompt(["apple", "pear"], "cpu", 1, False)
    got = block(latents=noise, prompt_embeds=embeds, num_decoder_steps=steps, output="latents")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
