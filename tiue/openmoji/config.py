"""Sizes, rates and step counts of the embedded model, each stage in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 64
LATENT_CHANNELS = 16
LATENT_SIZE = 8  # three halvings
MAX_PROMPT_TOKENS = 16  # holds all prompts; of the aliases, one is longer: 19 tokens

TEACHER_STEPS = 25
GUIDANCE_SCALE = 2.5

DECODER_STEPS = 4  # K of the embedded student; the recipe `openmoji` of tiue.distill has the rest

TEN_PROMPTS = (
    "red apple",
    "rocket",
    "cat face",
    "sun",
    "birthday cake",
    "evergreen tree",
    "house",
    "pizza",
    "red heart",
    "octopus",
)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The AutoencoderTiny and its training: 64 x 64 pictures to 16 x 8 x 8 latents and back."""

    steps: int = 3000
    batch_size: int = 16
    # Quarter pictures: the network is convolutional, and four times as many steps fit in the hour.
    crop_size: int = 32
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    width: int = 48
    # No block at 64 x 64: a block there costs as much as sixteen at 16 x 16.
    encoder_blocks: tuple[int, ...] = (0, 0, 2, 2)
    decoder_blocks: tuple[int, ...] = (3, 3, 1, 0)
    # Held per channel by a penalty: small beside the decoder's soft clamp, 3 tanh(z / 3).
    latent_std: float = 0.5
    moment_weight: float = 0.1
    # Noise on the latents, in units of their deviation, so that the decoder forgives the UNet.
    latent_noise: float = 0.25
    edge_weight: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's further training, on whole pictures and the encoder's final latents."""

    steps: int = 3000
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    latent_noise: float = 0.25
    edge_weight: float = 0.5
    seed: int = 1


@dataclass(frozen=True)
class TeacherConfig:
    """The latent diffusion teacher: UNet and text encoder, trained together on prompts."""

    steps: int = 6500
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    prompt_drop: float = 0.1
    snr_gamma: float = 5.0
    ema_decay: float = 0.998
    # Attention from 4 x 4 down: at 8 x 8 too, a step takes half as long again.
    channels: tuple[int, ...] = (96, 128)
    attention: tuple[bool, ...] = (False, True)
    head_size: int = 32
    text_width: int = 192
    text_layers: int = 2
    text_heads: int = 6
    text_feed_forward: int = 512
    vocabulary: int = 1536
    seed: int = 0
