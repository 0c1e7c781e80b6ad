"""Rows as what `tiue evaluate` draws with, and the one pass taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from benchmarks.miniature.counts import without
from benchmarks.miniature.rows import Row
from benchmarks.miniature.training import student_folder, teacher_sha256, training_facts
from tiue import OnePassSchedule, TiUEPipeline
from tiue.embedded.config import GUIDANCE_SCALE
from tiue.evaluate.models import (
    SCENES,
    SCENES_TEACHER,
    Autoencoder,
    Model,
    load_model,
    weights_hash,
)
from tiue.scenes import load_scenes, load_scenes_teacher

CPU = torch.device("cpu")


def load_row(row: Row, seed: int) -> Model:
    """Load a row as what `tiue evaluate` draws with.

    Args:
        row: Of `ROWS`, one that can be run.
        seed: Of its training.

    Returns:
        The model.

    Raises:
        CheckpointError: Its student has not been distilled; the message says how.
        InputError: It was distilled with other settings.
    """
    trained = row.training is not None or row.of is not None
    training = training_facts(row, seed) if trained else {}
    if row.steps is not None:
        model = load_model(SCENES_TEACHER, CPU, torch.float32, num_inference_steps=row.steps)
    elif row.without is not None:
        model = _without(row, seed)
    elif trained:
        folder = student_folder(row, seed)
        model = load_model(SCENES, CPU, torch.float32, row.num_decoder_steps or 1, student=folder)
    else:
        model = _undistilled(row.num_decoder_steps or 1)
    model.facts.update(row=row.name, teacher_sha256=teacher_sha256())
    if trained:
        model.facts["training"] = training
    return model


def undistilled_pipeline(num_decoder_steps: int) -> TiUEPipeline:
    """The teacher's own weights in one pass; K = 1 has trailing spacing, as its students have."""
    pipe = TiUEPipeline.from_pipe(load_scenes_teacher())
    if num_decoder_steps == 1:
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _undistilled(num_decoder_steps: int) -> Model:
    pipe = undistilled_pipeline(num_decoder_steps)
    settings = {"num_decoder_steps": num_decoder_steps, "guidance_scale": GUIDANCE_SCALE}

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, **settings).images

    facts = {"model": SCENES_TEACHER, "weights_sha256": weights_hash(pipe), **settings}
    return Model(draw, facts, Autoencoder(pipe.vae))


def _without(row: Row, seed: int) -> Model:
    pipe = load_scenes(student=student_folder(row, seed))
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, row.num_decoder_steps or 1)
    schedule = without(schedule, row.without or 0)

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        begun = begin(pipe, prompts, seeds)
        return to_pictures(pipe, pipe.unet.one_pass(begun.noise, schedule, begun.text))

    facts = {"model": SCENES, "weights_sha256": weights_hash(pipe), "without": row.without}
    return Model(draw, facts, Autoencoder(pipe.vae))


@dataclass(frozen=True)
class Begun:
    """What a pass starts from.

    Attributes:
        noise: [B, 16, 8, 8].
        text: [B, L, D], of the prompts.
        empty: [B, L, D], of no prompt.
    """

    noise: Tensor
    text: Tensor
    empty: Tensor


@torch.no_grad()
def begin(pipe: Any, prompts: list[str], seeds: list[int]) -> Begun:
    """What a scenes pipeline's call begins with: the same noise for a seed, the same text."""
    text, empty = pipe.encode_prompt(prompts, CPU, 1, True, negative_prompt=[""] * len(prompts))
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return Begun(torch.stack(noise), text, empty)


@torch.no_grad()
def to_pictures(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Latents [B, 16, 8, 8] to pictures, as the pipeline's call decodes them."""
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")


@torch.no_grad()
def predictions(
    pipe: Any, begun: Begun, schedule: OnePassSchedule, guidance_scale: float = 1.0
) -> Tensor:
    """What the decoder gives at each of K timesteps, guided: [K, B, 16, 8, 8]."""
    sample = schedule.scale_model_input(begun.noise)
    own = pipe.unet.predict_noise(sample, schedule.timesteps, begun.text)
    if guidance_scale == 1:
        return own
    none = pipe.unet.predict_noise(sample, schedule.timesteps, begun.empty)
    return none + guidance_scale * (own - none)
