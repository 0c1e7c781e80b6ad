"""Tiny Stable Diffusion parts of the classes that a full-size folder holds, random weights."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_DIM = 32
TEXT_LENGTH = 16


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are single ASCII letters, digits and signs."""
    characters = string.ascii_lowercase + string.digits + "!'(),-./:?"
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def tiny_text_encoder(
    vocab_size: int, cls: type[CLIPTextModel] | type[CLIPTextModelWithProjection] = CLIPTextModel
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text model of two layers of width 32."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_DIM,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
        projection_dim=TEXT_DIM,
    )
    return cls(config).eval()


def tiny_unet(**overrides) -> UNet2DConditionModel:
    """A UNet of two levels, 8 x 8 latents, text of width 32."""
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | overrides).eval()


def tiny_xl_unet() -> UNet2DConditionModel:
    """A UNet of two levels that wants SDXL's pooled text and sizes, text of width 64."""
    return tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * TEXT_DIM,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_DIM,
    )


def tiny_vae() -> AutoencoderKL:
    """An AutoencoderKL that makes four pixels of a latent, each way."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def tiny_autoencoder_tiny() -> AutoencoderTiny:
    """An AutoencoderTiny that makes four pixels of a latent, each way."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


def tiny_scheduler(cls: type[SchedulerMixin] = DDIMScheduler, **overrides) -> SchedulerMixin:
    """A scheduler with Stable Diffusion's own settings."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    return cls.from_config(config | overrides)


def tiny_pipeline(seed: int = 0, **components) -> StableDiffusionPipeline:
    """A whole `StableDiffusionPipeline` of the parts above; `components` replace some of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        parts = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "tokenizer": tokenizer,
            "unet": tiny_unet(),
            "scheduler": tiny_scheduler(),
            "safety_checker": None,
            "feature_extractor": None,
        }
    pipe = StableDiffusionPipeline(**parts | components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_parts(seed: int = 0) -> dict[str, Any]:
    """The components of a `StableDiffusionXLPipeline`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        return {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(len(tokenizer)),
            "text_encoder_2": tiny_text_encoder(len(tokenizer), CLIPTextModelWithProjection),
            "tokenizer": tokenizer,
            "tokenizer_2": tiny_tokenizer(),
            "unet": tiny_xl_unet(),
            "scheduler": tiny_scheduler(),
        }
