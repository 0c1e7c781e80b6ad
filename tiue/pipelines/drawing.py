"""From noise and text embeddings to pictures: the part of a pipeline call that is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tiue.compiled import compile_call
from tiue.schedule import OnePassSchedule
from tiue.unet import TiUEUNet


def _untimed(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


def draw(
    unet: TiUEUNet,
    vae: Any,
    noise: torch.Tensor,
    text: torch.Tensor,
    schedule: OnePassSchedule,
    guidance_scale: float | None,
    to_pixels: bool,
    conditioning: dict[str, Any],
    stage: Callable[[str], AbstractContextManager[None]] = _untimed,
) -> torch.Tensor:
    """One pass, guidance and the VAE's decoder.

    Args:
        unet: The student.
        vae: Its image decoder.
        noise: [rows, C, h, w], of the schedule's initial deviation.
        text: [rows, L, D]; with guidance the negative half comes first.
        schedule: Timesteps, S and E.
        guidance_scale: Of classifier-free guidance; None for none.
        to_pixels: Whether to run the VAE.
        conditioning: What `TiUEUNet.encode` takes beside.
        stage: Names what runs inside.

    Returns:
        [B, 3, H, W] in -1..1, or the latents [B, C, h, w].
    """
    schedule = schedule if torch.compiler.is_compiling() else schedule.on(noise.device)
    with torch.no_grad():
        with stage("encoder"):
            features = unet.encode(
                schedule.scale_model_input(noise), schedule.encoder_timestep, text, **conditioning
            )
        with stage("decoder"):
            latents = unet.decode_combined(features, noise, schedule)
        if guidance_scale is not None:
            # Combining is linear and S z is the same on both sides, so guiding the combined
            # latents equals guiding each of the K model outputs.
            negative, positive = latents.chunk(2)
            latents = negative + guidance_scale * (positive - negative)
        if not to_pixels:
            return latents
        with stage("VAE"):
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor
            return vae.decode(scaled, return_dict=False)[0]


class CompiledDrawing:
    """`draw`, compiled for the UNet and the VAE that it is called with last.

    Args:
        backend: As `compile_call`.
        options: Likewise.
    """

    def __init__(self, backend: str | None, options: dict[str, Any]) -> None:
        self._backend = backend
        self._options = options
        self._parts: tuple[Any, Any] = (None, None)
        self._call: Callable[..., torch.Tensor] = draw

    def __call__(self, unet: TiUEUNet, vae: Any, *args: Any) -> torch.Tensor:
        if unet is not self._parts[0] or vae is not self._parts[1]:

            def draw_with_parts(*args: Any) -> torch.Tensor:
                return draw(unet, vae, *args)

            self._call = compile_call(draw_with_parts, [unet, vae], self._backend, **self._options)
            self._parts = (unet, vae)
        return self._call(*args)
