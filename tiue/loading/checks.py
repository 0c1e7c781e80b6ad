"""What may be loaded: diffusers' layout, safetensors only, the right architecture."""

import logging
import os
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tiue.errors import ArchitectureError, CheckpointError
from tiue_kernels.nn.layers import runs_own_forward

_log = logging.getLogger(__name__)

PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
_HUB_ARGUMENTS = {
    "subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"
}  # fmt: skip
UNET_CLASSES = {"UNet2DConditionModel", "TiUEUNet"}


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a `from_pretrained`'s arguments that say where its configuration lies.

    Args:
        kwargs: arguments of diffusers' `from_pretrained`. A `torch_dtype` in it, which warns since
            diffusers 0.41, becomes `dtype` in place.

    Returns:
        Arguments of `load_config`.
    """
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    return {name: kwargs[name] for name in _HUB_ARGUMENTS & kwargs.keys()}


def looks_local(name: str) -> bool:
    """Tell whether a name that is no folder here was meant as one, so that no network is asked.

    Args:
        name: what was given as folder or hub id.

    Returns:
        False only for `owner/model` where `owner` is no folder here.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    owner, _, model = name.partition("/")
    return not model or os.path.exists(owner)


def pickle_message(path: str | os.PathLike[str]) -> str:
    """Say that pickles are not loaded and how to convert one."""
    return (
        f"{path} holds only pickled weights, which can run code when loaded; only safetensors are"
        " loaded. If you trust the file, convert it: diffusers.StableDiffusionPipeline."
        "from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder), or"
        " from_single_file(file) for a single .ckpt"
    )


def fit_tokenizer(tokenizer: Any, text_config: Any, name: str) -> None:
    """Bring a tokenizer to the length of its text encoder; refuse one that does not fit.

    Args:
        tokenizer: The tokenizer.
        text_config: Its text encoder's configuration.
        name: What messages call it.

    Raises:
        CheckpointError: If it has words that the text encoder has not, or no padding.
    """
    if len(tokenizer) > text_config.vocab_size:
        raise CheckpointError(
            f"{name} knows {len(tokenizer)} tokens, its text encoder"
            f" {text_config.vocab_size}: take both from one model, or fetch it again"
        )
    if tokenizer.pad_token is None:
        raise CheckpointError(
            f"{name} has no padding token (pad_token in its tokenizer_config.json), which every"
            " Stable Diffusion tokenizer has: fetch it again"
        )
    most = text_config.max_position_embeddings
    if 0 < tokenizer.model_max_length <= most:
        return
    _log.warning(
        "%s is set to %s tokens; its text encoder takes %s, where prompts are cut now",
        *(name, tokenizer.model_max_length, most),
    )
    tokenizer.model_max_length = most


def check_unet_folder(name: str | os.PathLike[str], subfolder: str | None) -> None:
    """See, before anything is loaded, that a local name is a folder with safetensors weights.

    Args:
        name: a folder or a hub id; a hub id passes.
        subfolder: where in it the UNet lies.

    Raises:
        CheckpointError: the folder is missing, or holds no safetensors.
    """
    root = Path(name)
    if not root.is_dir():
        if looks_local(str(name)):
            raise CheckpointError(
                f"there is no folder {name}: give a folder that save_pretrained wrote, or a hub id"
                " owner/model"
            )
        return
    folder = root / (subfolder or "")
    if not (folder / "config.json").is_file():
        hint = "; the UNet lies in its subfolder: subfolder='unet'"
        raise CheckpointError(
            f"{folder} has no config.json{hint if (folder / 'unet').is_dir() else ''}"
        )
    suffixes = {path.suffix for path in folder.iterdir()}
    if ".safetensors" not in suffixes:
        if suffixes & PICKLES:
            raise CheckpointError(pickle_message(folder))
        raise CheckpointError(f"{folder} holds no .safetensors weights; fetch them again")


def check_unet_config(name: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """See that a config.json is a conditional UNet's.

    Args:
        name: where it came from, for the message.
        config: its content.

    Raises:
        CheckpointError: another architecture.
    """
    kind = config.get("_class_name")
    if kind not in UNET_CLASSES:
        raise CheckpointError(
            f"{name} holds a {kind or 'model of no named class'}; TiUEUNet loads the"
            " UNet2DConditionModel of a Stable Diffusion model"
        )


def check_architecture(unet: Any) -> None:
    """See that the one pass can be formed of a UNet.

    Args:
        unet: a `UNet2DConditionModel`.

    Raises:
        ArchitectureError: it has no cross-attention, or reads an image hint.
    """
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        raise ArchitectureError(
            "this UNet has no cross-attention, so no prompt can reach it: the one pass is for "
            "Stable Diffusion UNets (CrossAttnDownBlock2D, CrossAttnUpBlock2D)"
        )
    if unet.config.addition_embed_type == "image_hint":
        raise ArchitectureError(
            "addition_embed_type='image_hint' (Kandinsky's ControlNet) is not supported"
        )


def check_is_unet(unet: Any) -> None:
    """See that something is a UNet itself, with nothing around it that would be lost.

    Args:
        unet: what was given for one.

    Raises:
        ArchitectureError: it is none, or a wrapper is around it.
    """
    name = type(unet).__name__
    if hasattr(unet, "get_base_model"):
        raise ArchitectureError(
            f"this is a {name} of PEFT, whose adapters a UNet holds by itself: give"
            " model.get_base_model()"
        )
    if hasattr(unet, "_orig_mod"):
        raise ArchitectureError(
            "this UNet is compiled: give unet._orig_mod, and compile what is made of it"
        )
    if not isinstance(unet, UNet2DConditionModel):
        raise ArchitectureError(f"TiUEUNet is made of a diffusers UNet2DConditionModel, not {name}")
    if not runs_own_forward(unet):
        raise ArchitectureError(
            "this UNet's forward has been replaced (by offloading, for instance), which the one"
            " pass would not run: remove the hooks (pipe.remove_all_hooks()), and offload what is"
            " made of the UNet or of the pipeline"
        )
