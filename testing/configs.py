"""What distinguishes the published UNets and transformers, as arguments of diffusers' classes.

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

# Of diffusers' `PixArtTransformer2DModel` (PixArt-alpha at 512 x 512) and `SD3Transformer2DModel`
# (Stable Diffusion 3 medium, 1024 x 1024), in everything that differs from the class's defaults.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "pixart": {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "sample_size": 64,
        "patch_size": 2,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "sd3": {
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "pixart-tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "cross_attention_dim": 16,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 12,
        "use_additional_conditions": False,
    },
    "sd3-tiny": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 8,
    },
}
# Tokens of text that a family's pipeline pads to: T5's of PixArt-alpha; CLIP's and T5's of SD3.
TEXT_TOKENS = {"pixart": 120, "sd3": 77 + 256, "pixart-tiny": 6, "sd3-tiny": 6}
