"""The arguments of a pipeline call, checked: what was wrong, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from tiue.errors import InputError


def prompt_lists(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: Any,
    config: Mapping[str, Any],
) -> tuple[list[str] | None, list[str] | None, int]:
    """Make lists of the prompts.

    Args:
        prompt: One prompt, a list, or None where there are embeddings.
        negative_prompt: One text for all prompts, a list, or None.
        prompt_embeds: [prompts, L, D], or None.
        config: The UNet's configuration.

    Returns:
        The prompts, the negative prompts, and how many there are.

    Raises:
        InputError: No prompts, something that is no text, lists of different lengths, or
            embeddings of another width than the UNet's.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if prompts is not None:
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError(f"prompt must be a text or a list of at least one, got {prompt!r}")
        count = len(prompts)
    else:
        width = config["encoder_hid_dim"] or config["cross_attention_dim"]
        fits = prompt_embeds.ndim == 3 and width in (prompt_embeds.shape[-1], None)
        if not fits and isinstance(width, int):
            raise InputError(
                f"prompt_embeds must be [prompts, tokens, {width}] for this UNet, got"
                f" {list(prompt_embeds.shape)}"
            )
        count = prompt_embeds.shape[0]
    if isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * count
    if negative_prompt is not None and len(negative_prompt) != count:
        raise InputError(
            f"{len(negative_prompt)} negative prompts for {count} prompts: give one text for all,"
            " or one for each"
        )
    return prompts, negative_prompt, count


def latent_shape(
    rows: int,
    config: Mapping[str, Any],
    factor: int,
    height: int | None,
    width: int | None,
    latents: torch.Tensor | None,
) -> tuple[int, int, int, int]:
    """Find the latents' shape from sizes in pixels, given latents, or the UNet's own size.

    Args:
        rows: Images to make.
        config: The UNet's configuration.
        factor: Pixels a latent, each way.
        height: Pixels, or None.
        width: Pixels, or None.
        latents: [rows, C, h, w], or None.

    Returns:
        rows, C, h, w.

    Raises:
        InputError: Latents of another shape, or sizes that no latents have.
    """
    channels, own = config["in_channels"], config["sample_size"]
    if latents is not None:
        if latents.ndim != 4 or latents.shape[:2] != (rows, channels):
            raise InputError(
                f"latents must be [{rows}, {channels}, height, width] (prompts x images a prompt,"
                f" the UNet's channels), got {list(latents.shape)}"
            )
        own = tuple(latents.shape[2:])
    sizes = own if isinstance(own, (tuple, list)) else (own, own)
    own_height, own_width = sizes
    shape = (
        rows,
        channels,
        _latent_size("height", height, own_height, factor),
        _latent_size("width", width, own_width, factor),
    )
    if latents is not None and latents.shape != shape:
        raise InputError(
            f"height and width ask for latents {list(shape)}, given are {list(latents.shape)}:"
            " leave height and width out"
        )
    return shape


def _latent_size(name: str, pixels: int | None, own: int | None, factor: int) -> int:
    if pixels is None:
        if own is None:
            raise InputError(f"this UNet has no size of its own: give {name} in pixels")
        return own
    size = max(1, pixels // factor)
    if pixels != size * factor:
        raise InputError(
            f"{name} must be a positive multiple of {factor}, got {pixels}: the nearest are"
            f" {size * factor} and {(size + 1) * factor}"
        )
    return size


def draw_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Draw the initial latents.

    Args:
        shape: Of the latents.
        generator: Source of the noise; a list gives each image its own.
        device: Where the noise is wanted; it is drawn on the generator's device.
        dtype: Floating point type.

    Returns:
        Noise of standard deviation 1.

    Raises:
        InputError: Another number of generators than images, or a GPU's generator for the CPU.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise InputError(f"{len(generator)} generators for {shape[0]} images: give each its own")
    try:
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
