"""Small real UNets of every kind that the student takes, and the arguments that go with them."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

BATCH, TOKENS, TEXT = 2, 5, 24

_BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {},
    # 32 + 16 channels in 6 groups of 8, and 16 + 16: no border falls inside a group.
    "aligned": {"norm_num_groups": 4},
    # One group: it straddles every border, and the skip part is empty.
    "one_group": {"norm_num_groups": 1},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
        "use_linear_projection": True,
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scaled_output": {"resnet_out_scale_factor": 1.5, "resnet_skip_time_act": True},
    "mish": {"act_fn": "mish"},
    "no_norm_out": {"norm_num_groups": 8, "conv_out_kernel": 1},
    "only_cross": {"only_cross_attention": True, "mid_block_only_cross_attention": False},
    "class_labels": {"num_class_embeds": 4},
    "class_concat": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": True,
    },
    "timestep_cond": {"time_cond_proj_dim": 6},
    "text_embedding": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "text_proj": {"encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_proj"},
    "other_up_block": {
        "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    },
    "no_mid": {"mid_block_type": None},
    "centered": {"center_input_sample": True, "time_embedding_act_fn": "silu"},
    "gligen": {"attention_type": "gated"},
}


def make_unet(name: str, **changes: Any) -> UNet2DConditionModel:
    """A small UNet with random weights, float64, in eval mode."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**_BASE, **CONFIGS[name], **changes})
    return unet.double().eval()


def make_inputs(size: tuple[int, int] = (8, 8), batch: int = BATCH) -> dict[str, torch.Tensor]:
    """Latents and prompt embeddings, float64."""
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, 4, *size, dtype=torch.float64, generator=generator),
        "prompt_embeds": torch.randn(batch, TOKENS, TEXT, dtype=torch.float64, generator=generator),
    }


def make_conditioning(name: str, batch: int = BATCH) -> dict[str, Any]:
    """What a configuration needs beside latents and text."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if name == "sdxl":
        added = {"text_embeds": noise(batch, 12), "time_ids": noise(batch, 6)}
        return {"added_cond_kwargs": added}
    if name == "class_labels":
        return {"class_labels": torch.arange(batch) + 1}
    if name == "class_concat":
        return {"class_labels": noise(batch, 6)}
    if name == "timestep_cond":
        return {"timestep_cond": noise(batch, 6)}
    if name == "gligen":
        boxes = {
            "boxes": noise(batch, 3, 4).sigmoid(),
            "masks": torch.ones(batch, 3, dtype=torch.float64),
            "positive_embeddings": noise(batch, 3, TEXT),
        }
        return {"cross_attention_kwargs": {"gligen": boxes}}
    return {}
