"""The teacher: a Stable Diffusion in small, trained on the autoencoder's latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue.openmoji.autoencoder import encode_pictures, load_autoencoder
from tiue.openmoji.config import (
    GUIDANCE_SCALE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    MAX_PROMPT_TOKENS,
    TEACHER_STEPS,
    TEN_PROMPTS,
    TeacherConfig,
)
from tiue.openmoji.data import ALIAS_SHARE, Pictures
from tiue.openmoji.loop import (
    average_gradients,
    cosine_rate,
    process,
    run,
    set_rate,
    step_generator,
)

SHEET_EVERY = 1000


class TextConfig(Protocol):
    """The text encoder's sizes."""

    @property
    def text_width(self) -> int:
        """Channels."""

    @property
    def text_layers(self) -> int:
        """Layers."""

    @property
    def text_heads(self) -> int:
        """Heads of attention."""

    @property
    def text_feed_forward(self) -> int:
        """Channels inside the feed-forwards."""


def train_tokenizer(
    prompts: list[str], vocabulary: int, max_tokens: int = MAX_PROMPT_TOKENS
) -> CLIPTokenizer:
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


def build_scheduler() -> DDIMScheduler:
    """Builds the scheduler of Stable Diffusion 2.x (v-prediction), in its DDIM form.

    Trailing spacing starts at t = 999. Leading spacing would start at t = 751 for four steps, where
    a quarter of the deviation is signal: this model takes pure noise there for a picture.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
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


def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
    """Builds the UNet with random weights."""
    down = [("CrossAttn" if wanted else "") + "DownBlock2D" for wanted in config.attention]
    up = [("CrossAttn" if wanted else "") + "UpBlock2D" for wanted in reversed(config.attention)]
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
        # The prompt as a whole scales and shifts every resnet: a name is learned in a fraction of
        # the steps that cross-attention alone takes.
        addition_embed_type="text",
        addition_embed_type_num_heads=config.text_heads,
        resnet_time_scale_shift="scale_shift",
    )


def build_pipeline(
    vae: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler | None = None,
) -> StableDiffusionPipeline:
    """Puts the parts into diffusers' own Stable Diffusion pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler or build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Turns prompts into token ids [len(prompts), longest], padded as the pipeline does."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Draws timesteps of 0..steps-1 with a density that grows with t.

    Where noise is high the prompt decides alone, and that is the longest to learn. One timestep
    comes from each of `count` equally likely parts, for less noise in the loss.
    """
    quantiles = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (quantiles.sqrt() * steps).long()


class TeacherTraining:
    """The teacher's parts, its optimiser and its moving average; one call of `step` per batch."""

    def __init__(
        self,
        pictures: Pictures,
        latents: torch.Tensor,
        tokenizer: CLIPTokenizer,
        config: TeacherConfig,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.pictures = pictures
        self.latents = latents  # (N, 16, 8, 8), scaled
        self.tokenizer = tokenizer
        # 1.1 x faster on a CPU than the default layout
        self.unet = build_unet(config).train().to(memory_format=torch.channels_last)
        self.text_encoder = build_text_encoder(config, tokenizer).train()
        self.scheduler = build_scheduler()
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        self.prompt_ids = tokenize(tokenizer, pictures.prompts)
        self.alias_ids = tokenize(tokenizer, pictures.aliases)
        self.empty_ids = tokenize(tokenizer, [""])

    def batch_ids(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Token ids of the chosen pictures: the prompt, at times its alias, at times none."""
        draw = torch.rand((len(chosen), 1), generator=generator)
        drop, alias = self.config.prompt_drop, ALIAS_SHARE
        ids = torch.where(draw < drop + alias, self.alias_ids[chosen], self.prompt_ids[chosen])
        return torch.where(draw < drop, self.empty_ids, ids)

    def step(self, step: int) -> float:
        """Takes one optimiser step, all its randomness drawn from its number; returns the loss.

        The loss is the mean squared error of v (Salimans and Ho, "Progressive Distillation",
        2022), weighted by (min(SNR, gamma) + 1) / (SNR + 1): in terms of the clean latents a
        weight of min(SNR, gamma) + 1. Noise prediction would weigh them by SNR, 0.01 at t = 900,
        where all that tells one picture from another is the prompt.
        """
        config = self.config
        generator = step_generator(config.seed, step)
        chosen = self.pictures.sample(config.batch_size, generator)
        ids = self.batch_ids(chosen, generator)
        noise = torch.randn((len(chosen), *self.latents.shape[1:]), generator=generator)
        timesteps = stratified_timesteps(
            len(chosen), self.scheduler.config.num_train_timesteps, generator
        )
        # All processes draw the same batch, and each takes its rows: how many there are does not
        # change the result.
        rank, processes = process()
        mine = slice(rank, None, processes)
        ids, noise, timesteps = ids[mine], noise[mine], timesteps[mine]
        clean = self.latents[chosen[mine]]
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        prompt_embeds = self.text_encoder(ids).last_hidden_state
        predicted = self.unet(noisy, timesteps, prompt_embeds).sample
        snr = compute_snr(self.scheduler, timesteps)
        weight = (snr.clamp(max=config.snr_gamma) + 1) / (snr + 1)
        target = self.scheduler.get_velocity(clean, noise, timesteps)
        loss = (weight * (predicted - target).square().mean(dim=(1, 2, 3))).mean()

        set_rate(
            self.optimizer,
            config.learning_rate * cosine_rate(step, config.steps, config.warmup_steps),
        )
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
        """The pipeline with copies of the averaged weights."""
        unet = build_unet(self.config)
        text_encoder = build_text_encoder(self.config, self.tokenizer)
        self.ema.copy_to([*unet.parameters(), *text_encoder.parameters()])
        return build_pipeline(vae, text_encoder.eval(), self.tokenizer, unet.eval())


def sample_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Saves one picture of each of the ten prompts, 25 DDIM steps, seeds 0..9, enlarged twice."""
    images = pipeline(
        list(TEN_PROMPTS),
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(TEN_PROMPTS))],
    ).images
    make_image_grid(images, rows=1, cols=len(images), resize=128).save(path)


def train_teacher(
    pictures: Pictures,
    autoencoder: Path,
    folder: Path,
    config: TeacherConfig,
    resume: bool = False,
) -> StableDiffusionPipeline:
    """Trains the teacher and saves it as a diffusers pipeline folder.

    Args:
        pictures: training pictures.
        autoencoder: the folder that `train_autoencoder` wrote.
        folder: receives `checkpoint.pt` and contact sheets on the way, `pipeline/` in the end.
        config: sizes, rates, steps, seed.
        resume: go on from the folder's checkpoint.

    Returns:
        The pipeline with the averaged weights, float32.
    """
    vae = load_autoencoder(autoencoder)
    texts = sorted({*pictures.prompts, *pictures.aliases})
    tokenizer = train_tokenizer(texts, config.vocabulary)
    training = TeacherTraining(pictures, encode_pictures(vae, pictures), tokenizer, config)

    def sample(done: int) -> None:
        if done % SHEET_EVERY == 0:
            sample_sheet(training.averaged_pipeline(vae), folder / f"step-{done:05d}.png")

    run(training, folder, config.steps, resume, sample)
    pipeline = training.averaged_pipeline(vae)
    if process()[0] == 0:
        pipeline.save_pretrained(folder / "pipeline")
    return pipeline
