"""The stages' configurations at a size that trains in a moment."""

from tiue.embedded.config import AutoencoderConfig, DecoderConfig
from tiue.openmoji.config import TeacherConfig

AUTOENCODER = AutoencoderConfig(
    steps=6,
    batch_size=2,
    width=8,
    warmup_steps=2,
    encoder_blocks=(0, 0, 1, 1),
    decoder_blocks=(1, 1, 1, 0),
)
DECODER = DecoderConfig(steps=6, batch_size=2, warmup_steps=2)
TEACHER = TeacherConfig(
    steps=6,
    batch_size=4,
    warmup_steps=2,
    channels=(32, 32),
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_feed_forward=32,
    vocabulary=560,
)
