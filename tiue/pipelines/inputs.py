"""The arguments of a pipeline call, checked: what was wrong, and what would be right."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from tiue.errors import InputError

_log = logging.getLogger(__name__)
_told: set[str] = set()

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Sixteen times what SDXL was made for: self-attention alone of more would take terabytes.
MAX_PIXELS = 16384
# Weights of guidance in use are under 20; from 1e4 on float16 overflows.
MAX_GUIDANCE = 1000

# Where diffusers' defaults are for many steps.
DEFAULTS = {"num_inference_steps": 1, "guidance_scale": 1.0, "gligen_scheduled_sampling_beta": 1.0}

_NO_STEPS = (
    "one pass has no steps to choose; num_decoder_steps is the decoder's number of timesteps"
)
_NO_FRACTION = "one pass is one step, of which no part can be left out"
# Arguments of a loop: the values that mean nothing to the one pass, and why others have no answer.
_OF_STEPS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_inference_steps": ((1,), _NO_STEPS),
    "timesteps": ((None,), _NO_STEPS),
    "sigmas": ((None,), _NO_STEPS),
    "eta": ((0,), "one pass draws no noise at its steps"),
    "denoising_start": ((None,), _NO_FRACTION),
    "denoising_end": ((None,), _NO_FRACTION),
    "control_guidance_start": ((0,), _NO_FRACTION),
    "control_guidance_end": ((1,), _NO_FRACTION),
    "adapter_conditioning_factor": ((0, 1), _NO_FRACTION),
    "gligen_scheduled_sampling_beta": ((0, 1), _NO_FRACTION),
}


def bind(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a diffusers pipeline, by name, with the one pass's defaults.

    Args:
        call: The pipeline's own call.
        args: What was given by place.
        kwargs: What was given by name.

    Returns:
        Every argument.

    Raises:
        InputError: An argument that has no meaning in one pass.
        TypeError: One that the pipeline does not take.
    """
    signature = inspect.signature(call)
    bound = signature.bind(*args, **kwargs)
    for name, value in DEFAULTS.items():
        if name in signature.parameters:
            bound.arguments.setdefault(name, value)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # diffusers' place for names that are no more
            unknown = arguments.pop(name)
            if unknown.keys() - {"callback", "callback_steps"}:
                raise TypeError(f"the call of a pipeline takes no {', '.join(sorted(unknown))}")
            arguments |= unknown
    for name, (neutral, why) in _OF_STEPS.items():
        given = arguments.get(name, neutral[0])
        values = given if isinstance(given, list) and given else [given]  # one for each ControlNet
        if any(value not in neutral for value in values):
            raise InputError(f"{name}={given!r}: {why}. Leave {name} out")
    return arguments


def documented(call: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Give a pipeline's call the signature and the words of diffusers' own, where they hold.

    Args:
        call: The one pass's, with arguments of its own by name.
        theirs: diffusers'.

    Returns:
        `call`.
    """
    kept, by_place = [], True
    for parameter in inspect.signature(theirs).parameters.values():
        if parameter.name in _OF_STEPS:
            by_place = False  # what follows is given by name: a place would be another argument's
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.name in DEFAULTS:
            parameter = parameter.replace(default=DEFAULTS[parameter.name])
        kept.append(parameter if by_place else parameter.replace(kind=parameter.KEYWORD_ONLY))
    own = inspect.signature(call).parameters.values()
    kept += [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    call.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    call.__doc__ = f"""One pass, driven by diffusers' own call, whose arguments these are.

    Args:
        num_decoder_steps: K, the timesteps that the decoder runs at, in one batch; by default the
            pipeline's.
        guidance_scale: Classifier-free guidance where above 1, for weights that were not distilled;
            it doubles the rows.
        strength: Where the pipeline has it: the part of the noise levels that the K timesteps are
            spread over.
        skip_below: Lossy. Leave out the timesteps whose weight |E_k| is under this bound; with
            K = 4 the last weighs 0.0121 and takes a fourth of the decoder's rows.

    Raises:
        InputError: An argument is of the wrong value, shape or type, or has no meaning in one pass
            ({", ".join(_OF_STEPS)}).
        SchedulerError: `scheduler` has no one pass.
        NonFiniteError: The images hold NaN or infinity ("pil" and "np", where they are read).

    The arguments of diffusers' own call:
    {theirs.__doc__ or ""}"""
    return call


def check(arguments: dict[str, Any], unet: Any, vae: Any, factor: int) -> None:
    """See that a call's arguments are right, and bring them to one form in place.

    Prompts become lists; without a picture that gives the size, height and width are filled in.

    Args:
        arguments: From `bind`.
        unet: The student.
        vae: Its image decoder.
        factor: Pixels a latent, each way.

    Raises:
        InputError: An argument is of the wrong value, shape or type; the message says which.
    """
    output_type = arguments.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    _check_numbers(arguments)
    if arguments.get("image", 0) is None:
        raise InputError("image is missing: this pipeline draws of a picture")
    images = arguments.get("num_images_per_prompt", 1)
    if images is None:
        images = arguments["num_images_per_prompt"] = 1
    if not _is_whole(images) or images < 1:
        raise InputError(f"num_images_per_prompt must be a whole number >= 1, got {images!r}")
    rows = _check_prompts(arguments, unet.config)
    rows = None if rows is None else rows * images
    _check_sizes(arguments, rows, unet.config, vae.config.latent_channels, factor)
    if isinstance(arguments.get("latents"), torch.Tensor):
        arguments["latents"] = arguments["latents"].to(unet.dtype)
    generator = arguments.get("generator")
    if isinstance(generator, (list, tuple)):
        generator = arguments["generator"] = list(generator)
        if rows is not None and len(generator) != rows:
            raise InputError(f"{len(generator)} generators for {rows} images: give each its own")
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
        raise InputError(f"generator must be a torch.Generator or a list, got {generator!r}")


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} must be a finite number, got {value}")
    for name in ("guidance_scale", "image_guidance_scale", "guidance_rescale", "pag_scale"):
        value = arguments.get(name, 0.0)
        within = isinstance(value, Real) and 0 <= value <= MAX_GUIDANCE  # type: ignore[operator]
        if not within:
            raise InputError(f"{name} must be a number from 0 to {MAX_GUIDANCE}, got {value!r}")
    given = arguments.get("cross_attention_kwargs")
    if given is not None and not isinstance(given, dict):
        raise InputError(f"cross_attention_kwargs must be a dict, got {given!r}")


def check_clip_skip(clip_skip: Any, text_encoder: Any) -> None:
    """See that the text encoder has the layers that a call leaves out.

    Args:
        clip_skip: Layers to leave out at its end.
        text_encoder: A CLIP text model.

    Raises:
        InputError: It has no more layers than that, or it is no number of layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if not _is_whole(clip_skip) or not 0 <= clip_skip < layers:
        raise InputError(
            f"clip_skip must be a whole number under the text encoder's {layers} layers, got"
            f" {clip_skip!r}"
        )


def _check_prompts(arguments: dict[str, Any], config: Mapping[str, Any]) -> int | None:
    """How many prompts there are; None where the pipeline's own check must say what is wrong."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        prompt = arguments["prompt"] = [prompt]
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(text, str) for text in prompt):
            raise InputError(f"prompt must be a text or a list of at least one, got {prompt!r}")
        count = len(prompt)
    elif isinstance(embeds, torch.Tensor):
        width = config["encoder_hid_dim"] or config["cross_attention_dim"]
        fits = embeds.ndim == 3 and width in (embeds.shape[-1], None)
        if not fits and isinstance(width, int):
            raise InputError(
                f"prompt_embeds must be [prompts, tokens, {width}] for this UNet, got"
                f" {list(embeds.shape)}"
            )
        count = embeds.shape[0]
    else:
        return None
    # Of SDXL's second text encoder and of Stable Diffusion 3's third likewise.
    for name in ("prompt", "prompt_2", "prompt_3"):
        _check_texts(arguments, name, None if name == "prompt" else count)
        _check_texts(arguments, f"negative_{name}", count)
    negative = arguments.get("negative_prompt")
    if any(negative or ()) and not arguments.get("guidance_scale", 1.0) > 1.0:
        _tell_once(
            "negative_prompt has no effect without guidance: set guidance_scale above 1. Said once."
        )
    return count


def _check_texts(arguments: dict[str, Any], name: str, count: int | None) -> None:
    """See that texts are as many as the prompts; one stands for all."""
    texts = arguments.get(name)
    if texts is None:
        return
    if isinstance(texts, str):
        texts = arguments[name] = [texts] * (count or 1)
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {texts!r}")
    if count is not None and len(texts) != count:
        raise InputError(
            f"{len(texts)} texts in {name} for {count} prompts: give one text for all, or one for"
            " each"
        )
    for text in texts:
        check_unicode(text)


def _check_sizes(
    arguments: dict[str, Any],
    rows: int | None,
    config: Mapping[str, Any],
    channels: int,
    factor: int,
) -> None:
    latents = arguments.get("latents")
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise InputError(f"latents must be a tensor, got a {type(latents).__name__}")
    sizes = [name for name in ("height", "width") if name in arguments]
    # A picture among the arguments gives the size; `image` and `mask_image` are diffusers' names.
    if len(sizes) < 2 or "image" in arguments:
        for name in sizes:
            if arguments[name] is not None:
                _latent_size(name, arguments[name], None, factor)
        return
    height, width = arguments.get("height"), arguments.get("width")
    shape = latent_shape(rows, config["sample_size"], channels, factor, height, width, latents)
    arguments["height"], arguments["width"] = (size * factor for size in shape)


def latent_shape(
    rows: int | None,
    sample_size: int | tuple[int, int] | None,
    channels: int,
    factor: int,
    height: int | None,
    width: int | None,
    latents: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Find the latents' height and width from sizes in pixels, given latents, or the UNet's own.

    Args:
        rows: Images to make; None where that is not known.
        sample_size: The UNet's own size.
        channels: Of the latents.
        factor: Pixels a latent, each way.
        height: Pixels, or None.
        width: Pixels, or None.
        latents: [rows, C, h, w], or None.

    Returns:
        h, w.

    Raises:
        InputError: Latents of another shape, or sizes that no latents have.
    """
    own = sample_size
    if latents is not None:
        fits = latents.ndim == 4 and latents.shape[1] == channels
        if not fits or latents.shape[0] != (rows or latents.shape[0]):
            raise InputError(
                f"latents must be [{rows}, {channels}, height, width] (prompts x images a prompt,"
                f" the VAE's channels), got {list(latents.shape)}"
            )
        own = (latents.shape[2], latents.shape[3])
    own_height, own_width = own if isinstance(own, (tuple, list)) else (own, own)
    shape = (
        _latent_size("height", height, own_height, factor),
        _latent_size("width", width, own_width, factor),
    )
    if latents is not None and latents.shape[2:] != shape:
        raise InputError(
            f"height and width ask for latents of {list(shape)}, given are {list(latents.shape)}:"
            " leave height and width out"
        )
    return shape


def _latent_size(name: str, pixels: int | None, own: int | None, factor: int) -> int:
    if pixels is None:
        if own is None:
            raise InputError(f"this UNet has no size of its own: give {name} in pixels")
        return own
    if not _is_whole(pixels):
        raise InputError(f"{name} must be a whole number of pixels, got {pixels!r}")
    if pixels > MAX_PIXELS:
        raise InputError(f"{name} must be at most {MAX_PIXELS} pixels, got {pixels}")
    size = max(1, pixels // factor)
    if pixels != size * factor:
        raise InputError(
            f"{name} must be a positive multiple of {factor}, got {pixels}: the nearest are"
            f" {size * factor} and {(size + 1) * factor}"
        )
    return size


def check_unicode(text: str) -> None:
    """See that a prompt is text that a tokenizer can read.

    Raises:
        InputError: It holds bytes that are no UTF-8, as arguments of a command may.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a prompt is no UTF-8 text: {text!r}") from error


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.warning(message)


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)  # numpy's too
