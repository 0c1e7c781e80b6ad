"""What every student does: features once, K model outputs of them, and the K steps in one."""

from collections.abc import Sequence
from typing import Any

import torch

from tiue.features import as_timesteps
from tiue.schedule import OnePassSchedule


class OnePassModel:
    """A diffusers model whose `encode` runs once and whose `decode` runs for K timesteps."""

    encode: Any
    decode: Any

    def _noise(
        self,
        sample: torch.Tensor,
        schedule: OnePassSchedule,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """sum_k E_k eps_k of a scaled sample, [B, C, H, W]."""
        raise NotImplementedError

    def predict_noise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor | Sequence[float],
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """The K model outputs of the one pass: `encode` at the first timestep, `decode` at all.

        Args:
            latents: [B, C, H, W], scaled as the scheduler wants the model's input
                (`OnePassSchedule.scale_model_input`).
            timesteps: [K].
            prompt_embeds: [B, L, D].
            **conditioning: as `encode`: of a UNet `added_cond_kwargs`, `class_labels`,
                `timestep_cond`, `attention_mask`, `encoder_attention_mask`,
                `cross_attention_kwargs`, and the ControlNet and T2I-Adapter residuals.

        Returns:
            [K, B, C, H, W], differentiable; a predicted variance is left out.

        Raises:
            InputError: channels or rows that do not fit, or no timestep.
        """
        timesteps = as_timesteps(timesteps, latents.device)
        features = self.encode(latents, timesteps[0], prompt_embeds, **conditioning)
        return self.decode(features, timesteps)

    def one_pass(
        self,
        latents: torch.Tensor,
        schedule: OnePassSchedule,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """The whole pass at inference, the K timesteps combined before the last layer.

        Args:
            latents: [B, C, H, W], noise of standard deviation `schedule.init_noise_sigma`.
            schedule: timesteps, S and E.
            prompt_embeds: [B, L, D].
            **conditioning: as `predict_noise`.

        Returns:
            [B, C, H, W], the denoised latents.

        Raises:
            InputError: channels or rows that do not fit.
        """
        if not torch.compiler.is_compiling():
            schedule = schedule.on(latents.device)
        # Not a decorator: torch.compile would take its arguments for fixed in shape.
        with torch.no_grad():
            sample = schedule.scale_model_input(latents)
            return schedule.add(
                latents, self._noise(sample, schedule, prompt_embeds, **conditioning)
            )
