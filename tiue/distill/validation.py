"""Pictures on the way: the same prompts and noise at every look."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from tiue.distill.data import SampleDraws
from tiue.schedule import OnePassSchedule


class Validation:
    """Draws a few prompts with fixed noise.

    Args:
        prompts: The prompts.
        prompt_embeds: Their embeddings, [N, L, D].
        latent_shape: C, H, W of a sample.
        vae: Decodes the student's latents; None where this process shows nothing.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        prompts: list[str],
        prompt_embeds: Tensor,
        latent_shape: tuple[int, int, int],
        vae: AutoencoderKL | AutoencoderTiny | None,
        seed: int,
    ) -> None:
        self.prompts, self._vae, self._prompt_embeds = prompts, vae, prompt_embeds
        draws = SampleDraws(seed, range(len(prompts)), prompt_embeds.device)
        self._noise = draws.normal(latent_shape)

    @torch.no_grad()
    def draw(self, student: nn.Module, schedule: OnePassSchedule) -> list[Image.Image]:
        """Draw the prompts.

        Args:
            student: Predicts [K, B, C, H, W] of latents and embeddings; every process calls it.
            schedule: Its K timesteps.

        Returns:
            One picture a prompt; none where there is no VAE.
        """
        latents = self._noise * schedule.init_noise_sigma
        images = []
        for row in range(len(self.prompts)):  # one by one: no more memory than a training step
            z, text = latents[row : row + 1], self._prompt_embeds[row : row + 1]
            x = schedule.combine(z, student(z, text))
            if self._vae is not None:
                shift = self._vae.config.get("shift_factor") or 0.0
                x = self._vae.decode(x.float() / self._vae.config.scaling_factor + shift).sample
                images += VaeImageProcessor().postprocess(x, output_type="pil")
        return images
