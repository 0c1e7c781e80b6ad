"""The teacher: a Stable Diffusion in small that knows 1918 pictures by their names."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTokenizer

from tiue.embedded import teacher as embedded
from tiue.embedded.autoencoder import encode_pictures, load_autoencoder
from tiue.embedded.loop import cosine_rate
from tiue.embedded.teacher import (
    build_scheduler,
    build_unet,
    run_teacher,
    tokenize,
    train_tokenizer,
)
from tiue.openmoji.config import MAX_PROMPT_TOKENS, TEN_PROMPTS, TeacherConfig
from tiue.openmoji.data import ALIAS_SHARE, Pictures


class TeacherTraining(embedded.TeacherTraining):
    """Trains on the pictures' names: v-prediction, weighted towards the clean latents."""

    pictures: Pictures
    config: TeacherConfig
    sheet_prompts = TEN_PROMPTS
    sheet_every = 1000

    def __init__(
        self,
        pictures: Pictures,
        latents: torch.Tensor,
        tokenizer: CLIPTokenizer,
        config: TeacherConfig,
    ) -> None:
        super().__init__(pictures, latents, tokenizer, config)
        self.prompt_ids = tokenize(tokenizer, pictures.prompts)
        self.alias_ids = tokenize(tokenizer, pictures.aliases)
        self.empty_ids = tokenize(tokenizer, [""])

    @staticmethod
    def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
        """Builds the UNet with random weights.

        The prompt as a whole scales and shifts every resnet: a name is learned in a fraction of the
        steps that cross-attention alone takes.
        """
        return build_unet(
            config,
            config.attention,
            addition_embed_type="text",
            addition_embed_type_num_heads=config.text_heads,
            resnet_time_scale_shift="scale_shift",
        )

    @staticmethod
    def build_scheduler() -> DDIMScheduler:
        """Builds the scheduler of Stable Diffusion 2.x (v-prediction).

        Trailing spacing starts at t = 999. Leading spacing would start at t = 751 for four steps,
        where a quarter of the deviation is signal: this model takes pure noise there for a picture.
        """
        return build_scheduler("v_prediction", "trailing")

    def draw_prompts(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Token ids of the chosen pictures: the prompt, at times its alias, at times none."""
        draw = torch.rand((len(chosen), 1), generator=generator)
        drop, alias = self.config.prompt_drop, ALIAS_SHARE
        ids = torch.where(draw < drop + alias, self.alias_ids[chosen], self.prompt_ids[chosen])
        return torch.where(draw < drop, self.empty_ids, ids)

    def token_ids(self, prompts: torch.Tensor) -> torch.Tensor:
        """The drawn prompts, which are token ids already."""
        return prompts

    def objective(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """V (Salimans and Ho, "Progressive Distillation", 2022) and the weight of its error.

        The weight is (min(SNR, gamma) + 1) / (SNR + 1): in terms of the clean latents one of
        min(SNR, gamma) + 1. Noise prediction would weigh them by SNR, 0.01 at t = 900, where all
        that tells one picture from another is the prompt.
        """
        snr = compute_snr(self.scheduler, timesteps)
        weight = (snr.clamp(max=self.config.snr_gamma) + 1) / (snr + 1)
        return self.scheduler.get_velocity(clean, noise, timesteps), weight

    def rate(self, step: int) -> float:
        """Factor on the learning rate."""
        return cosine_rate(step, self.config.steps, self.config.warmup_steps)


def train_teacher(
    pictures: Pictures,
    autoencoder: Path,
    folder: Path,
    config: TeacherConfig,
    resume: bool = False,
) -> StableDiffusionPipeline:
    """Trains the teacher as `run_teacher` does, on the latents of the autoencoder in a folder."""
    vae = load_autoencoder(autoencoder)
    texts = sorted({*pictures.prompts, *pictures.aliases})
    tokenizer = train_tokenizer(texts, config.vocabulary, MAX_PROMPT_TOKENS)
    training = TeacherTraining(pictures, encode_pictures(vae, pictures), tokenizer, config)
    return run_teacher(training, vae, folder, resume)
