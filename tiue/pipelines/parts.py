"""The models of a pipeline as one call of it sees them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.pipelines.pag.pag_utils import PAGMixin

from tiue.compiled import check_precision, compile_call, graphs
from tiue.errors import NonFiniteError
from tiue.schedule import OnePassSchedule
from tiue.stages import Stages


class Part:
    """Stands for a model during a call: what is asked of it is asked of the model.

    What belongs to the call alone (its schedule, its stages) stays off the model, which other calls
    may use at the same time.

    Args:
        model: what it stands for, and passes for.
        **own: attributes that hide the model's.
    """

    def __init__(self, model: Any, **own: Any) -> None:
        vars(self).update(_model=model, **own)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


class TokenizerPart(Part):
    """A tokenizer that texts pass one at a time, in whatever thread and of whatever pipeline.

    transformers' own write the padding and truncation of a call to the tokenizer and read them
    there: of two calls at once one gets the other's lengths.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _lock_of(self._model):
            return self._model(*args, **kwargs)

    def tokenize(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's; textual inversion's tokens are looked for by it."""
        with _lock_of(self._model):
            return self._model.tokenize(*args, **kwargs)


def tokenizer_parts(pipe: Any) -> dict[str, TokenizerPart]:
    """The tokenizers of a pipeline as its calls see them, by attribute."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return {
        name: TokenizerPart(tokenizer)
        for name in names
        if (tokenizer := getattr(pipe, name, None)) is not None
    }


class UNetPart(Part):
    """A `TiUEUNet` whose call is the one pass of a schedule.

    Args:
        unet: the student, compiled by torch or not.
        schedule: of this call.
        stages: of this call.
        compiled: what compiles its calls, or None.
    """

    def __init__(
        self, unet: Any, schedule: OnePassSchedule, stages: Stages, compiled: CompiledParts | None
    ) -> None:
        super().__init__(unet, _schedule=schedule, _stages=stages, _compiled=compiled)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        kwargs |= {"schedule": self._schedule}
        if self._compiled is not None:
            with self._stages("one pass"):
                call = self._compiled.call("unet", self._model, _noise_of)
                return (call(sample, encoder_hidden_states, **kwargs),)
        if is_compiled(self._model):  # a clock inside would break what is compiled in two
            with self._stages("one pass"):
                return self._model(sample, timestep, encoder_hidden_states, **kwargs)
        kwargs["stage"] = self._stages
        return self._model(sample, timestep, encoder_hidden_states, **kwargs)


class VAEPart(Part):
    """A VAE that takes latents of any floating point type, and tells of NaN.

    Args:
        vae: the model.
        stages: of this call.
        compiled: what compiles its calls, or None.
        checked: the UNet, where pictures with NaN or infinity are an error; None elsewhere.
    """

    def __init__(
        self, vae: Any, stages: Stages, compiled: CompiledParts | None, checked: Any
    ) -> None:
        super().__init__(vae, _stages=stages, _compiled=compiled, _checked=checked)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the VAE's own."""
        vae = self._model
        latents = latents.to(vae.dtype)
        with self._stages("VAE"):
            if self._compiled is not None and isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
                decoded: Any = (self._compiled.call("vae", vae, _pixels_of)(latents),)
            else:
                decoded = vae.decode(latents, *args, **kwargs)
        if self._checked is not None and not torch.isfinite(decoded[0]).all():
            raise NonFiniteError(
                f"the images hold NaN or infinity (UNet in {self._checked.dtype}, VAE in"
                f" {vae.dtype}). In float16 the VAE is the usual cause:"
                " pipe.vae.to(torch.float32), or load everything with dtype=torch.bfloat16"
                " or torch.float32. In float32, look for NaN in weights, latents or prompt_embeds"
            )
        return decoded


class CompiledParts:
    """A pipeline's UNet and VAE as compiled calls, made anew where another model has taken a place.

    Args:
        backend: as `compile_call`.
        options: likewise.

    Raises:
        DependencyError: OpenVINO is not installed.
    """

    def __init__(self, backend: str | None, options: dict[str, Any]) -> None:
        check_precision(options.get("precision", "float32"), backend)
        self._backend = backend
        self._options = options
        self._recorder = graphs.CudaRecorder()
        self._calls: dict[str, tuple[Any, Callable[..., torch.Tensor]]] = {}

    def call(
        self, part: str, model: Any, function: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        """The compiled call of a part.

        Args:
            part: its name.
            model: what has that place now.
            function: of the model and the call's arguments.

        Returns:
            The function of the arguments alone.
        """
        known = self._calls.get(part)
        if known is None or known[0] is not model:

            def of_model(*args: Any, **kwargs: Any) -> torch.Tensor:
                return function(model, *args, **kwargs)

            call = compile_call(
                of_model, [model], self._backend, recorder=self._recorder, **self._options
            )
            known = self._calls[part] = (model, call)
        return known[1]


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def alone(pipe: Any) -> AbstractContextManager[Any]:
    """One call at a time, in whatever thread, of a pipeline whose calls change its models.

    Adapters are weighed by writing a call's scale to their layers; offloading moves weights, and
    layerwise casting casts them, while a call runs; perturbed-attention guidance puts processors of
    its own into the UNet, and GLIGEN switches its layers. Calls of a pipeline without any of these
    run side by side.

    Args:
        pipe: Pipelines of this kind that share a UNet wait for each other; those that share it with
            a pipeline of perturbed-attention guidance or GLIGEN, and have neither, do not.

    Returns:
        A context for a call.
    """
    pag = isinstance(pipe, PAGMixin)
    changed = (
        pag
        or hasattr(pipe, "enable_fuser")  # GLIGEN's
        or any(getattr(m, "_hf_peft_config_loaded", False) or has_hook(m) for m in pipe._models())
    )
    if not changed:
        return nullcontext()
    context = ExitStack()
    context.enter_context(_lock_of(pipe.unet))
    if pag:  # whose call leaves its processors behind when it ends in an error
        context.callback(pipe.unet.set_attn_processor, pipe.unet.attn_processors)
    return context


def has_hook(module: torch.nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers is on a model or a layer of it."""
    layers = [module]
    while layers:
        own = vars(layers.pop())
        if "_hf_hook" in own or "_diffusers_hook" in own:
            return True
        layers += [layer for layer in own["_modules"].values() if layer is not None]
    return False


def _lock_of(model: Any) -> threading.RLock:
    with _making:
        return _locks.setdefault(model, threading.RLock())


def is_compiled(model: Any) -> bool:
    """Whether torch.compile is around a model, or its `compile` was called."""
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


def _noise_of(
    unet: Any,
    sample: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    schedule: OnePassSchedule,
    **kwargs: Any,
) -> torch.Tensor:
    # The schedule's own timestep: it is a constant of what is compiled.
    kwargs |= {"schedule": schedule, "return_dict": False}
    return unet(sample, schedule.encoder_timestep, encoder_hidden_states, **kwargs)[0]


def _pixels_of(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents, return_dict=False)[0]
