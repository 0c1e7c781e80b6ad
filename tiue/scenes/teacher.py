"""The teacher: a Stable Diffusion in small, which has to draw what a prompt leaves open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr

from tiue.embedded import teacher as embedded
from tiue.embedded.autoencoder import load_autoencoder
from tiue.embedded.loop import CHECKPOINT, decaying_rate
from tiue.embedded.teacher import build_scheduler, build_unet, run_teacher
from tiue.errors import CheckpointError
from tiue.files import write_json
from tiue.scenes.config import TEN_PROMPTS, TeacherConfig
from tiue.scenes.data import ScenePool, load_latents
from tiue.scenes.text import build_tokenizer, load_text_encoder


class TeacherTraining(embedded.TeacherTraining):
    """Trains on scenes and the grammar's prompts: noise prediction, as Stable Diffusion 1.x's."""

    pictures: ScenePool
    config: TeacherConfig
    sheet_prompts = (*TEN_PROMPTS, *TEN_PROMPTS)
    sheet_every = 500
    # As Stable Diffusion's: trained on with the UNet, it forgot within 6,400 updates what "left of"
    # means, of which little reaches it.
    trains_text_encoder = False

    def __init__(self, pool: ScenePool, latents: torch.Tensor, config: TeacherConfig) -> None:
        super().__init__(pool, latents, build_tokenizer(), config)
        self.first = 0  # the step from which the optimiser knows its gradients

    @staticmethod
    def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
        """Builds the UNet with random weights: text by cross-attention alone, at every level."""
        return build_unet(config, [True] * len(config.channels))

    @staticmethod
    def build_scheduler() -> DDIMScheduler:
        """Builds Stable Diffusion 1.x's scheduler: t = 751, 501, 251, 1 at K = 4."""
        return build_scheduler("epsilon", "leading")

    def draw_prompts(self, chosen: torch.Tensor, generator: torch.Generator) -> list[str]:
        """A prompt of the grammar for each chosen scene, at times none."""
        prompts = self.pictures.prompts(chosen, generator)
        dropped = torch.rand(len(chosen), generator=generator) < self.config.prompt_drop
        return ["" if drop else text for drop, text in zip(dropped, prompts, strict=True)]

    def objective(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise, its error weighted by the root of 1 / SNR, and by 1 / SNR where that is less.

        The layout is decided where noise is high: at t = 900 the SNR is 0.014, and not to know a
        latent at all costs 0.014 of the noise's variance. With Min-SNR's weight (Hang et al., 2023)
        and a text encoder that was trained along, relations were not learnt within 18,600 updates;
        with this one and a text encoder that knew them before, within 1,000.
        """
        snr = compute_snr(self.scheduler, timesteps)
        return noise, torch.minimum(snr.rsqrt(), 1 / snr)

    def rate(self, step: int) -> float:
        """Factor on the learning rate: that of the step, warmed up again after `load_exported`."""
        config = self.config
        factor = decaying_rate(step, config.steps, config.warmup_steps, config.decay_share)
        return min(factor, (step - self.first + 1) / config.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides its number."""
        return {**super().state_dict(), "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.first = state.get("first", 0)

    def load_exported(self, folder: Path) -> tuple[int, float]:
        """Takes the weights of an exported teacher, whose optimiser's state is lost.

        Args:
            folder: that of the pipeline, with `training.json`.

        Returns:
            The updates that the weights have had, and the seconds that those took.

        Raises:
            CheckpointError: they are of other sizes.
        """
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        try:
            self.unet.load_state_dict(pipeline.unet.state_dict())
            self.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"the teacher in {folder} is of another configuration") from error
        for averaged, parameter in zip(self.ema.shadow_params, self.parameters, strict=True):
            averaged.copy_(parameter.detach())
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        steps: int = facts["steps"]
        # The average has forgotten nothing: it weighs new weights as it did at that step.
        self.ema.optimization_step = steps
        self.first = steps
        return steps, facts["seconds"]


def train_teacher(
    pool: ScenePool,
    autoencoder: Path,
    folder: Path,
    config: TeacherConfig,
    resume: bool = False,
    start: Path | None = None,
) -> StableDiffusionPipeline:
    """Trains the teacher as `run_teacher` does, on the latents of the autoencoder in a folder.

    Where there is no checkpoint it begins with the exported teacher in the folder `start`, if that
    is given, and with the text encoder of `train_text_encoder` beside its own folder, if there is.

    Raises:
        CheckpointError: there is neither.
    """
    vae = load_autoencoder(autoencoder)
    latents = load_latents(folder.parent / "latents.safetensors", pool, vae)
    training = TeacherTraining(pool, latents, config)
    first, seconds = 0, 0.0
    if not (resume and (folder / CHECKPOINT).exists()):
        if start is not None:
            first, seconds = training.load_exported(start)
        text = folder.parent / "text"
        if (text / "training.json").exists():  # trained to its end
            load_text_encoder(training.text_encoder, text)
        elif start is None:
            raise CheckpointError(f"no text encoder in {text}: run `... text` before `... teacher`")
    return run_teacher(training, vae, folder, resume, first, seconds)


def save_averaged(autoencoder: Path, folder: Path, config: TeacherConfig) -> int:
    """Writes the pipeline of an unfinished training, and how many updates it has had.

    Args:
        autoencoder: the folder that the autoencoder's training left.
        folder: the training's; receives `pipeline/` and `training.json`.
        config: its sizes.

    Returns:
        The updates.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if not (folder / CHECKPOINT).exists():
        raise CheckpointError(f"no training to take a teacher of in {folder}: run `... teacher`")
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    training = TeacherTraining(ScenePool(torch.empty(0), []), torch.empty(0), config)
    training.load_state_dict(state["training"])
    training.averaged_pipeline(load_autoencoder(autoencoder)).save_pretrained(folder / "pipeline")
    facts = {"steps": state["step"], "seconds": round(state["seconds"])}
    write_json(folder / "training.json", facts)
    return state["step"]
