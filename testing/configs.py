"""What distinguishes the published UNets, as arguments of diffusers' `UNet2DConditionModel`.

Imports nothing: what needs only the sizes runs without diffusers.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {  # Stable Diffusion 2.1-base
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # Small enough for a test of the benchmark itself: 1.5 M parameters.
    "tiny": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    },
}
# What is counted for the report, at the published sizes of latents: 512 x 512 pixels, of SDXL 1024.
COUNTED = {"sd15": 64, "sd21": 64, "sdxl": 128}
NUM_TOKENS = 77  # what CLIP's tokenizer pads every Stable Diffusion prompt to
