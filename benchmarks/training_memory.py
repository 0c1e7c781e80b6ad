"""Counts a distillation's memory by part: `python -m benchmarks.training_memory [RECIPE ...]`.

What a process holds for the whole step is counted exactly, from the settings. What the step keeps
for backward is counted on fake tensors, without data, under bfloat16 autocast: of the student, and
of the LoRA teacher, whose graph lives after the student's has gone; the larger one counts. Left
out: what a kernel needs while it runs, the allocator's gaps, and VAE and text encoders, which no
step needs with stored embeddings. Derived, not measured: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.forms.models import (
    stable_diffusion_scheduler,
    transformer_class,
    transformer_scheduler,
)
from benchmarks.saved_bytes import SavedBytes
from testing.configs import CONFIGS, NUM_TOKENS, TEXT_TOKENS, TRANSFORMERS
from tiue import OnePassSchedule, TiUEUNet
from tiue.distill import losses
from tiue.distill.config import DistillConfig
from tiue.distill.parts import checkpoint_blocks
from tiue.distill.settings import load_config
from tiue.distill.step import Student
from tiue.distill.student import add_student_lora
from tiue.distill.teacher import Teacher, noise_schedule_of
from tiue.distill.text import Text

MODELS = {
    "one-gpu-24gb": "sd21", "one-gpu-24gb-lora": "sd21", "sd15": "sd15", "sd21-base": "sd21",
    "sdxl": "sdxl", "sdxl-one-gpu-80gb": "sdxl", "pixart": "pixart", "sd3": "sd3",
}  # fmt: skip
PROCESSES = {"sdxl": 8}  # those of a sharded recipe
_FLOAT, _HALF = 4, 2
# Two moments a parameter: of Adam, and of bitsandbytes' blocks of 256 with a float32 scale each.
_MOMENTS = {"adam": 8.0, "adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}


def _without_data(network: nn.Module) -> None:
    """Put fake tensors on the CPU, where autocast is, in the place of meta ones; in a fake mode.

    Made on the meta device first: a fake parameter cannot be moved or cast as PEFT does it.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _network(model: str) -> Any:
    if model in CONFIGS:
        return TiUEUNet(**CONFIGS[model])
    return transformer_class(model)(**TRANSFORMERS[model])


def _scheduler(model: str) -> Any:
    return stable_diffusion_scheduler() if model in CONFIGS else transformer_scheduler(model)


def _text(unet: Any, model: str, rows: int) -> Text:
    config, length = unet.config, TEXT_TOKENS.get(model)
    if model.startswith("pixart"):
        return Text(
            torch.empty(rows, length, config.caption_channels), mask=torch.ones(rows, length)
        )
    if model.startswith("sd3"):
        tokens = torch.empty(rows, length, config.joint_attention_dim)
        return Text(tokens, torch.empty(rows, config.pooled_projection_dim))
    tokens = torch.empty(rows, NUM_TOKENS, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type != "text_time":
        return Text(tokens)
    return Text(tokens, torch.empty(rows, 1280), (1024, 1024, 0, 0, 1024, 1024))


def saved_bytes(config: DistillConfig, model: str) -> dict[str, int]:
    """Bytes that a micro-batch of the student, and one of the LoRA teacher, keeps for backward."""
    scheduler = _scheduler(model)
    schedule = OnePassSchedule.from_scheduler(scheduler, config.num_decoder_steps)
    found, noises = {}, noise_schedule_of(scheduler)
    with torch.device("meta"):
        half = torch.bfloat16 if config.student_lora_rank else torch.float32
        unet = _network(model).to(half).train()
        if config.student_lora_rank:
            add_student_lora(unet, config)
        frozen = _network(model).to(torch.bfloat16)
        teacher = Teacher(frozen, noises, config.lora_rank, config.lora_alpha)
    checkpoint_blocks(unet, config)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True), mixed:
        _without_data(unet)
        _without_data(frozen)
        teacher.lora_parameters = [p for p in frozen.parameters() if p.requires_grad]
        size = unet.config.sample_size
        latents = torch.empty(config.batch_size, unet.config.in_channels, size, size)
        text = _text(unet, model, config.batch_size)
        saved = SavedBytes(unet)
        with saved:
            noise = Student(unet, schedule)(latents, text)
            losses.vsd_loss(schedule.combine(latents, noise), latents)
            if config.kl_weight:
                losses.kl_loss(noise)
        found["student"] = saved.total
        saved = SavedBytes(frozen)
        with saved:
            timesteps = torch.zeros(config.batch_size, dtype=torch.int64)
            losses.lora_loss(teacher.lora_noise(latents, timesteps, text), latents, latents)
        found["lora"] = saved.total
    return found


def parts(recipe: str) -> dict[str, float]:
    """A recipe's memory a process, in GB (1e9 bytes), by part and in all."""
    config = load_config(recipe, output="run", embeddings="text")
    model, shares = MODELS[recipe], PROCESSES.get(recipe, 1)
    with torch.device("meta"):
        unet = _network(model)
        total = sum(p.numel() for p in unet.parameters())
        trained = total
        if config.student_lora_rank:
            add_student_lora(unet, config)
            trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        noises = noise_schedule_of(_scheduler(model))
        teacher = Teacher(_network(model), noises, config.lora_rank)
        lora = sum(p.numel() for p in teacher.lora_parameters)
    frozen = _HALF * (total if config.student_lora_rank else 0)
    moments = _MOMENTS[config.optimizer]
    average = 0 if config.ema_on_cpu or not config.ema_decay else _FLOAT * trained
    saved = saved_bytes(config, model)
    held = {
        "student's weights": (frozen + _FLOAT * trained) / shares,
        "its gradients": _FLOAT * trained / shares,
        "its optimiser": moments * trained / shares,
        "its average": average / shares,
        "teacher, frozen": _HALF * total / shares,
        "LoRA teacher, its gradients and optimiser": (2 * _FLOAT + moments) * lora / shares,
    }
    if shares > 1:
        # Of all processes' shares, gathered while it runs, and their gradients before they are cut.
        held["student, gathered, with gradients"] = 2 * _FLOAT * trained
    held["kept for backward"] = max(saved.values())
    held["in all"] = sum(held.values())
    return {name: size / 1e9 for name, size in held.items()}


def main() -> None:
    """Prints one table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(MODELS))
    recipes = parser.parse_args().recipes
    columns = {recipe: parts(recipe) for recipe in recipes}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    print("| GB a process | " + " | ".join(f"`{recipe}`" for recipe in recipes) + " |")
    print("| --- |" + " ---: |" * len(recipes))
    for name in [name for name in names if name != "in all"] + ["in all"]:
        cells = [f"{c[name]:.1f}" if name in c else "" for c in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
