"""Loading whole models: every weight that a model has lies in its files, in its shape."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from tiue.errors import CheckpointError, TiUEError

_log = logging.getLogger(__name__)

# What a model_index.json may name for a model; nothing else is imported, let alone called.
CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (UNet2DConditionModel,),
    "vae": (AutoencoderKL, AutoencoderTiny),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModelWithProjection,),
    "image_encoder": (CLIPVisionModelWithProjection,),
}
# What reads models in ways of its own, and reports no keys.
_LOADED_BY_DIFFUSERS = ("device_map", "quantization_config", "use_flashpack")
_REPORTERS = (
    "diffusers.configuration_utils",
    "diffusers.models.modeling_utils",
    "diffusers.pipelines.pipeline_utils",
    "transformers.modeling_utils",
)
# Of AutoencoderTiny: what it writes into its configuration and does not know again; and that
# StableDiffusionPipeline, which runs it, names AutoencoderKL alone.
_OF_TINY = ("The config attributes {'block_out_channels': ", "Expected types for vae: ")
# Numbers of a text encoder's configuration, whose classes say nothing of them in older versions.
_OF_TEXT = {"layer_norm_eps": float, "num_attention_heads": int, "eos_token_id": int}
_SHOWN = 3


def load_whole(
    load: Callable[..., Any], source: str | os.PathLike[str], part: str, **kwargs: Any
) -> Any:
    """Load a model of diffusers or transformers, whole: neither starts weights of its own.

    Both libraries fill what a file lacks with random or uninitialised memory and say so in the log.

    Args:
        load: The `from_pretrained` of the model's class.
        source: A folder or a hub id.
        part: What it is, for the message: "unet", "text encoder".
        **kwargs: What else it takes, `subfolder` and `dtype` among them.

    Returns:
        The model.

    Raises:
        CheckpointError: A weight is absent or of another shape, or the files cannot be read.
    """
    kwargs.setdefault("use_safetensors", True)
    _check_variant(Path(source, kwargs.get("subfolder") or ""), kwargs.get("variant"), part)
    try:
        with without_tables():
            model, report = load(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except TiUEError:
        raise
    except Exception as error:  # what the files of a folder can make the libraries raise
        raise CheckpointError(
            f"cannot load the {part} of {source}: {type(error).__name__}: {error}"
        ) from error
    check_report(report, source, part)
    check_numbers(model, source, part)
    return model


def check_numbers(model: Any, source: str | os.PathLike[str], part: str) -> None:
    """See that settings which are numbers are, for layers that ask for them at a call alone.

    Args:
        model: One of diffusers, whose constructor says what each setting of its config.json is, or
            of transformers.
        source: Where it came from, for the message.
        part: What it is, for the message.

    Raises:
        CheckpointError: A setting that must be a number is null, text, NaN, infinite or negative.
    """
    if isinstance(model, ModelMixin):
        kinds = get_type_hints(inspect.unwrap(type(model).__init__))
    else:
        kinds = {name: kind for name, kind in _OF_TEXT.items() if hasattr(model.config, name)}
    settings = model.config if isinstance(model.config, Mapping) else vars(model.config)
    for name, kind in kinds.items():
        allowed = (kind,) if get_origin(kind) in (None, tuple) else get_args(kind)
        if name not in settings or not {int, float} & set(allowed):
            continue
        value = settings[name]
        if value is None and type(None) in allowed:
            continue
        # A VAE's sample_size may be two sides, whatever its constructor says.
        several = name == "sample_size" or any(get_origin(some) is tuple for some in allowed)
        for number in _flat(value) if several else [value]:
            if not (isinstance(number, int | float) and 0 <= number < math.inf):
                raise CheckpointError(
                    f"the {part} of {source} has {name} = {value!r} in its config.json, which must"
                    " be a number, not negative: fetch it again"
                )


def _flat(value: Any) -> Iterator[Any]:
    """The numbers of a setting, which one level or all sides may share."""
    if isinstance(value, list | tuple):
        for some in value:
            yield from _flat(some)
    else:
        yield value


def _check_variant(folder: Path, variant: str | None, part: str) -> None:
    """See that a folder of weights is not one of a variant that nobody asked for."""
    names = [path.name for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    found = [re.fullmatch(r".*?\.([^.]+?)(-\d+-of-\d+)?\.safetensors", name) for name in names]
    variants = sorted({match[1] for match in found if match is not None})
    if variant is None and variants and all(found):
        raise CheckpointError(
            f"the {part} in {folder} is there as variant {' and '.join(variants)} alone: load it"
            f" with variant={variants[0]!r}"
        )


@contextmanager
def without_tables() -> Iterator[None]:
    """Keep the libraries' own tables of keys out of the log: `check_report` reads and says them.

    So is what they say of every AutoencoderTiny.
    """

    def is_no_table(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        of_tiny = text.startswith(_OF_TINY) and "AutoencoderTiny" in text
        table = text.startswith("Some weights of") or "LOAD REPORT" in text
        return not (table or of_tiny)

    loggers = [logging.getLogger(name) for name in _REPORTERS]
    for logger in loggers:
        logger.addFilter(is_no_table)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_no_table)


def check_report(report: Mapping[str, Any], source: str | os.PathLike[str], part: str) -> None:
    """See that a loading report of diffusers or transformers says that nothing was amiss.

    Args:
        report: Their `output_loading_info`.
        source: Where the model came from, for the message.
        part: What it is, likewise.

    Raises:
        CheckpointError: Keys are missing, or of another shape.
    """
    missing = sorted(report.get("missing_keys") or ())
    if any(".base_layer." in key for key in report.get("unexpected_keys") or ()):
        raise CheckpointError(
            f"the {part} of {source} was saved with a LoRA beside its weights: save it again after"
            " fuse_lora() and unload_lora_weights(), and the LoRA alone with save_lora_weights()"
        )
    shapes = sorted(report.get("mismatched_keys") or ())
    if missing:
        raise CheckpointError(
            f"the {part} of {source} lacks {_weights(missing)}: fetch the model again, or see that"
            " its config.json belongs to it"
        )
    if shapes:
        found = [f"{key} {list(there)} for {list(wanted)}" for key, there, wanted in shapes]
        raise CheckpointError(
            f"the {part} of {source} has {_weights(found)} of another shape: its config.json is of"
            " another model"
        )
    errors = list(report.get("error_msgs") or ())
    if errors:
        raise CheckpointError(f"cannot load the {part} of {source}: {'; '.join(errors)}")
    unexpected = sorted(report.get("unexpected_keys") or ())
    if unexpected:
        _log.warning(
            "the %s of %s holds %s that the model of its config.json has no place for",
            *(part, source, _weights(unexpected)),
        )


def _weights(keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
    return f"{len(keys)} {'weight' if len(keys) == 1 else 'weights'} ({shown})"


def check_classes(model: str, index: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """See, before diffusers imports what a model_index.json names, that it names known classes.

    Args:
        model: The folder or hub id, for the message.
        index: The content of model_index.json.
        given: Names of components that the caller has.

    Raises:
        CheckpointError: A library that is neither diffusers nor transformers, or a model of
            another class than this package runs.
    """
    for name, value in index.items():
        if name.startswith("_") or name in given or not isinstance(value, list):
            continue
        if len(value) != 2 or not all(isinstance(item, str | None) for item in value):
            raise CheckpointError(f"{model}: model_index.json is damaged at {name} ({value})")
        library, kind = value
        if library is None or kind is None:
            continue
        student = (library.split(".")[0], kind) == ("tiue", "TiUEUNet")
        own = name == "safety_checker" and library == "stable_diffusion"
        if library not in ("diffusers", "transformers") and not (student or own):
            raise CheckpointError(
                f"{model} wants its {name} from {library}, code that is not imported; the parts"
                " of a model come from diffusers and transformers"
            )
        names = [cls.__name__ for cls in CLASSES.get(name, ())]
        if names and not student and kind not in names:
            raise CheckpointError(
                f"{model} names a {kind} for its {name}; a {' or '.join(names)} is what runs here"
            )


def load_models(
    folder: Path, index: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Load the models of a pipeline folder, each whole.

    Args:
        folder: In the diffusers layout.
        index: The content of its model_index.json, which `check_classes` let pass.
        kwargs: Those of the pipeline's `from_pretrained`; components in it are not loaded.

    Returns:
        Name of the component to model, for the pipeline's `from_pretrained`; empty where
        `device_map` or `quantization_config` leave the loading to diffusers.

    Raises:
        CheckpointError: One is incomplete.
    """
    if any(kwargs.get(name) is not None for name in _LOADED_BY_DIFFUSERS):
        return {}
    variant = kwargs.get("variant")
    names = [name for name in CLASSES if _is_in(folder, index, name) and name not in kwargs]
    variants = {name: variant for name in names if variant and _has_variant(folder / name, variant)}
    if variant and not variants:
        return {}  # diffusers says which are there
    options = {name: kwargs[name] for name in ("low_cpu_mem_usage",) if name in kwargs}
    models = {}
    for name in names:
        cls = _class_of(name, index[name][1])
        dtype = kwargs.get("dtype")
        if isinstance(dtype, dict):
            dtype = dtype.get(name, dtype.get("default"))
        # float32 as diffusers loads a pipeline; transformers alone keeps the files' own type.
        own = options | {"dtype": dtype or torch.float32}
        if name in variants:
            own["variant"] = variant
        if issubclass(cls, ModelMixin) and "disable_mmap" in kwargs:
            own["disable_mmap"] = kwargs["disable_mmap"]
        models[name] = load_whole(cls.from_pretrained, folder / name, name, **own)
    return models


def _is_in(folder: Path, index: Mapping[str, Any], name: str) -> bool:
    value = index.get(name)
    return isinstance(value, list) and value[1] is not None and (folder / name).is_dir()


def _class_of(name: str, kind: str) -> Any:
    if name == "unet":
        return UNet2DConditionModel
    return next(cls for cls in CLASSES[name] if cls.__name__ == kind)


def _has_variant(folder: Path, variant: str) -> bool:
    pattern = re.compile(rf"\.{re.escape(variant)}(-\d+-of-\d+)?\.safetensors")
    return any(pattern.search(path.name) for path in folder.iterdir())
