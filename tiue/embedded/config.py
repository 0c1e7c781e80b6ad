"""What the embedded models have in common: sizes, and each stage's rates and step counts."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 64
LATENT_CHANNELS = 16
LATENT_SIZE = 8  # three halvings

TEACHER_STEPS = 25
GUIDANCE_SCALE = 2.5
DECODER_STEPS = 4  # K of the shipped students; the recipes of tiue.distill have the rest


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


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A latent diffusion teacher: UNet and text encoder."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    prompt_drop: float = 0.1
    ema_decay: float
    channels: tuple[int, ...]
    head_size: int = 32
    text_width: int
    text_layers: int = 2
    text_heads: int
    text_feed_forward: int
    # Matrix products and convolutions in bfloat16: 0.38 s an update of the scenes' teacher instead
    # of 0.53, one core of an AMD EPYC with AVX512-BF16. Slower on a CPU without such instructions.
    bf16: bool = False
    seed: int = 0
