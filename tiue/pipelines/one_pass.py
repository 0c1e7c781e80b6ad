"""Any Stable Diffusion pipeline of diffusers in one pass: its own call, a scheduler of one step."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from tiue.errors import ArchitectureError, InputError
from tiue.pipelines import inputs
from tiue.pipelines.adapters import SafeAdapters
from tiue.pipelines.driven import Driven, driven
from tiue.pipelines.parts import (
    CompiledParts,
    Part,
    UNetPart,
    VAEPart,
    alone,
    is_compiled,
)
from tiue.pipelines.scheduler import OnePassScheduler, with_one_pass
from tiue.schedule import OnePassSchedule, settings_of
from tiue.stages import Stages, untimed
from tiue.unet import TiUEUNet

# Schedules kept a pipeline; probing a scheduler takes 32 of its steps at K = 4.
_MAX_SCHEDULES = 16
_OF_THIS_PROCESS = {"_compiled", "_timings"}


def one_pass(pipe: DiffusionPipeline, num_decoder_steps: int = 4) -> Any:
    """Make a pipeline that draws in one pass of any Stable Diffusion pipeline of diffusers.

    Its class is a subclass of the pipeline's own, of the same name, and diffusers' own call drives
    it. It shares every model with the pipeline that is handed in; nothing is copied, and the one
    handed in goes on as it was. Li et al., CVPR 2025, arXiv 2505.21960.

    Args:
        pipe: a pipeline with a `UNet2DConditionModel`: text to image, image to image, inpainting,
            ControlNet, T2I-Adapter, ... of Stable Diffusion 1.x, 2.x and XL; or with a transformer
            that has a student in `tiue.dit` (PixArt, Hunyuan-DiT, Stable Diffusion 3).
        num_decoder_steps: K, the timesteps that the decoder runs at, in one batch.

    Returns:
        The pipeline. Its calls take `num_decoder_steps` and `skip_below` beside the arguments that
        they took before, and no number of steps. A scheduler that has no one pass is replaced by
        DDIM with the same noise levels, with a warning.

    Raises:
        ArchitectureError: another model than a Stable Diffusion UNet, or one without a one pass.
        InputError: `num_decoder_steps` is no number of timesteps.
    """
    parts = getattr(pipe, "components", {})
    if "transformer" in parts:
        # Imported here: transformers of other families take a second of diffusers' to import.
        from tiue.pipelines.transformer_pass import transformer_pass

        return transformer_pass(pipe, num_decoder_steps)
    if "unet" not in parts or "scheduler" not in parts or "vae" not in parts:
        has = ", ".join(sorted(parts)) or "no components"
        raise ArchitectureError(
            f"{type(pipe).__name__} has {has}: the one pass is for pipelines with a unet, a"
            " scheduler and a vae (Stable Diffusion 1.x, 2.x and XL)"
        )
    made = driven(OnePass, pipe)
    made.unet = TiUEUNet.from_unet(pipe.unet)
    made.scheduler = with_one_pass(pipe.scheduler)
    OnePassSchedule.from_scheduler(made.scheduler, num_decoder_steps)
    made.num_decoder_steps = num_decoder_steps
    return made


class OnePass(SafeAdapters, Driven):
    """What turns a diffusers pipeline with a UNet, which it is inherited beside, into one pass."""

    unet: Any
    vae: Any
    vae_scale_factor: int
    _timings: dict[str, float] | None = None
    _compiled: CompiledParts | None = None
    # Of a copy that a call runs on.
    _stages: Stages | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "unet" and type(value) is UNet2DConditionModel:
            value = TiUEUNet.from_unet(value)
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's models and the rest that it is made of.

        To diffusers' own `from_pipe`, which takes exact classes, the student is a plain UNet that
        shares every parameter with it.
        """
        parts = super().components
        if self._original is None and _asked_by_from_pipe() and isinstance(self.unet, TiUEUNet):
            parts["unet"] = parts["unet"].to_unet()
        return parts

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but what was compiled, which is of this process."""
        return {name: x for name, x in self.__dict__.items() if name not in _OF_THIS_PROCESS}

    def _students(self) -> dict[str, type[Any]]:
        return {"unet": UNet2DConditionModel}

    def compile(self, backend: str | None = None, **options: Any) -> Any:
        """Run UNet and VAE as compiled calls from now on, with the same pictures.

        Weights, adapters, sizes and batches may change at any time. `record_timings` then counts
        encoder and decoder as one stage, "one pass".

        Args:
            backend: as `tiue.compiled.compile_call`: on a GPU None records CUDA graphs, on a CPU it
                changes nothing; "openvino" and "inductor" compile for a CPU.
            **options: likewise.

        Returns:
            The pipeline.

        Raises:
            DependencyError: OpenVINO is not installed.
        """
        self._compiled = CompiledParts(backend, options)
        return self

    @contextmanager
    def record_timings(self) -> Iterator[dict[str, float]]:
        """Time the stages of the calls inside a `with` block.

        Only there does the pipeline wait for the device at the end of each stage.

        Yields:
            Seconds of "text encoder", "encoder", "decoder" and "VAE", filled by the calls and
            summed over them.
        """
        self._timings = {}
        try:
            yield self._timings
        finally:
            self._timings = None

    def _draw(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_decoder_steps: int | None,
        skip_below: float | None,
    ) -> Any:
        """A call of the pipeline: diffusers' own, on a copy that knows the schedule."""
        if not isinstance(getattr(self.unet, "_orig_mod", self.unet), TiUEUNet):
            TiUEUNet.from_unet(self.unet)  # says why it cannot be
        theirs = super().__call__
        arguments = inputs.bind(theirs, args, kwargs)
        inputs.check(arguments, self.unet, self.vae, self.vae_scale_factor)
        steps = self.num_decoder_steps if num_decoder_steps is None else num_decoder_steps
        strength = arguments.get("strength", 1.0) if hasattr(super(), "get_timesteps") else 1.0
        schedule = self._schedule(steps, strength)
        if skip_below is not None:
            schedule = schedule.skip_below(skip_below)

        names = ["text encoder"]
        names += (
            ["one pass"] if self._compiled or is_compiled(self.unet) else ["encoder", "decoder"]
        )
        to_pixels = arguments.get("output_type") != "latent"
        checked = self.unet if arguments.get("output_type") in ("pil", "np") else None
        bar = super().progress_bar(total=len(names) + to_pixels)
        with alone(self), bar as progress:
            device = self._execution_device
            stages = Stages(self._timings, device, progress)
            return self._call_on_copy(
                arguments,
                _device=device,
                _stages=stages,
                scheduler=OnePassScheduler(self.scheduler, schedule, steps, strength),
                unet=UNetPart(self.unet, schedule, stages, self._compiled),
                vae=VAEPart(self.vae, stages, self._compiled, checked),
            )

    def _schedule(self, num_decoder_steps: int, strength: float) -> OnePassSchedule:
        """S and E of the present scheduler, kept."""
        if not isinstance(num_decoder_steps, Hashable):  # nor any number
            return OnePassSchedule.from_scheduler(self.scheduler, num_decoder_steps, strength)
        known: dict[Any, OnePassSchedule] = self.__dict__.setdefault("_schedules", {})
        # 4.0 and 4 are one key, and not one answer.
        kinds = (type(num_decoder_steps), type(strength))
        key = (settings_of(self.scheduler), num_decoder_steps, strength, kinds)
        schedule = known.get(key)
        if schedule is None:
            schedule = OnePassSchedule.from_scheduler(self.scheduler, num_decoder_steps, strength)
            while len(known) >= _MAX_SCHEDULES:
                known.pop(next(iter(known)), None)  # calls in other threads do the same
            known[key] = schedule
        return schedule

    # What diffusers' own call asks of the pipeline, on the copy that the call runs on.

    def get_timesteps(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
        """The one timestep: the scheduler of a call begins at its strength already."""
        if self._original is None:
            return super().get_timesteps(*args, **kwargs)
        return self.scheduler.timesteps, 1

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        """The parent's check of a call's arguments; what it finds is an `InputError`."""
        theirs = super().check_inputs
        bound = inspect.signature(theirs).bind(*args, **kwargs)
        # The sizes are checked already: the parent wants multiples of 8 of any VAE.
        bound.arguments |= {name: 0 for name in ("height", "width") if name in bound.arguments}
        try:
            theirs(*bound.args, **bound.kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; what it finds wrong with generators is an `InputError`."""
        try:
            return super().prepare_latents(*args, **kwargs)
        except ValueError as error:
            raise InputError(str(error)) from error

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, in the UNet's floating point type."""
        return self._encode_text(super().encode_prompt, args, kwargs)

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        theirs = super()._encode_prompt
        if hasattr(super(), "encode_prompt"):  # which it calls
            return theirs(*args, **kwargs)
        return self._encode_text(theirs, args, kwargs)  # InstructPix2Pix has this one alone

    def _encode_text(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(theirs).bind(*args, **kwargs)
        given = bound.arguments
        names = ("text_encoder", "text_encoder_2")
        encoders = [encoder for name in names if (encoder := getattr(self, name, None))]
        negative = given.get("do_classifier_free_guidance") and (
            given.get("negative_prompt_embeds") is None
        )
        if not encoders and (given.get("prompt") is not None or negative):
            raise InputError(
                "this pipeline has no text encoder: give prompt_embeds, and for guidance"
                " negative_prompt_embeds"
            )
        run = self
        clip_skip = given.get("clip_skip")
        for encoder in encoders if clip_skip is not None else ():
            inputs.check_clip_skip(clip_skip, encoder)
        first = getattr(self, "text_encoder", None)
        if clip_skip is not None and first is not None and not hasattr(first, "text_model"):
            # transformers 5 took that module out of CLIPTextModel; diffusers 0.42 looks for the
            # final layer norm in it.
            run = copy.copy(self)
            run.__dict__["text_encoder"] = Part(first, text_model=first)
        with (self._stages or untimed)("text encoder"):
            found = getattr(super(OnePass, run), theirs.__name__)(*bound.args, **bound.kwargs)
        dtype = self.unet.dtype  # diffusers walks through every layer for it
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return tuple(part if part is None else part.to(dtype) for part in found)


def _asked_by_from_pipe() -> bool:
    """Whether a property is read by a `from_pipe` of diffusers.

    There is nothing else to tell it by: diffusers' offloading reads the same property of the same
    object, and must get the student itself.
    """
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name == "<dictcomp>":  # a frame of its own before Python 3.12
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "")
    return frame.f_code.co_name == "from_pipe" and name.startswith("diffusers.")
