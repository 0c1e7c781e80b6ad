"""A one-pass transformer's decoder with everything repeated K times and every block called whole.

The baseline that the transformers' counts and benchmarks are held against. It starts from the
features that the student's own `encode` gives, so that what differs is the decoder alone: text is
projected once here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

from tiue.dit.student import OnePassTransformer, TransformerFeatures


def decode(
    student: OnePassTransformer, features: TransformerFeatures, timesteps: torch.Tensor
) -> torch.Tensor:
    """Run the blocks after the border on K * B repeated rows.

    Args:
        student: Of the PixArt or the Stable Diffusion 3 family.
        features: From its `encode`.
        timesteps: [K].

    Returns:
        The model outputs [K, B, C_out, H, W].

    Raises:
        TypeError: A student of another family.
    """
    run = next((own for family, own in _FAMILIES.items() if isinstance(student, family)), None)
    if run is None:
        raise TypeError(f"no repeated form of a {type(student).__name__}")
    steps, batch = len(timesteps), features.hidden.shape[0]

    def repeat(rows: Any) -> Any:  # row k * B + b
        if isinstance(rows, dict):
            return {name: repeat(own) for name, own in rows.items()}
        return rows if rows is None else rows.repeat(steps, *[1] * (rows.ndim - 1))

    rows = timesteps.repeat_interleave(batch)
    tokens = run(student, repeat(features.hidden), repeat(features.text), rows, repeat, features)
    (height, width), patch = features.grid, student.config.patch_size
    maps = tokens.reshape(-1, height, width, patch, patch, tokens.shape[-1] // patch**2)
    maps = torch.einsum("nhwpqc->nchpwq", maps)
    maps = maps.reshape(len(rows), -1, height * patch, width * patch)
    return maps.unflatten(0, (steps, batch))


def _pixart(
    model: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    rows: torch.Tensor,
    repeat: Callable[[Any], Any],
    features: TransformerFeatures,
) -> torch.Tensor:
    given = repeat(features.conditioning)
    modulation, embedded = model.adaln_single(
        rows, given["added_cond_kwargs"], batch_size=len(rows), hidden_dtype=hidden.dtype
    )
    for block in model.decoder_blocks:
        hidden = block(
            hidden,
            attention_mask=given["attention_mask"],
            encoder_hidden_states=text,
            encoder_attention_mask=given["encoder_attention_mask"],
            timestep=modulation,
        )
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    return model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)


def _sd3(
    model: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    rows: torch.Tensor,
    repeat: Callable[[Any], Any],
    features: TransformerFeatures,
) -> torch.Tensor:
    embedding = model.time_text_embed(rows, repeat(features.conditioning["pooled_projections"]))
    for block in model.decoder_blocks:
        text, hidden = block(hidden, text, embedding)
    return model.proj_out(model.norm_out(hidden, embedding))


_FAMILIES: dict[type[Any], Callable[..., torch.Tensor]] = {
    PixArtTransformer2DModel: _pixart,
    SD3Transformer2DModel: _sd3,
}
