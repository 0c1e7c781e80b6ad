"""What a model folder holds, and what to do when the one pass cannot run it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from tiue.errors import ArchitectureError, CheckpointError
from tiue.loading.checks import PICKLES, UNET_CLASSES, looks_local, pickle_message


@dataclass(frozen=True)
class Family:
    """What the pipelines of one kind are made of.

    Attributes:
        name: For messages.
        pipeline: The class that runs them.
        required: Names of the components that a folder must hold.
        models: Those of them that have weights.
        added_conditions: What the UNet may want beside text: its `addition_embed_type`.
    """

    name: str
    pipeline: str
    required: frozenset[str]
    models: frozenset[str]
    added_conditions: tuple[str | None, ...]

    @property
    def supported(self) -> str:
        """What the pipeline runs, for messages."""
        parts = ", ".join(sorted(self.required - {"unet"}))
        return f"{self.pipeline} runs {self.name}: {parts} and a UNet2DConditionModel"


STABLE_DIFFUSION = Family(
    "Stable Diffusion 1.x and 2.x",
    "TiUEPipeline",
    frozenset({"vae", "text_encoder", "tokenizer", "unet", "scheduler"}),
    frozenset({"unet", "vae", "text_encoder"}),
    (None, "text"),  # "text" pools the prompt itself
)
STABLE_DIFFUSION_XL = Family(
    "Stable Diffusion XL",
    "TiUEXLPipeline",
    STABLE_DIFFUSION.required | {"text_encoder_2", "tokenizer_2"},
    STABLE_DIFFUSION.models | {"text_encoder_2"},
    ("text_time",),
)
_FAMILIES = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
_OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}


def check_local(model: str, family: Family, given: Collection[str] = ()) -> bool:
    """See, before anything is loaded, that a local name is a folder that the pipeline can load.

    Args:
        model: A folder or a hub id.
        family: What the pipeline runs.
        given: Names of components that the caller has, which the folder need not hold.

    Returns:
        Whether it is a folder; if not, it is a hub id.

    Raises:
        CheckpointError: A local name that is no folder, or a folder that does not fit.
    """
    folder = Path(model)
    if folder.is_dir():
        check_index(model, read_index(folder), family, given)
        check_weights(folder, family, given)
        return True
    if folder.is_file():
        raise CheckpointError(
            f"{model} is a file: give a diffusers folder, or load one .safetensors file with"
            f" {family.pipeline}.from_single_file"
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


def check_index(
    model: str, index: dict[str, Any], family: Family, given: Collection[str] = ()
) -> None:
    """See that a model_index.json names a pipeline of a family, before any of it is loaded.

    Args:
        model: The folder or hub id, for the message.
        index: The content of model_index.json.
        family: What it must be of.
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
    missing = sorted(family.required - parts.keys() - set(given))
    unknown = sorted(parts.keys() - family.required - _OPTIONAL)
    differences = []
    if unknown:
        differences.append(f"has {', '.join(unknown)}")
    if missing:
        differences.append(f"lacks {', '.join(missing)}")
    if "unet" in parts.keys() - set(given) and parts["unet"] not in UNET_CLASSES:
        differences.append(f"its unet is a {parts['unet']}")
    if differences:
        others = [f for f in _FAMILIES if f.required == parts.keys() - _OPTIONAL]
        cure = f"; load it with tiue.{others[0].pipeline}" if others and others != [family] else ""
        raise CheckpointError(
            f"{model} is a {kind} ({'; '.join(differences)}). {family.supported}{cure}"
        )


def check_weights(folder: Path, family: Family, given: Collection[str] = ()) -> None:
    """See that every model of a folder has its weights in safetensors.

    Args:
        folder: A folder in the diffusers layout.
        family: What it is of.
        given: Names of components that the caller has, which the folder need not hold.

    Raises:
        CheckpointError: Weights are absent, or pickled.
    """
    for name in sorted(family.models - set(given)):
        suffixes = {path.suffix for path in (folder / name).glob("*")}
        if ".safetensors" in suffixes:
            continue
        if suffixes & PICKLES:
            raise CheckpointError(pickle_message(folder / name))
        raise CheckpointError(f"{folder / name} holds no .safetensors weights; fetch them again")


def check_parts(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL | AutoencoderTiny,
    family: Family,
    *text_encoders: CLIPTextModel | None,
) -> None:
    """See that a UNet, a VAE and text encoders fit together for text to image.

    Args:
        unet: The student, or any Stable Diffusion UNet.
        vae: The image decoder; its latent channels are the UNet's.
        family: What they are to be of.
        *text_encoders: None where only `prompt_embeds` will be given.

    Raises:
        ArchitectureError: They do not fit, or the UNet wants inputs that a prompt does not give.
    """
    factor: Any = getattr(vae.config, "scaling_factor", None)
    if not (_is_number(factor) and 0 < factor < math.inf):
        raise ArchitectureError(
            f"the VAE's scaling_factor is {factor!r}: it must be a positive number (SD 1.x and 2.x:"
            " 0.18215, XL: 0.13025)"
        )
    size = unet.config.sample_size
    sides = size if isinstance(size, list | tuple) else [size]
    whole = all(isinstance(side, int) and side > 0 for side in sides)
    if size is not None and not (whole and (isinstance(size, int) or len(sides) == 2)):
        raise ArchitectureError(
            f"the UNet's sample_size is {size!r}: it must be a positive whole number of latents, or"
            " two of them"
        )
    channels = vae.config.latent_channels
    if unet.config.in_channels != channels or unet.config.out_channels != channels:
        raise ArchitectureError(
            f"the UNet takes {unet.config.in_channels} and gives {unet.config.out_channels}"
            f" channels, the VAE has {channels}: UNet and VAE must be of one model; for inpainting,"
            " InstructPix2Pix and depth UNets, tiue.one_pass takes the diffusers pipeline that they"
            " are for"
        )
    if unet.config.addition_embed_type not in family.added_conditions:
        raise ArchitectureError(
            f"the UNet wants added conditions of the type {unet.config.addition_embed_type} (SDXL's"
            f" wants text_time). {family.supported}; tiue.one_pass takes any diffusers pipeline"
        )
    if None in text_encoders or unet.config.encoder_hid_dim is not None:
        return
    widths = unet.config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    # SDXL's UNet reads what its two encoders give side by side.
    given = sum(encoder.config.hidden_size for encoder in text_encoders if encoder is not None)
    if widths != {given}:
        raise ArchitectureError(
            f"the UNet reads text of width {sorted(widths)}, the text encoders give {given}: take"
            " all from one model (SD 1.x: 768, 2.x: 1024, XL: 2048)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
