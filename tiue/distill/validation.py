"""Pictures on the way: the same prompts and noise at every look."""

from operator import itemgetter

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn

from tiue.distill.data import SampleDraws
from tiue.distill.text import Text
from tiue.schedule import OnePassSchedule


class Validation:
    """Draws a few prompts with fixed noise.

    Args:
        prompts: The prompts.
        text: What the UNet is told of them.
        latent_shape: C, H, W of a sample.
        vae: Decodes the student's latents; None where this process shows nothing.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        prompts: list[str],
        text: Text,
        latent_shape: tuple[int, int, int],
        vae: AutoencoderKL | AutoencoderTiny | None,
        seed: int,
    ) -> None:
        self.prompts, self._vae, self._text = prompts, vae, text
        draws = SampleDraws(seed, range(len(prompts)), text.tokens.device)
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
            z, place = latents[row : row + 1], slice(row, row + 1)
            x = schedule.combine(z, student(z, self._text.map(itemgetter(place))))
            if self._vae is not None:
                shift = self._vae.config.get("shift_factor") or 0.0
                x = self._vae.decode(x.float() / self._vae.config.scaling_factor + shift).sample
                images += VaeImageProcessor().postprocess(x, output_type="pil")
        return images
