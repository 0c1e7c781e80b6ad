"""The forms of the one pass that are raced: what each computes, and why one cannot run here."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.forms.models import (
    draw_parameters,
    random_inputs,
    random_unet,
    stable_diffusion_scheduler,
)
from benchmarks.measure.interleave import Rival
from benchmarks.measure.race import Case
from testing import published_form
from tiue import OnePassSchedule, TiUEUNet
from tiue.compiled import GraphedCall
from tiue.compiled.openvino import own_signal_stack
from tiue_kernels import cpu, use_backend
from tiue_kernels.nn import fuse

LORA_RANK = 16
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"),
]


class NotRunError(Exception):
    """A form that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """One UNet with the inputs of one case; every form runs on its weights.

    Attributes:
        case: What is raced.
        unet: The weights.
        inputs: Of `published_form.one_pass`.
        scheduler: The method's.
    """

    case: Case
    unet: UNet2DConditionModel
    inputs: dict[str, Any]
    scheduler: DDIMScheduler

    @classmethod
    def build(
        cls,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        unet: UNet2DConditionModel | None = None,
    ) -> Setting:
        """Draw the inputs and, where there is none yet, the UNet of a case."""
        unet = unet or random_unet(case.model, device, dtype)
        inputs = random_inputs(unet, case.batch, case.latent_size)
        return cls(case, unet, inputs, stable_diffusion_scheduler())

    @cached_property
    def channels_last(self) -> UNet2DConditionModel:
        """A copy of the UNet with its convolutions in the layout that compilers prefer."""
        return copy.deepcopy(self.unet).to(memory_format=torch.channels_last)

    @cached_property
    def fused(self) -> UNet2DConditionModel:
        """The UNet with the fused modules of `tiue_kernels.nn`, over the same weights."""
        unet = _sharing(self.unet)
        fuse(unet)
        return unet

    @cached_property
    def with_lora(self) -> UNet2DConditionModel:
        """The UNet with a LoRA of rank 16 beside all attention and convolution weights."""
        if importlib.util.find_spec("peft") is None:
            raise NotRunError("peft is not installed: pip install 'tiue[train]'")
        from peft import LoraConfig

        unet = _sharing(self.unet)
        unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=4, target_modules=LORA_TARGETS))
        generator = torch.Generator(unet.device).manual_seed(2)
        for name, layer in unet.named_modules():
            if name.endswith((".lora_A", ".lora_B")):
                draw_parameters(layer, generator).to(unet.dtype)
        return unet.eval()

    @property
    def schedule(self) -> OnePassSchedule:
        return OnePassSchedule.from_scheduler(self.scheduler, self.case.num_decoder_steps)

    @property
    def timesteps(self) -> torch.Tensor:
        return self.schedule.timesteps.to(self.unet.device)

    def combine(self, noise_pred: torch.Tensor) -> torch.Tensor:
        """The K steps of the scheduler over outputs that are already there."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.case.num_decoder_steps, device=noise_pred.device)
        return published_form.combine(scheduler, self.inputs["latents"], noise_pred)


def _sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the modules whose parameters are the same tensors."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared)


class PublishedNoise(torch.nn.Module):
    """The published form's model outputs as one module, for exporters and compilers."""

    def __init__(self, unet: UNet2DConditionModel, timesteps: torch.Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("timesteps", timesteps)

    def forward(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        timesteps = self.timesteps
        return published_form.predict_noise(
            self.unet, latents, timesteps, prompt_embeds, added_cond_kwargs
        )


def _published(setting: Setting) -> Rival:
    steps = setting.case.num_decoder_steps
    return partial(
        published_form.one_pass, setting.unet, setting.scheduler, steps, **setting.inputs
    )


def _published_channels_last(setting: Setting) -> Rival:
    steps = setting.case.num_decoder_steps
    unet = setting.channels_last
    return partial(published_form.one_pass, unet, setting.scheduler, steps, **setting.inputs)


def _published_noise(
    setting: Setting, make: Callable[[torch.nn.Module], Callable[..., Any]]
) -> Rival:
    """The published form with its model outputs compiled or recorded, channels_last."""
    compiled = make(PublishedNoise(setting.channels_last, setting.timesteps))

    @torch.no_grad()
    def run() -> torch.Tensor:
        return setting.combine(compiled(**setting.inputs))

    run()  # compiles
    return run


def _published_compile(setting: Setting, mode: str = "max-autotune") -> Rival:
    return _published_noise(setting, partial(_compile, mode=mode))


def _published_graph(setting: Setting) -> Rival:
    _require_cuda(setting)
    return _published_noise(setting, lambda module: GraphedCall(module, [module]))


def _published_openvino(setting: Setting) -> Rival:
    if setting.unet.device.type != "cpu":
        raise NotRunError("OpenVINO is raced on a CPU")
    if importlib.util.find_spec("openvino") is None:
        raise NotRunError("openvino is not installed: pip install 'tiue[openvino]'")
    import openvino

    module = PublishedNoise(setting.unet, setting.timesteps)
    with torch.no_grad():
        program = torch.export.export(module, (), setting.inputs)
    model = openvino.convert_model(program)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with own_signal_stack():
        request = openvino.compile_model(model, "CPU", options).create_infer_request()
    arrays = [tensor.numpy() for tensor in _flat(setting.inputs)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        request.infer(arrays, share_inputs=True)
        return setting.combine(torch.from_numpy(request.get_output_tensor(0).data))

    return run


def one_step(setting: Setting, noise_pred: torch.Tensor) -> torch.Tensor:
    """The scheduler's only step, of model outputs that are already there."""
    scheduler = copy.deepcopy(setting.scheduler)
    scheduler.set_timesteps(1)
    latents = setting.inputs["latents"]
    return scheduler.step(noise_pred, scheduler.timesteps[0], latents).prev_sample


@torch.no_grad()
def _sample(setting: Setting, steps: int) -> torch.Tensor:
    """Plain sampling: the whole UNet at every step."""
    scheduler = copy.deepcopy(setting.scheduler)
    scheduler.set_timesteps(steps, device=setting.unet.device)
    latents, text = setting.inputs["latents"], setting.inputs["prompt_embeds"]
    added = setting.inputs.get("added_cond_kwargs")
    for timestep in scheduler.timesteps:
        noise_pred = setting.unet(latents, timestep, text, added_cond_kwargs=added).sample
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample
    return latents


def _tiue(setting: Setting) -> Rival:
    student = TiUEUNet.from_unet(setting.unet)
    return partial(student.one_pass, schedule=setting.schedule, **setting.inputs)


def _tiue_direct(setting: Setting) -> Rival:
    if not (cpu.loaded() and setting.unet.device.type == "cpu"):
        raise NotRunError("no Winograd convolutions here: `tiue` runs direct ones already")
    run = _tiue(setting)

    def direct() -> object:
        with use_backend(conv2d="reference"):
            return run()

    return direct


def _tiue_channels_last(setting: Setting) -> Rival:
    student = TiUEUNet.from_unet(setting.channels_last)
    return partial(student.one_pass, schedule=setting.schedule, **setting.inputs)


def _tiue_graph(setting: Setting) -> Rival:
    _require_cuda(setting)
    recorded = TiUEUNet.from_unet(setting.channels_last).compile_one_pass()
    run = partial(recorded, schedule=setting.schedule, **setting.inputs)
    run()  # records
    return run


def _require_cuda(setting: Setting) -> None:
    if setting.unet.device.type != "cuda":
        raise NotRunError("CUDA graphs need an NVIDIA GPU")


def _tiue_compile(setting: Setting, mode: str = "max-autotune") -> Rival:
    student = TiUEUNet.from_unet(setting.channels_last)
    compiled = _compile(partial(student.one_pass, schedule=setting.schedule), mode)
    run = partial(compiled, **setting.inputs)
    run()  # compiles
    return run


def _tiue_openvino(setting: Setting) -> Rival:
    student = TiUEUNet.from_unet(setting.unet)
    compiled = student.compile_one_pass(backend="openvino")
    run = partial(compiled, schedule=setting.schedule, **setting.inputs)
    run()  # compiles
    return run


def _compile(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        raise NotRunError("torch.compile needs g++ on a CPU")
    torch._dynamo.reset()
    return torch.compile(function, mode=mode, dynamic=False)


def _flat(inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in inputs.values():
        yield from _flat(value) if isinstance(value, dict) else [value]


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        build: Makes the call of a setting, compiled where it is; raises `NotRunError` where it
            cannot.
        meaning: One line for the report.
        equal_to: The form whose numbers it computes; None where it has its own.
        by_default: Where it runs unless `--bench-forms` says otherwise.
    """

    build: Callable[[Setting], Rival]
    meaning: str
    equal_to: str | None = "published"
    by_default: tuple[str, ...] = ("cpu", "cuda")


FORMS = {
    "published": Form(_published, "everything repeated K times after the encoder, eager"),
    "published-compile": Form(
        _published_compile,
        'the same under `torch.compile(mode="max-autotune")`, channels_last',
        by_default=("cuda",),
    ),
    "published-inductor": Form(
        partial(_published_compile, mode="default"),
        "the same under torch.compile's default mode, channels_last",
        by_default=(),
    ),
    "published-channels-last": Form(
        _published_channels_last, "the same eager, channels_last", by_default=("cuda",)
    ),
    "published-graph": Form(
        _published_graph, "the same as a CUDA graph, channels_last", by_default=("cuda",)
    ),
    "published-openvino": Form(
        _published_openvino, "the same in OpenVINO, float32", by_default=("cpu",)
    ),
    "full-steps": Form(
        lambda setting: partial(_sample, setting, setting.case.num_decoder_steps),
        "plain sampling: the whole UNet K times, what K-step models cost; other numbers by nature",
        equal_to=None,
    ),
    "full-steps-fused": Form(
        lambda setting: partial(
            _sample, replace(setting, unet=setting.fused), setting.case.num_decoder_steps
        ),
        "the same after `fuse(unet)`",
        equal_to="full-steps",
    ),
    "one-step": Form(
        lambda setting: partial(_sample, setting, 1),
        "the whole UNet once, what one-step models cost; other numbers by nature",
        equal_to=None,
    ),
    "one-step-fused": Form(
        lambda setting: partial(_sample, replace(setting, unet=setting.fused), 1),
        "the same after `fuse(unet)`",
        equal_to="one-step",
    ),
    "tiue": Form(_tiue, "this package, eager"),
    "published-lora": Form(
        lambda setting: _published(replace(setting, unet=setting.with_lora)),
        "the published form with a LoRA of rank 16 on all attention and convolution layers",
        equal_to=None,
        by_default=(),
    ),
    "tiue-lora": Form(
        lambda setting: _tiue(replace(setting, unet=setting.with_lora)),
        "this package with the same LoRA, not fused",
        equal_to="published-lora",
        by_default=(),
    ),
    "tiue-direct": Form(_tiue_direct, "this package without Winograd convolutions", by_default=()),
    "tiue-compile": Form(
        _tiue_compile,
        'this package under `torch.compile(mode="max-autotune")`, channels_last',
        by_default=("cuda",),
    ),
    "tiue-inductor": Form(
        partial(_tiue_compile, mode="default"),
        "this package under torch.compile's default mode, channels_last",
        by_default=(),
    ),
    "tiue-channels-last": Form(
        _tiue_channels_last, "this package, eager, channels_last", by_default=("cuda",)
    ),
    "tiue-graph": Form(
        _tiue_graph, "this package as a CUDA graph, channels_last", by_default=("cuda",)
    ),
    "tiue-openvino": Form(_tiue_openvino, "this package in OpenVINO, float32", by_default=("cpu",)),
}
