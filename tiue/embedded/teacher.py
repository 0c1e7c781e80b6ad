"""A teacher: a Stable Diffusion in small, trained on the autoencoder's latents."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue.embedded.autoencoder import PictureSet
from tiue.embedded.config import (
    GUIDANCE_SCALE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    TEACHER_STEPS,
    TeacherConfig,
)
from tiue.embedded.loop import average_gradients, process, run, set_rate, step_generator


def train_tokenizer(prompts: list[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """Trains CLIP's byte-level BPE on the prompts.

    Args:
        prompts: what to learn the merges from.
        vocabulary: tokens in all: 2 special, 256 bytes inside a word, 256 at its end, merges.
        max_tokens: to which prompts are padded and cut.

    Returns:
        A tokenizer that knows every byte, so no text maps to the unknown token.
    """
    backend = CLIPTokenizer().backend_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    # Given as special tokens they get fixed numbers, by which the trainer breaks ties between
    # merges; else it numbers them in the order of a hash table, another in every run.
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=tokens,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(prompts, trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    tokens = ["<|startoftext|>", "<|endoftext|>", *tokens, *map("".join, merges)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=max_tokens,
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Turns prompts into token ids [len(prompts), longest], padded as the pipeline does."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def build_scheduler(prediction_type: str, timestep_spacing: str) -> DDIMScheduler:
    """Builds Stable Diffusion's scheduler in its DDIM form."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing=timestep_spacing,
    )


def build_text_encoder(config: TeacherConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the text encoder with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=config.text_feed_forward,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(
    config: TeacherConfig, attention: Sequence[bool], **settings: Any
) -> UNet2DConditionModel:
    """Builds the UNet with random weights.

    Args:
        config: its widths.
        attention: whether a level has cross-attention, from the top down.
        **settings: others of diffusers' UNet.
    """
    down = [("CrossAttn" if wanted else "") + "DownBlock2D" for wanted in attention]
    up = [("CrossAttn" if wanted else "") + "UpBlock2D" for wanted in reversed(attention)]
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        # diffusers' name for the number of heads
        attention_head_dim=tuple(width // config.head_size for width in config.channels),
        use_linear_projection=True,
        **settings,
    )


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Draws timesteps of 0..steps-1 with a density that grows with t.

    Where noise is high the prompt decides alone, and that is the longest to learn. One timestep
    comes from each of `count` equally likely parts, for less noise in the loss.
    """
    quantiles = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    # A quantile just below 1 has a root that rounds to 1.
    return (quantiles.sqrt() * steps).long().clamp(max=steps - 1)


class TeacherTraining(ABC):
    """A teacher's parts, its optimiser and its moving average; one call of `step` a batch.

    Args:
        pictures: training pictures.
        latents: theirs, [N, 16, 8, 8], scaled.
        tokenizer: of the text encoder.
        config: sizes, rates, steps, seed.
    """

    # Else it keeps the weights that it was given.
    trains_text_encoder: ClassVar[bool] = True
    # Of the contact sheets.
    sheet_prompts: ClassVar[tuple[str, ...]]
    sheet_every: ClassVar[int]

    def __init__(
        self,
        pictures: PictureSet,
        latents: torch.Tensor,
        tokenizer: CLIPTokenizer,
        config: TeacherConfig,
    ) -> None:
        torch.manual_seed(config.seed)
        self.pictures = pictures
        self.config = config
        self.latents = latents
        self.tokenizer = tokenizer
        # 1.1 x faster on a CPU than the default layout
        self.unet = self.build_unet(config).train().to(memory_format=torch.channels_last)
        if config.bf16:
            # A CPU takes ten times as long for the backward of scaled_dot_product_attention in
            # bfloat16 as in float32: 9.7 ms a call at 32 x 64 tokens.
            self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = build_text_encoder(config, tokenizer).train()
        self.scheduler = self.build_scheduler()
        self.text_encoder.requires_grad_(self.trains_text_encoder)
        self.parameters = self._trained(self.unet, self.text_encoder)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)

    def _trained(self, unet: nn.Module, text_encoder: nn.Module) -> list[nn.Parameter]:
        modules = (unet, text_encoder) if self.trains_text_encoder else (unet,)
        return [parameter for module in modules for parameter in module.parameters()]

    @staticmethod
    @abstractmethod
    def build_unet(config: Any) -> UNet2DConditionModel:
        """Builds the UNet with random weights."""

    @staticmethod
    @abstractmethod
    def build_scheduler() -> DDIMScheduler:
        """Builds the scheduler of training and of the pipeline."""

    @abstractmethod
    def draw_prompts(self, chosen: torch.Tensor, generator: torch.Generator) -> Any:
        """A prompt, or none, for each of the chosen pictures: a sequence for `token_ids`."""

    def token_ids(self, prompts: Any) -> torch.Tensor:
        """Token ids of drawn prompts."""
        return tokenize(self.tokenizer, prompts)

    @abstractmethod
    def objective(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet is to predict of each latent, and the weight [B] of its squared error."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Factor on the learning rate."""

    def step(self, step: int) -> float:
        """Takes one optimiser step, all its randomness drawn from its number; returns the loss."""
        config = self.config
        generator = step_generator(config.seed, step)
        chosen = self.pictures.sample(config.batch_size, generator)
        prompts = self.draw_prompts(chosen, generator)
        noise = torch.randn((len(chosen), *self.latents.shape[1:]), generator=generator)
        timesteps = stratified_timesteps(
            len(chosen), self.scheduler.config.num_train_timesteps, generator
        )
        # All processes draw the same batch, and each takes its rows: how many there are does not
        # change the result.
        rank, processes = process()
        mine = slice(rank, None, processes)
        noise, timesteps = noise[mine], timesteps[mine]
        clean = self.latents[chosen[mine]].float()
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(self.unet.device.type, torch.bfloat16, enabled=config.bf16):
            prompt_embeds = self.text_encoder(self.token_ids(prompts[mine])).last_hidden_state
            predicted = self.unet(noisy, timesteps, prompt_embeds).sample.float()
        target, weight = self.objective(clean, noise, timesteps)
        loss = (weight * (predicted - target).square().mean(dim=(1, 2, 3))).mean()

        set_rate(self.optimizer, config.learning_rate * self.rate(step))
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def averaged_pipeline(self, vae: AutoencoderTiny) -> StableDiffusionPipeline:
        """Copies of the averaged weights in diffusers' own Stable Diffusion pipeline."""
        unet = self.build_unet(self.config)
        text_encoder = build_text_encoder(self.config, self.tokenizer)
        text_encoder.load_state_dict(self.text_encoder.state_dict())
        self.ema.copy_to(self._trained(unet, text_encoder))
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder.eval(),
            tokenizer=self.tokenizer,
            unet=unet.eval(),
            scheduler=self.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def sample_sheet(pipeline: StableDiffusionPipeline, prompts: tuple[str, ...], path: Path) -> None:
    """Saves a picture of each prompt, seeds 0 and up, ten in a row, enlarged twice."""
    images = pipeline(
        list(prompts),
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
    ).images
    make_image_grid(images, rows=len(images) // 10, cols=10, resize=128).save(path)


def run_teacher(
    training: TeacherTraining,
    vae: AutoencoderTiny,
    folder: Path,
    resume: bool = False,
    first: int = 0,
    seconds: float = 0.0,
) -> StableDiffusionPipeline:
    """Runs a teacher's training to its end and saves it as a diffusers pipeline folder.

    Args:
        training: a model's.
        vae: whose latents it learns.
        folder: receives `checkpoint.pt` and contact sheets on the way, `pipeline/` in the end.
        resume: go on from the folder's checkpoint.
        first: updates that the weights have had already, where there is no checkpoint.
        seconds: that those took.

    Returns:
        The pipeline with the averaged weights, float32.
    """

    def sample(done: int) -> None:
        if done % training.sheet_every == 0:
            path = folder / f"step-{done:05d}.png"
            sample_sheet(training.averaged_pipeline(vae), training.sheet_prompts, path)

    steps = training.config.steps
    run(training, folder, steps, resume, sample, first=first, seconds=seconds)
    pipeline = training.averaged_pipeline(vae)
    if process()[0] == 0:
        pipeline.save_pretrained(folder / "pipeline")
    return pipeline
