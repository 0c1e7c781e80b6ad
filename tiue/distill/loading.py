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
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)

from tiue.distill.clip import ClipScorer
from tiue.distill.networks import UNET, Family, family_named
from tiue.distill.text import (
    Encoder,
    PixArtTextEncoder,
    SD3TextEncoder,
    TextEncoder,
    XLTextEncoder,
)
from tiue.embedded import EMBEDDED, weights_folder
from tiue.errors import CheckpointError, InputError, TiUEError
from tiue.files import sha256
from tiue.loading.checks import fit_tokenizer, looks_local
from tiue.loading.weights import load_models, load_whole

_PIXART_TOKENS = {PixArtAlphaPipeline: 120, PixArtSigmaPipeline: 300}
_PIPELINES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline,
        *_PIXART_TOKENS,
    )
}  # fmt: skip
_TEXT_MODELS: dict[str, Any] = {
    cls.__name__: cls for cls in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)
}


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


def load_network(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a UNet or a transformer, teacher's or student's, as its one-pass class.

    Args:
        source: Folder or hub id of a pipeline, or the folder of the network itself.
        dtype: Type of its weights; float32 for one that is trained.

    Returns:
        The network, in evaluation mode.

    Raises:
        ArchitectureError: If it cannot be distilled.
        CheckpointError: If it is missing, incomplete or a pickle.
    """
    source = resolve_teacher(source)
    subfolder = None if (Path(source) / "config.json").is_file() else _component(source)
    with _reading(subfolder or "network", source):
        student = _family(source, subfolder).student
        return student.from_pretrained(source, subfolder=subfolder, dtype=dtype)


def _component(source: str) -> str:
    """Where a pipeline keeps its network."""
    return "transformer" if "transformer" in _read_index(source) else "unet"


def _family(source: str, subfolder: str | None) -> Family:
    """The family of a network by its configuration; of one without, that of a UNet."""
    if subfolder == "unet":
        return UNET
    name = UNET.plain.load_config(source, subfolder=subfolder).get("_class_name", "")
    # A UNet of another class is refused by its own loading, which says what it lacks.
    transformer = any(word in name for word in ("Transformer", "DiT"))
    return family_named(name) if subfolder or transformer else UNET


def teacher_digest(source: str) -> str:
    """Tell a teacher's network from others by its weights, wherever they lie.

    Args:
        source: Folder or hub id of the teacher, which has been loaded from there.

    Returns:
        SHA-256 over the weights' files.
    """
    source = resolve_teacher(source)
    component = _component(source)
    if not Path(source).is_dir():
        patterns = [f"{component}/*"]
        source = snapshot_download(source, allow_patterns=patterns, local_files_only=True)
    folder = Path(source) / component if (Path(source) / component).is_dir() else Path(source)
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def load_text_encoder(source: str, device: torch.device) -> Encoder:
    """Load a teacher's tokenizers and text encoders: one of each, or those of its pipeline.

    Args:
        source: Folder or hub id of a Stable Diffusion pipeline.
        device: Where the text encoder shall run.

    Returns:
        All, as one function of prompts.

    Raises:
        CheckpointError: If one is missing, incomplete or a pickle.
    """
    source = resolve_teacher(source)
    index = _read_index(source)  # once: a hub that cannot be reached is waited for
    if "transformer" in index:
        return _load_transformer_text(source, index, device)
    if "text_encoder_2" in index:
        return XLTextEncoder(_load_xl_text(source, index, device))
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


def _load_transformer_text(source: str, index: dict[str, Any], device: torch.device) -> Encoder:
    """PixArt's T5, or Stable Diffusion 3's two CLIPs and T5, of which T5 may be missing."""
    kind: Any = _PIPELINES.get(index["_class_name"])
    if kind is not StableDiffusion3Pipeline and kind not in _PIXART_TOKENS:
        raise CheckpointError(
            f"'{source}' is a {index['_class_name']}, whose text encoders are not known here: give "
            "the embeddings (`tiue embed-text` cannot make them either), or another teacher."
        )
    parts: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler"))
    for name, (_, found) in ((n, v) for n, v in index.items() if n.startswith("tokenizer")):
        with _reading(name, source):
            parts[name] = found and AutoTokenizer.from_pretrained(source, subfolder=name)
    for name, (_, found) in ((n, v) for n, v in index.items() if n.startswith("text_encoder")):
        with _reading(name, source):
            parts[name] = None
            if found is not None:
                load = _TEXT_MODELS[found].from_pretrained
                encoder = load_whole(load, source, name, subfolder=name)
                parts[name] = encoder.to(device).eval().requires_grad_(False)
    with _reading("transformer", source):
        config = UNET.plain.load_config(source, subfolder="transformer")
    pipeline = kind(**parts)
    if kind in _PIXART_TOKENS:
        return PixArtTextEncoder(pipeline, _PIXART_TOKENS[kind])
    return SD3TextEncoder(pipeline, config["joint_attention_dim"])


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
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Make the student's scheduler: DDIM over the teacher's diffusion, Euler over its flow.

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
        if config["_class_name"].startswith("FlowMatch"):
            return _flow_scheduler(config, timestep_spacing)
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


def _flow_scheduler(
    config: dict[str, Any], timestep_spacing: str | None
) -> FlowMatchEulerDiscreteScheduler:
    if timestep_spacing is not None:
        raise InputError(
            "timestep_spacing is one of diffusion schedulers, and this teacher's is a flow: leave "
            "it out; the noise levels are spread by the scheduler's shift."
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)


def load_pipeline_around(source: str, network: Any, scheduler: Any) -> DiffusionPipeline | None:
    """Put a student into the pipeline that its teacher came from.

    Args:
        source: Folder or hub id of the teacher.
        network: The student, as a plain diffusers UNet or transformer.
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
    components = {_component(source): network, "scheduler": scheduler}
    with _reading("pipeline", source):
        if Path(source).is_dir() and _component(source) == "unet":
            components |= load_models(Path(source), index, components)
        kind = _PIPELINES.get(index["_class_name"], StableDiffusionPipeline)
        # Stable Diffusion 3 without T5: diffusers wants it said, and saves nothing that says it.
        for name in ("text_encoder_3", "tokenizer_3"):
            if kind is StableDiffusion3Pipeline and index.get(name, [None, None])[1] is None:
                components[name] = None
        return kind.from_pretrained(source, use_safetensors=True, **components)
