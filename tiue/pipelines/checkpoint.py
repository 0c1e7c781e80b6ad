"""What a model folder holds, and what to do when the one pass cannot run it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import CLIPTextModel

from tiue.checkpoints import PICKLES, UNET_CLASSES, looks_local, pickle_message
from tiue.errors import ArchitectureError, CheckpointError
from tiue.unet import TiUEUNet

SUPPORTED = (
    "TiUEPipeline runs Stable Diffusion 1.x and 2.x: vae, text_encoder, tokenizer, scheduler and"
    " a UNet2DConditionModel"
)
_REQUIRED = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
_OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}
_MODELS = {"unet", "vae", "text_encoder"}


def check_local(model: str, given: Collection[str] = ()) -> bool:
    """See, before anything is loaded, that a local name is a folder that the pipeline can load.

    Args:
        model: A folder or a hub id.
        given: Names of components that the caller has, which the folder need not hold.

    Returns:
        Whether it is a folder; if not, it is a hub id.

    Raises:
        CheckpointError: A local name that is no folder, or a folder that does not fit.
    """
    folder = Path(model)
    if folder.is_dir():
        check_index(model, read_index(folder), given)
        check_weights(folder, given)
        return True
    if folder.is_file():
        raise CheckpointError(
            f"{model} is a file: give a diffusers folder, or load one .safetensors file with"
            " TiUEPipeline.from_single_file"
        )
    if looks_local(model):
        raise CheckpointError(f"there is no folder {model}; give a diffusers folder")
    return False


def read_index(folder: Path) -> dict[str, Any]:
    """Read a folder's model_index.json.

    Args:
        folder: A folder in the diffusers layout.

    Returns:
        Its content: the names of the pipeline's and the components' classes.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json, so it holds no diffusers pipeline. A UNet alone"
            " runs with the other parts of the model that it was made of:"
            " TiUEPipeline.from_pretrained(model, unet=TiUEUNet.from_pretrained(folder))"
        )
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch the model again") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); fetch the model again")
    return index


def check_index(model: str, index: dict[str, Any], given: Collection[str] = ()) -> None:
    """See that a model_index.json names a Stable Diffusion pipeline, before any of it is loaded.

    Args:
        model: The folder or hub id, for the message.
        index: The content of model_index.json.
        given: Names of components that the caller has, which the folder need not hold.

    Raises:
        CheckpointError: The pipeline is of another architecture, or brings code of its own.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise CheckpointError(f"{model} brings code of its own ({kind}), which is never run")
    parts = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    missing = sorted(_REQUIRED - parts.keys() - set(given))
    unknown = sorted(parts.keys() - _REQUIRED - _OPTIONAL)
    differences = []
    if unknown:
        differences.append(f"has {', '.join(unknown)}")
    if missing:
        differences.append(f"lacks {', '.join(missing)}")
    if "unet" in parts.keys() - set(given) and parts["unet"] not in UNET_CLASSES:
        differences.append(f"its unet is a {parts['unet']}")
    if differences:
        raise CheckpointError(f"{model} is a {kind} ({'; '.join(differences)}). {SUPPORTED}")


def check_weights(folder: Path, given: Collection[str] = ()) -> None:
    """See that every model of a folder has its weights in safetensors.

    Args:
        folder: A folder in the diffusers layout.
        given: Names of components that the caller has, which the folder need not hold.

    Raises:
        CheckpointError: Weights are absent, or pickled.
    """
    for name in sorted(_MODELS - set(given)):
        suffixes = {path.suffix for path in (folder / name).glob("*")}
        if ".safetensors" in suffixes:
            continue
        if suffixes & PICKLES:
            raise CheckpointError(pickle_message(folder / name))
        raise CheckpointError(f"{folder / name} holds no .safetensors weights; fetch them again")


def check_parts(
    unet: TiUEUNet, vae: AutoencoderKL | AutoencoderTiny, text_encoder: CLIPTextModel | None
) -> None:
    """See that a UNet, a VAE and a text encoder fit together for text to image.

    Args:
        unet: The student, or any Stable Diffusion UNet.
        vae: The image decoder; its latent channels are the UNet's.
        text_encoder: None where only `prompt_embeds` will be given.

    Raises:
        ArchitectureError: They do not fit, or the UNet wants inputs that a prompt does not give.
    """
    channels = vae.config.latent_channels
    if unet.config.in_channels != channels or unet.config.out_channels != channels:
        raise ArchitectureError(
            f"the UNet takes {unet.config.in_channels} and gives {unet.config.out_channels}"
            f" channels, the VAE has {channels}: inpainting and depth UNets are not supported, and"
            " UNet and VAE must be of one model"
        )
    if unet.config.addition_embed_type not in (None, "text"):  # "text" pools the prompt itself
        raise ArchitectureError(
            f"the UNet wants added conditions ({unet.config.addition_embed_type}), as SDXL's does."
            f" {SUPPORTED}; call TiUEUNet.one_pass with added_cond_kwargs for others"
        )
    if text_encoder is None or unet.config.encoder_hid_dim is not None:
        return
    widths = unet.config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    if widths != {text_encoder.config.hidden_size}:
        raise ArchitectureError(
            f"the UNet reads text of width {sorted(widths)}, the text encoder gives"
            f" {text_encoder.config.hidden_size}: take both from one model (SD 1.x: 768, 2.x: 1024)"
        )
