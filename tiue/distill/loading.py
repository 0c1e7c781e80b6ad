"""The parts of a run, read from folders or hub ids: safetensors only, one clear error otherwise."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from tiue.distill.clip import ClipScorer
from tiue.distill.text import Encoder, TextEncoder, XLTextEncoder
from tiue.embedded import EMBEDDED, weights_folder
from tiue.errors import CheckpointError, InputError, TiUEError
from tiue.files import sha256
from tiue.loading.checks import fit_tokenizer, looks_local
from tiue.loading.weights import load_models, load_whole
from tiue.unet import TiUEUNet

_PIPELINES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


@contextmanager
def _reading(part: str, source: str) -> Iterator[None]:
    if not Path(source).is_dir() and looks_local(source):
        raise CheckpointError(
            f"There is no folder '{source}'. Give a Stable Diffusion pipeline: a folder that "
            "save_pretrained wrote, or a hub id owner/model."
        )
    try:
        yield
    except TiUEError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"Cannot load the {part} of '{source}' ({error}). Give the folder or hub id of a "
            "Stable Diffusion pipeline with safetensors weights."
        ) from error


def resolve_teacher(source: str) -> str:
    """Put the folder in the place of the name of a model in this package."""
    return str(weights_folder(source) / "teacher") if source in EMBEDDED else source


def load_unet(source: str, dtype: torch.dtype = torch.float32) -> TiUEUNet:
    """Load a UNet, teacher's or student's.

    Args:
        source: Folder or hub id of a Stable Diffusion pipeline, or the folder of a UNet itself.
        dtype: Type of its weights; float32 for one that is trained.

    Returns:
        The UNet, in evaluation mode.

    Raises:
        ArchitectureError: If it has no cross-attention.
        CheckpointError: If it is missing, incomplete, a pickle or of another architecture.
    """
    source = resolve_teacher(source)
    subfolder = None if (Path(source) / "config.json").is_file() else "unet"
    with _reading("UNet", source):
        return TiUEUNet.from_pretrained(source, subfolder=subfolder, dtype=dtype)


def teacher_digest(source: str) -> str:
    """Tell a teacher's UNet from others by its weights, wherever they lie.

    Args:
        source: Folder or hub id of the teacher, which has been loaded from there.

    Returns:
        SHA-256 over the weights' files.
    """
    source = resolve_teacher(source)
    if not Path(source).is_dir():
        source = snapshot_download(source, allow_patterns=["unet/*"], local_files_only=True)
    folder = Path(source) / "unet" if (Path(source) / "unet").is_dir() else Path(source)
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def load_text_encoder(source: str, device: torch.device) -> Encoder:
    """Load a teacher's tokenizers and text encoders: one of each, or SDXL's two.

    Args:
        source: Folder or hub id of a Stable Diffusion pipeline.
        device: Where the text encoder shall run.

    Returns:
        All, as one function of prompts.

    Raises:
        CheckpointError: If one is missing, incomplete or a pickle.
    """
    source = resolve_teacher(source)
    if is_xl(source):
        return XLTextEncoder(_load_xl_text(source, _read_index(source), device))
    with _reading("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
    with _reading("text encoder", source):
        text_encoder = load_whole(
            CLIPTextModel.from_pretrained, source, "text encoder", subfolder="text_encoder"
        )
    fit_tokenizer(tokenizer, text_encoder.config, f"The tokenizer of '{source}'")
    return TextEncoder(tokenizer, text_encoder.to(device))


def is_xl(source: str) -> bool:
    """Whether a teacher has SDXL's second text encoder."""
    return "text_encoder_2" in _read_index(resolve_teacher(source))


def _load_xl_text(
    source: str, index: dict[str, Any], device: torch.device
) -> StableDiffusionXLPipeline:
    """The pipeline of SDXL's tokenizers and text encoders alone."""
    parts: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2"):
        with _reading(name, source):
            parts[name] = AutoTokenizer.from_pretrained(source, subfolder=name)
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, kind in encoders.items():
        with _reading(name, source):
            encoder = load_whole(kind.from_pretrained, source, name, subfolder=name)
            parts[name] = encoder.to(device).eval().requires_grad_(False)
        tokenizer = name.replace("text_encoder", "tokenizer")
        fit_tokenizer(parts[tokenizer], encoder.config, f"The {tokenizer} of '{source}'")
    return StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, add_watermarker=False,
        force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True), **parts,
    )  # fmt: skip


def _read_index(source: str) -> dict[str, Any]:
    """A pipeline's model_index.json, or nothing where there is none."""
    try:
        return StableDiffusionPipeline.load_config(source)
    except (OSError, ValueError):
        return {}


def load_vae(source: str, device: torch.device) -> AutoencoderKL | AutoencoderTiny | None:
    """Load a teacher's VAE, for pictures on the way.

    Args:
        source: Folder or hub id of a Stable Diffusion pipeline.
        device: Where it shall run.

    Returns:
        The VAE, or None if the teacher has none.

    Raises:
        CheckpointError: If it is damaged or a pickle.
    """
    source = resolve_teacher(source)
    classes = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny)}
    try:
        kind = AutoencoderKL.load_config(source, subfolder="vae").get("_class_name")
    except (OSError, ValueError):
        return None
    if kind not in classes:
        return None
    with _reading("VAE", source):
        vae = load_whole(classes[kind].from_pretrained, source, "VAE", subfolder="vae")
    return vae.to(device).eval().requires_grad_(False)


def pixels_a_latent(source: str) -> int:
    """How many pixels a latent of a teacher's VAE has each way; 8 where it has none."""
    try:
        config = AutoencoderKL.load_config(resolve_teacher(source), subfolder="vae")
    except (OSError, ValueError):
        return 8
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(widths) - 1) if widths else 8


def load_clip_scorer(model: str, vae: str, device: torch.device) -> ClipScorer:
    """Load what the CLIP loss looks with.

    Args:
        model: Folder or hub id of a CLIP model.
        vae: Folder or hub id of an AutoencoderTiny of the teacher's latents.
        device: Where both shall run.

    Returns:
        The scorer.

    Raises:
        CheckpointError: If one is missing, incomplete or a pickle.
    """
    with _reading("CLIP model", model):
        clip = load_whole(CLIPModel.from_pretrained, model, "CLIP model")
        tokenizer = AutoTokenizer.from_pretrained(model)
    with _reading("AutoencoderTiny", vae):
        decoder = load_whole(AutoencoderTiny.from_pretrained, vae, "AutoencoderTiny")
    return ClipScorer(clip.to(device), tokenizer, decoder.to(device))


def load_student_scheduler(
    source: str, num_decoder_steps: int, timestep_spacing: str | None = None
) -> DDIMScheduler:
    """Make the student's scheduler: DDIM over the teacher's diffusion.

    Args:
        source: Folder or hub id of the teacher.
        num_decoder_steps: Decoder timesteps K.
        timestep_spacing: Overrides the teacher's spacing.

    Returns:
        The scheduler, without clipping or thresholding, which no single linear pass could have.

    Raises:
        CheckpointError: If the teacher has no readable scheduler.
        InputError: If the spacing leaves the student nothing to do.
    """
    source = resolve_teacher(source)
    overrides = {"timestep_spacing": timestep_spacing} if timestep_spacing else {}
    with _reading("scheduler", source):
        config = DDIMScheduler.load_config(source, subfolder="scheduler")
        scheduler = DDIMScheduler.from_config(
            config, clip_sample=False, thresholding=False, **overrides
        )
    spacing = scheduler.config.timestep_spacing
    if num_decoder_steps == 1 and spacing != "trailing":
        raise InputError(
            f"One decoder step with '{spacing}' spacing is the one nearest to t = 0, where "
            "no noise is left to turn into a picture. Set timestep_spacing to 'trailing'."
        )
    return scheduler


def load_pipeline_around(
    source: str, unet: UNet2DConditionModel, scheduler: DDIMScheduler
) -> DiffusionPipeline | None:
    """Put a student into the pipeline that its teacher came from.

    Args:
        source: Folder or hub id of the teacher.
        unet: The student, as a plain diffusers UNet.
        scheduler: The student's scheduler.

    Returns:
        The pipeline, or None if the teacher is not a whole one (no model_index.json, no VAE).

    Raises:
        CheckpointError: If a part that it lists cannot be loaded.
    """
    source = resolve_teacher(source)
    index = _read_index(source)
    if index.get("vae", [None])[0] is None:
        return None
    components = {"unet": unet, "scheduler": scheduler}
    with _reading("pipeline", source):
        if Path(source).is_dir():
            components |= load_models(Path(source), index, components)
        kind = _PIPELINES.get(index["_class_name"], StableDiffusionPipeline)
        return kind.from_pretrained(source, use_safetensors=True, **components)
