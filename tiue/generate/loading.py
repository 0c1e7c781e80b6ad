"""The pipeline of a request: any Stable Diffusion model, with what is attached to it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DiffusionPipeline
from safetensors import SafetensorError, safe_open

import tiue
from tiue.embedded import load_student, weights_folder
from tiue.errors import CheckpointError, DependencyError
from tiue.generate.request import Request
from tiue.loading.checks import looks_local
from tiue.loading.families import read_index
from tiue.loading.weights import load_whole

_TINY = {False: "madebyollin/taesd", True: "madebyollin/taesdxl"}
_VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def load(request: Request, dtype: torch.dtype) -> Any:
    """Load what a request names.

    Args:
        request: checked.
        dtype: of the weights.

    Returns:
        A pipeline of one pass, on the CPU.

    Raises:
        CheckpointError: a part is missing, incomplete, a pickle, or does not fit.
        DependencyError: LoRAs need PEFT.
    """
    be_quiet()
    if request.loras and importlib.util.find_spec("peft") is None:
        raise DependencyError("--lora needs PEFT: pip install peft")
    is_xl = _is_xl(request)
    parts = {} if request.vae is None else {"vae": _load_vae(request.vae, is_xl, dtype)}
    cls = tiue.TiUEXLPipeline if is_xl else tiue.TiUEPipeline
    if (embedded := request.embedded) is not None:
        pipe = load_student(embedded, weights_folder(embedded), dtype)
        if parts:
            pipe = tiue.TiUEPipeline.from_pipe(pipe, **parts)
    else:
        assert request.model is not None
        if request.is_file:
            config = {} if request.config is None else {"config": request.config}
            pipe = cls.from_single_file(request.model, dtype=dtype, **config, **parts)
        else:
            variant = {} if request.variant is None else {"variant": request.variant}
            pipe = cls.from_pretrained(request.model, dtype=dtype, **variant, **parts)
    pipe = _for_pictures(pipe, request, is_xl, dtype)
    _add_loras(pipe, request)
    return pipe


def be_quiet() -> None:
    """No bars for a load of seconds, nor remarks on packages that nothing here needs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _is_xl(request: Request) -> bool:
    """Whether a model is Stable Diffusion XL; what cannot be read is told by the loader."""
    model = request.model
    if model is None or request.embedded is not None:
        return False
    if request.is_file:
        try:
            with safe_open(model, framework="pt") as file:
                return any(key.startswith("conditioner.embedders.") for key in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return False
    if Path(model).is_dir():
        return "text_encoder_2" in read_index(Path(model))
    if looks_local(model):
        return False
    try:
        return "text_encoder_2" in DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {model}: {error}") from error


def _load_vae(name: str, is_xl: bool, dtype: torch.dtype) -> Any:
    source = _TINY[is_xl] if name == "tiny" else name
    return _load_model(source, _VAES, "VAE", dtype)


def _load_model(source: str, classes: dict[str, Any], part: str, dtype: torch.dtype) -> Any:
    """A model that lies by itself in a folder or on the hub, of the class of its config.json."""
    if not Path(source).is_dir() and looks_local(source):
        raise CheckpointError(f"there is no folder {source} for the {part}")
    try:
        kind = next(iter(classes.values())).load_config(source).get("_class_name")
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot load the {part} {source}: {error}") from error
    if kind not in classes:
        raise CheckpointError(f"{source} holds a {kind}, no {' or '.join(classes)}")
    return load_whole(classes[kind].from_pretrained, source, part, dtype=dtype)


def _for_pictures(pipe: Any, request: Request, is_xl: bool, dtype: torch.dtype) -> Any:
    """The pipeline of diffusers that takes the request's pictures, in one pass."""
    if not (request.image or request.controlnet):
        return pipe
    # Given by name: of its own accord `from_pipe` takes no AutoencoderTiny along.
    parts = {"vae": pipe.vae}
    if request.controlnet:
        known = {"ControlNetModel": ControlNetModel}
        parts["controlnet"] = _load_model(request.controlnet, known, "ControlNet", dtype)
    task = "Inpaint" if request.mask else "Img2Img" if request.image else ""
    control = "ControlNet" if request.controlnet else ""
    name = f"StableDiffusion{'XL' if is_xl else ''}{control}{task}Pipeline"
    plain = getattr(diffusers, name).from_pipe(pipe, dtype=dtype, **parts)
    return tiue.one_pass(plain)


def _add_loras(pipe: Any, request: Request) -> None:
    names = [f"lora_{index}" for index in range(len(request.loras))]
    for name, lora in zip(names, request.loras, strict=True):
        path = Path(lora.source)
        if not path.exists() and (path.suffix or looks_local(lora.source)):
            raise CheckpointError(f"there is no LoRA {lora.source}; give a .safetensors file")
        where = {"weight_name": path.name} if path.is_file() else {}
        try:
            pipe.load_lora_weights(
                str(path.parent) if where else lora.source, adapter_name=name, **where
            )
        except ValueError as error:  # no keys of a LoRA in it
            raise CheckpointError(f"cannot load the LoRA {lora.source}: {error}") from error
    if names:
        pipe.set_adapters(names, [lora.weight for lora in request.loras])
