"""The one pass as published: everything repeated K times, nothing shared after the encoder.

The baseline of `bench_one_pass.py`, written from the method's description (Li et al., CVPR 2025,
arXiv 2505.21960) with diffusers' own modules, and checked against the golden cases.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel


def _time_embedding(
    unet: UNet2DConditionModel,
    timesteps: torch.Tensor,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    added_cond_kwargs: dict[str, torch.Tensor] | None,
) -> torch.Tensor:
    embedding = unet.time_embedding(unet.get_time_embed(latents, timesteps))
    added = unet.get_aug_embed(embedding, prompt_embeds, added_cond_kwargs)
    return embedding if added is None else embedding + added


def encode(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the encoder once.

    Args:
        unet: The UNet.
        latents: Noise [B, C, h, w].
        timestep: The scheduler's first timestep, a scalar.
        prompt_embeds: Text [B, L, D].
        added_cond_kwargs: SDXL's pooled text and sizes, B rows each.

    Returns:
        The middle block's output and the skips, first to last.
    """
    embedding = _time_embedding(unet, timestep, latents, prompt_embeds, added_cond_kwargs)
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": prompt_embeds} if hasattr(block, "attentions") else {}
        hidden, block_skips = block(hidden, embedding, **text)
        skips.extend(block_skips)
    return unet.mid_block(hidden, embedding, encoder_hidden_states=prompt_embeds), skips


def predict_noise(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the encoder once and the decoder on K * B repeated rows.

    Args:
        unet: The UNet.
        latents: Noise [B, C, h, w].
        timesteps: The scheduler's timesteps [K]; the encoder runs at the first.
        prompt_embeds: Text [B, L, D].
        added_cond_kwargs: SDXL's pooled text and sizes, B rows each.

    Returns:
        The model outputs [K, B, C, h, w].
    """
    hidden, skips = encode(unet, latents, timesteps[0], prompt_embeds, added_cond_kwargs)
    return decode(unet, hidden, skips, timesteps, prompt_embeds, added_cond_kwargs)


def decode(
    unet: UNet2DConditionModel,
    hidden: torch.Tensor,
    skips: list[torch.Tensor],
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the decoder on K * B repeated rows.

    Args:
        unet: The UNet.
        hidden: The middle block's output [B, C, h, w].
        skips: The encoder's features, first to last, B rows each.
        timesteps: The scheduler's timesteps [K].
        prompt_embeds: Text [B, L, D].
        added_cond_kwargs: SDXL's pooled text and sizes, B rows each.

    Returns:
        The model outputs [K, B, C, h, w].
    """
    steps, batch = len(timesteps), len(hidden)

    def repeat(rows: torch.Tensor) -> torch.Tensor:  # row k * B + b
        return rows.repeat(steps, *[1] * (rows.ndim - 1))

    hidden, prompt_embeds = repeat(hidden), repeat(prompt_embeds)
    skips = [repeat(skip) for skip in skips]
    added_cond_kwargs = {key: repeat(rows) for key, rows in (added_cond_kwargs or {}).items()}
    embedding = _time_embedding(
        unet, timesteps.repeat_interleave(batch), hidden, prompt_embeds, added_cond_kwargs
    )
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, block_skips = skips[:-count], skips[-count:]
        text = {"encoder_hidden_states": prompt_embeds} if hasattr(block, "attentions") else {}
        # Sizes that the halvings do not divide grow back to those of the next block's skips.
        size = skips[-1].shape[2:] if skips else None
        hidden = block(hidden, tuple(block_skips), embedding, upsample_size=size, **text)
    noise_pred = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return noise_pred.unflatten(0, (steps, batch))


def combine(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise_pred: torch.Tensor
) -> torch.Tensor:
    """Take the scheduler's K steps, one after the other, over outputs that are already there.

    Args:
        scheduler: A scheduler whose timesteps are set to K steps.
        latents: Noise [B, C, h, w].
        noise_pred: The model outputs [K, B, C, h, w].

    Returns:
        The latents after the last step.
    """
    scheduler = copy.deepcopy(scheduler)
    for timestep, output in zip(scheduler.timesteps, noise_pred, strict=True):
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def one_pass(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    num_decoder_steps: int,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    **cond: Any,
) -> torch.Tensor:
    """Go from noise to latents in the published form.

    Args:
        unet: The UNet.
        scheduler: A diffusers scheduler that scales neither its input nor the initial noise.
        num_decoder_steps: K.
        latents: Noise [B, C, h, w].
        prompt_embeds: Text [B, L, D].
        **cond: `added_cond_kwargs` for SDXL.

    Returns:
        The denoised latents [B, C, h, w].
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_decoder_steps, device=latents.device)
    noise_pred = predict_noise(unet, latents, scheduler.timesteps, prompt_embeds, **cond)
    return combine(scheduler, latents, noise_pred)


def noise_kl(noise_pred: torch.Tensor) -> torch.Tensor:
    """The KL term of every map as the method's equation says it."""
    mean, variance = noise_pred.mean((2, 3, 4)), noise_pred.var((2, 3, 4))
    return 0.5 * (mean**2 + variance - 1 - variance.log())
