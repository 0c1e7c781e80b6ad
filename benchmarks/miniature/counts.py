"""Multiply-adds of a picture and of an update, without a clock: on tensors that hold no data."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.miniature.rows import Row
from benchmarks.multiply_adds import Count, Counter
from tiue import OnePassSchedule, TiUEUNet
from tiue.distill import DistillConfig
from tiue.distill.loading import load_student_scheduler
from tiue.distill.teacher import Teacher, noise_schedule_of
from tiue.distill.text import Text
from tiue.embedded.config import GUIDANCE_SCALE
from tiue.scenes import WEIGHTS
from tiue.scenes.config import MAX_PROMPT_TOKENS

TEACHER = WEIGHTS / "teacher"


def meta_unet() -> UNet2DConditionModel:
    """The scenes teacher's UNet without its weights."""
    config = UNet2DConditionModel.load_config(TEACHER, subfolder="unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).eval()


def schedule_of(num_decoder_steps: int, timestep_spacing: str | None = None) -> OnePassSchedule:
    """The K timesteps of a student of the scenes teacher."""
    scheduler = load_student_scheduler(str(TEACHER), num_decoder_steps, timestep_spacing)
    return OnePassSchedule.from_scheduler(scheduler, num_decoder_steps)


def _inputs(unet: UNet2DConditionModel, rows: int) -> tuple[Tensor, Tensor]:
    size, config = unet.config.sample_size, unet.config
    latents = torch.empty(rows, config.in_channels, size, size, device="meta")
    text = torch.empty(rows, MAX_PROMPT_TOKENS, config.cross_attention_dim, device="meta")
    return latents, text


@torch.no_grad()
def loop_count(unet: UNet2DConditionModel, steps: int) -> int:
    """Multiply-adds of a picture by the guided loop: the UNet twice a step."""
    latents, text = _inputs(unet, 2)
    with Counter() as counter:
        unet(latents, torch.zeros((), device="meta"), text)
    return steps * counter.count.total


@torch.no_grad()
def pass_count(unet: UNet2DConditionModel, schedule: OnePassSchedule, guided: bool = False) -> int:
    """Multiply-adds of a picture by the one pass, with guidance for two rows."""
    latents, text = _inputs(unet, 2 if guided else 1)
    student, schedule = TiUEUNet.from_unet(unet), schedule.on(latents.device)
    with Counter() as counter:
        student.one_pass(latents, schedule, text)
    return counter.count.total


def picture_count(row: Row) -> int:
    """Multiply-adds of the UNet for one picture of a row, guidance included.

    Args:
        row: Of `ROWS`, one that can be run.

    Returns:
        The number; text encoder and autoencoder, alike for all rows, are left out.
    """
    if row.steps is not None:
        return row.steps * _step()
    is_teacher = row.training is None and row.of is None
    guided = is_teacher and GUIDANCE_SCALE != 1
    return _pass(row.num_decoder_steps or 1, row.without, guided)


@cache
def _step() -> int:
    return loop_count(meta_unet(), 1)


@cache
def _pass(num_decoder_steps: int, left_out: int | None, guided: bool) -> int:
    # The spacing decides which timesteps there are, not what they cost.
    schedule = schedule_of(num_decoder_steps, "trailing" if num_decoder_steps == 1 else None)
    if left_out is not None:
        schedule = without(schedule, left_out)
    return pass_count(meta_unet(), schedule, guided)


def without(schedule: OnePassSchedule, timestep: int) -> OnePassSchedule:
    """A schedule whose sum leaves one timestep out; the encoder keeps its own."""
    kept = schedule.timesteps != timestep
    return replace(
        schedule, timesteps=schedule.timesteps[kept],
        noise_coefficients=schedule.noise_coefficients[kept],
    )  # fmt: skip


@torch.no_grad()
def update_count(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, config: DistillConfig
) -> int:
    """Multiply-adds of one update of a distillation: the student's and the LoRA's.

    Forward passes are counted. Backward of a product with a weight that is trained is two more of
    it, of one that is frozen one; backward of attention's two products is four.

    Args:
        unet: The teacher's, on the meta device; it receives the LoRA.
        scheduler: The student's.
        config: The run's settings: K, batch, guidance, LoRA.

    Returns:
        The number, for the whole batch.
    """
    schedule = OnePassSchedule.from_scheduler(scheduler, config.num_decoder_steps)
    latents, tokens = _inputs(unet, config.batch_size)
    timesteps = torch.zeros(config.batch_size, dtype=torch.long, device="meta")
    with Counter() as student:
        TiUEUNet.from_unet(unet).predict_noise(latents, schedule.timesteps.to("meta"), tokens)
    teacher = Teacher(
        unet, noise_schedule_of(scheduler).to(latents.device), config.lora_rank, config.lora_alpha
    )
    text, empty = Text(tokens), Text(tokens[:1])

    def guided(scale: float, lora: bool) -> Count:
        with Counter() as counter:
            teacher.guided_noise(latents, timesteps, text, empty, scale, lora)
        return counter.count

    frozen, adapted = guided(1.0, lora=False), guided(1.0, lora=True)
    backward = adapted.total + adapted.attention + (adapted.total - frozen.total)
    return (
        3 * student.count.total
        + guided(config.guidance_scale, lora=False).total
        + guided(config.lora_guidance_scale, lora=True).total
        + config.lora_updates * (adapted.total + backward)
    )


def equal_updates(updates: int, cost: int, own_cost: int) -> int:
    """Updates of `own_cost` each that make the compute of `updates` of `cost` each, rounded."""
    return round(updates * cost / own_cost)


# What the cost of an update depends on.
_COUNTED = (
    "num_decoder_steps", "batch_size", "guidance_scale", "lora_guidance_scale", "lora_rank",
    "lora_updates",
)  # fmt: skip


def update_count_of(settings: dict[str, Any]) -> int:
    """Multiply-adds of an update of the scenes teacher's distillation under some settings."""
    return _update(*((name, settings[name]) for name in _COUNTED if name in settings))


@cache
def _update(*settings: tuple[str, Any]) -> int:
    config = DistillConfig(teacher=str(TEACHER), output=TEACHER, prompts="-", **dict(settings))
    spacing = "trailing" if config.num_decoder_steps == 1 else None
    scheduler = load_student_scheduler(str(TEACHER), config.num_decoder_steps, spacing)
    return update_count(meta_unet(), scheduler, config)
