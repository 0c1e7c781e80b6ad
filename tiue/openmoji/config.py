"""Sizes, rates and step counts of the OpenMoji model where they are its own."""

from __future__ import annotations

from dataclasses import dataclass

from tiue.embedded import config as embedded

MAX_PROMPT_TOKENS = 16  # holds all prompts; of the aliases, one is longer: 19 tokens

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


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(embedded.TeacherConfig):
    """The teacher of the pictures: the prompt as a whole, and attention at the lower level."""

    steps: int = 6500
    batch_size: int = 64
    learning_rate: float = 1e-3
    snr_gamma: float = 5.0
    ema_decay: float = 0.998
    # Attention from 4 x 4 down: at 8 x 8 too, a step takes half as long again.
    channels: tuple[int, ...] = (96, 128)
    attention: tuple[bool, ...] = (False, True)
    text_width: int = 192
    text_heads: int = 6
    text_feed_forward: int = 512
    vocabulary: int = 1536
