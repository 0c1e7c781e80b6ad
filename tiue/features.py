"""What the encoder hands to the decoder, and the arguments of both, brought to one form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiue.errors import InputError


@dataclass(frozen=True)
class EncoderFeatures:
    """What the encoder hands to the decoder, all of B rows, shared by every timestep.

    Attributes:
        hidden: [B, C, h, w], after the mid block.
        skips: the down blocks' outputs, in the encoder's order, ControlNet residuals added.
        encoder_hidden_states: the text as cross-attention reads it, [B, L, D] (a tuple with
            IP-Adapter).
        attention_mask: [B, 1, keys] bias of self-attention, or None.
        encoder_attention_mask: [B, 1, L] bias of cross-attention, or None.
        cross_attention_kwargs: what attention processors are given, and the LoRA `scale`.
        timestep_cond: [B, D], beside the timestep (guidance embedding), or None.
        class_embedding: [B, E], or None.
        added_embedding: [B, E], SDXL's size and pooled text, or None.
        sample_dtype: of the latents.
    """

    hidden: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    encoder_hidden_states: Any
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any] | None
    timestep_cond: torch.Tensor | None
    class_embedding: torch.Tensor | None
    added_embedding: torch.Tensor | None
    sample_dtype: torch.dtype


def as_timesteps(timesteps: torch.Tensor | Sequence[float], device: torch.device) -> torch.Tensor:
    """[K] on a device; K of 0 or another shape is an `InputError`."""
    timesteps = torch.as_tensor(timesteps, device=device)
    if timesteps.ndim != 1 or not len(timesteps):
        raise InputError(
            f"timesteps must be [K] with K of at least 1, got shape {tuple(timesteps.shape)}"
        )
    return timesteps


def mask_to_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, keys] of 1 = keep to a [B, 1, keys] bias, with diffusers' -10000 for discard."""
    if mask is None:
        return None
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
