"""The UNets and transformers that benchmarks and their tests run on: random weights."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from testing.configs import CONFIGS, NUM_TOKENS, TEXT_TOKENS, TRANSFORMERS
from tiue.dit import TiUEPixArtTransformer2DModel, TiUESD3Transformer2DModel
from tiue.dit.student import OnePassTransformer

M = TypeVar("M", bound=torch.nn.Module)


def random_unet(
    name: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> UNet2DConditionModel:
    """Build a UNet of a published size without computing diffusers' own slow initialisation.

    Args:
        name: A key of `testing.configs.CONFIGS`.
        device: Where the weights are drawn.
        dtype: Their type.
        seed: The generator's seed.

    Returns:
        The UNet, in evaluation mode and frozen.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[name])
    unet.to_empty(device=device).to(dtype).eval()
    return draw_parameters(unet, torch.Generator(device).manual_seed(seed))


def draw_parameters(module: M, generator: torch.Generator) -> M:
    """Draw a module's parameters so that values stay near 1 through its depth.

    Args:
        module: Changed in place, and frozen.
        generator: On the module's device.

    Returns:
        The module.
    """
    module.requires_grad_(False)
    for parameter_name, parameter in module.named_parameters():
        if parameter.ndim > 1:  # variance 1 / fan-in keeps activations near 1 through the depth
            bound = math.sqrt(3 / parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:  # a norm's scale near 1, every bias near 0: none of them a no-op
            parameter.uniform_(-0.1, 0.1, generator=generator)
            parameter.add_(1.0 if "norm" in parameter_name and "weight" in parameter_name else 0.0)
    return module


def random_inputs(
    unet: UNet2DConditionModel, batch: int, latent_size: int, seed: int = 1
) -> dict[str, Any]:
    """Draw one batch of inputs for a UNet.

    Args:
        unet: The UNet to be fed.
        batch: Rows B.
        latent_size: Latent height and width; the picture is eight times as large in pixels.
        seed: The seed of a CPU generator, so that every device gets the same numbers.

    Returns:
        `latents` [B, C, h, w], `prompt_embeds` [B, 77, D] and, for SDXL, `added_cond_kwargs`.
    """
    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    inputs: dict[str, Any] = {
        "latents": normal(batch, config.in_channels, latent_size, latent_size),
        "prompt_embeds": normal(batch, NUM_TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        # Six sizes (original, crop, target) are embedded beside the pooled text.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pixels = float(8 * latent_size)
        time_ids = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]] * batch)
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(batch, pooled),
            "time_ids": time_ids.to(unet.device, unet.dtype),
        }
    return inputs


def stable_diffusion_scheduler() -> DDIMScheduler:
    """Return the scheduler of section 1 of the method: t = 751, 501, 251, 1 for four steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def random_transformer(
    name: str, device: torch.device, dtype: torch.dtype, border: int | None = None, seed: int = 0
) -> OnePassTransformer:
    """Build a student of a published size, as `random_unet` builds a UNet.

    Args:
        name: A key of `testing.configs.TRANSFORMERS`.
        device: Where the weights are drawn.
        dtype: Their type.
        border: Blocks that run once; by default half.
        seed: The generator's seed.

    Returns:
        The student, in evaluation mode and frozen.
    """
    student: Any = empty_transformer(name, border)
    student.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for positions in student.buffers():  # sines; any numbers of their size do
        positions.uniform_(-1, 1, generator=generator)
    return draw_parameters(student, generator)


def transformer_class(name: str) -> Any:
    """The student's class of a key of `testing.configs.TRANSFORMERS`."""
    return TiUESD3Transformer2DModel if name.startswith("sd3") else TiUEPixArtTransformer2DModel


def empty_transformer(
    name: str, border: int | None = None, device: str = "meta"
) -> OnePassTransformer:
    """A student of a published size, in evaluation mode.

    Args:
        name: A key of `testing.configs.TRANSFORMERS`.
        border: Blocks that run once; by default half.
        device: By default one that holds no data.
    """
    with torch.device(device):
        student = transformer_class(name)(**TRANSFORMERS[name]).eval()
    student.num_shared_blocks = border or len(student.blocks_list) // 2
    return student


def transformer_inputs(
    student: OnePassTransformer, name: str, batch: int, seed: int = 1
) -> dict[str, Any]:
    """Draw one batch of inputs for a student.

    Args:
        student: To be fed.
        name: The key that it was built of.
        batch: Rows B.
        seed: Of a CPU generator.

    Returns:
        `latents`, `prompt_embeds`, and what else its family reads.
    """
    model: Any = student
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    size, tokens = config.sample_size, TEXT_TOKENS[name]
    latents = normal(batch, config.in_channels, size, size)
    if name.startswith("sd3"):
        return {
            "latents": latents,
            "prompt_embeds": normal(batch, tokens, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
        }
    mask = torch.ones(batch, tokens)
    mask[:, tokens // 2 :] = 0
    return {
        "latents": latents,
        "prompt_embeds": normal(batch, tokens, config.caption_channels),
        "encoder_attention_mask": mask.to(model.device, model.dtype),
    }


def transformer_scheduler(name: str) -> Any:
    """The scheduler that a family is published with, of a kind that one pass can take."""
    if name.startswith("sd3"):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(beta_end=0.02, beta_start=0.0001, clip_sample=False, steps_offset=1)
