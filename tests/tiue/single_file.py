"""A tiny pipeline in one file, under the names of Stable Diffusion's first code."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _replaced(text: str, names: Iterable[tuple[str, str]]) -> str:
    for theirs, first in names:
        text = text.replace(theirs, first)
    return text


def _unet_name(key: str, config: Any) -> str:
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    if key in known:
        return known[key]
    per_block = config.layers_per_block + 1
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 2 * int(match[2]) + (match[1] == "attentions")
        return f"middle_block.{place}.{_resnet(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match is not None, key
    side, block, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        crosses = config.up_block_types[block].startswith("CrossAttn")
        return f"output_blocks.{(block + 1) * per_block - 1}.{1 + crosses}.{rest}"
    place = block * per_block + index
    name = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
    return f"{name}.{int(part == 'attentions')}.{_resnet(part, rest)}"


def _resnet(part: str, rest: str) -> str:
    return _replaced(rest, _RESNET.items()) if part == "resnets" else rest


def _vae_name(key: str, levels: int) -> str:
    known = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if key in known:
        return known[key]
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        return _replaced(key.replace("mid_block.attentions.0", "mid.attn_1"), _ATTENTION.items())
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    return key.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")


def save_single_file(pipe: Any, path: Path) -> Path:
    """Write a `StableDiffusionPipeline`'s weights as one .safetensors file.

    Args:
        pipe: of Stable Diffusion 1.x.
        path: to write to.

    Returns:
        `path`.
    """
    levels = len(pipe.vae.config.up_block_types)
    text = pipe.text_encoder.state_dict()
    prefix = "" if any(key.startswith("text_model.") for key in text) else "text_model."
    named: dict[str, torch.Tensor] = {
        **{
            f"model.diffusion_model.{_unet_name(key, pipe.unet.config)}": value
            for key, value in pipe.unet.state_dict().items()
        },
        **{
            f"first_stage_model.{_vae_name(key, levels)}": value
            for key, value in pipe.vae.state_dict().items()
        },
        **{f"cond_stage_model.transformer.{prefix}{key}": value for key, value in text.items()},
    }
    save_file({key: value.contiguous() for key, value in named.items()}, path)
    return path
