"""The teacher: a Stable Diffusion in small, which has to draw what a prompt leaves open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from torch import nn

from tiue.errors import CheckpointError
from tiue.files import write_json
from tiue.openmoji.autoencoder import load_autoencoder
from tiue.openmoji.config import LATENT_CHANNELS, LATENT_SIZE
from tiue.openmoji.loop import (
    CHECKPOINT,
    average_gradients,
    decaying_rate,
    process,
    run,
    set_rate,
    step_generator,
)
from tiue.openmoji.teacher import (
    build_pipeline,
    build_text_encoder,
    stratified_timesteps,
    tokenize,
    train_tokenizer,
)
from tiue.scenes.config import (
    GUIDANCE_SCALE,
    MAX_PROMPT_TOKENS,
    TEACHER_STEPS,
    TEN_PROMPTS,
    TeacherConfig,
)
from tiue.scenes.data import ScenePool, load_latents
from tiue.scenes.grammar import VOCABULARY

SHEET_EVERY = 500


def build_scheduler() -> DDIMScheduler:
    """Builds Stable Diffusion 1.x's scheduler in its DDIM form: t = 751, 501, 251, 1 at K = 4."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
    """Builds the UNet with random weights: text by cross-attention alone, at every level."""
    levels = len(config.channels)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        # diffusers' name for the number of heads
        attention_head_dim=tuple(width // config.head_size for width in config.channels),
        use_linear_projection=True,
    )


class TeacherTraining:
    """The teacher's parts, its optimiser and its moving average; one call of `step` a batch."""

    def __init__(self, pool: ScenePool, latents: torch.Tensor, config: TeacherConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.pool = pool
        self.latents = latents  # (N, 16, 8, 8), scaled
        # 512 bytes and what merges the grammar's words to one token each.
        self.tokenizer = train_tokenizer(list(VOCABULARY), 2048, MAX_PROMPT_TOKENS)
        # 1.1 x faster on a CPU than the default layout
        self.unet = build_unet(config).train().to(memory_format=torch.channels_last)
        if config.bf16:
            # A CPU takes ten times as long for the backward of scaled_dot_product_attention in
            # bfloat16 as in float32: 9.7 ms a call at 32 x 64 tokens.
            self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = build_text_encoder(config, self.tokenizer).train()
        self.scheduler = build_scheduler()
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        self.first = 0  # the step from which the optimiser knows its gradients

    def step(self, step: int) -> float:
        """Takes one optimiser step, all its randomness drawn from its number; returns the loss.

        The loss is the mean squared error of the noise, weighted by min(SNR, 5) / SNR (Hang et
        al., "Efficient Diffusion Training via Min-SNR Weighting", 2023).
        """
        config = self.config
        generator = step_generator(config.seed, step)
        chosen = self.pool.sample(config.batch_size, generator)
        prompts = self.pool.prompts(chosen, generator)
        dropped = torch.rand(len(chosen), generator=generator) < config.prompt_drop
        prompts = ["" if drop else text for drop, text in zip(dropped, prompts, strict=True)]
        noise = torch.randn((len(chosen), *self.latents.shape[1:]), generator=generator)
        timesteps = stratified_timesteps(
            len(chosen), self.scheduler.config.num_train_timesteps, generator
        )
        # All processes draw the same batch, and each takes its rows: how many there are does not
        # change the result.
        rank, processes = process()
        mine = slice(rank, None, processes)
        noise, timesteps = noise[mine], timesteps[mine]
        noisy = self.scheduler.add_noise(self.latents[chosen[mine]].float(), noise, timesteps)
        with torch.autocast(self.unet.device.type, torch.bfloat16, enabled=config.bf16):
            prompt_embeds = self.text_encoder(tokenize(self.tokenizer, prompts[mine]))
            predicted = self.unet(noisy, timesteps, prompt_embeds.last_hidden_state).sample.float()
        snr = compute_snr(self.scheduler, timesteps)
        weight = snr.clamp(max=5.0) / snr
        loss = (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

        factor = decaying_rate(step, config.steps, config.warmup_steps, config.decay_share)
        factor = min(factor, (step - self.first + 1) / config.warmup_steps)
        set_rate(self.optimizer, config.learning_rate * factor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides its number."""
        return {
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "first": self.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
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

    def averaged_pipeline(self, vae: AutoencoderTiny) -> StableDiffusionPipeline:
        """The pipeline with copies of the averaged weights."""
        unet = build_unet(self.config)
        text_encoder = build_text_encoder(self.config, self.tokenizer)
        self.ema.copy_to([*unet.parameters(), *text_encoder.parameters()])
        return build_pipeline(
            vae, text_encoder.eval(), self.tokenizer, unet.eval(), build_scheduler()
        )


def sample_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Saves two pictures of each of the ten prompts, 25 DDIM steps, enlarged twice."""
    images = pipeline(
        [*TEN_PROMPTS, *TEN_PROMPTS],
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2 * len(TEN_PROMPTS))],
    ).images
    make_image_grid(images, rows=2, cols=len(TEN_PROMPTS), resize=128).save(path)


def train_teacher(
    pool: ScenePool,
    autoencoder: Path,
    folder: Path,
    config: TeacherConfig,
    resume: bool = False,
    start: Path | None = None,
) -> StableDiffusionPipeline:
    """Trains the teacher and saves it as a diffusers pipeline folder.

    Args:
        pool: training scenes.
        autoencoder: the folder that the autoencoder's training left.
        folder: receives `checkpoint.pt` and contact sheets on the way, `pipeline/` in the end.
        config: sizes, rates, steps, seed.
        resume: go on from the folder's checkpoint.
        start: an exported teacher to go on from where there is no checkpoint.

    Returns:
        The pipeline with the averaged weights, float32.
    """
    vae = load_autoencoder(autoencoder)
    latents = load_latents(folder.parent / "latents.safetensors", pool, vae)
    training = TeacherTraining(pool, latents, config)

    def sample(done: int) -> None:
        if done % SHEET_EVERY == 0:
            sample_sheet(training.averaged_pipeline(vae), folder / f"step-{done:05d}.png")

    first, seconds = 0, 0.0
    if start is not None and not (folder / CHECKPOINT).exists():
        first, seconds = training.load_exported(start)
    run(training, folder, config.steps, resume, sample, first=first, seconds=seconds)
    pipeline = training.averaged_pipeline(vae)
    if process()[0] == 0:
        pipeline.save_pretrained(folder / "pipeline")
    return pipeline


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
