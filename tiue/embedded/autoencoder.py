"""The picture autoencoder: diffusers' AutoencoderTiny, 64 x 64 to 16 x 8 x 8 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderTiny
from torch import nn

from tiue.embedded.config import LATENT_CHANNELS, AutoencoderConfig, DecoderConfig
from tiue.embedded.loop import cosine_rate, run, set_rate, step_generator
from tiue.errors import CheckpointError


class PictureSet(Protocol):
    """The pictures of a stage."""

    @property
    def images(self) -> torch.Tensor:
        """[N, 3, 64, 64] uint8."""

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Draws picture indices [batch_size]."""


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderTiny:
    """Builds the autoencoder with random weights."""
    levels = len(config.encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=(config.width,) * levels,
        decoder_block_out_channels=(config.width,) * levels,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        latent_channels=LATENT_CHANNELS,
        force_upcast=False,
    )


def load_autoencoder(folder: Path) -> AutoencoderTiny:
    """Loads the autoencoder that a training stage left in `folder`, frozen.

    Raises:
        CheckpointError: if there is none.
    """
    if not (folder / "vae" / "config.json").exists():
        raise CheckpointError(
            f"no trained autoencoder in {folder}: run `python -m tiue.openmoji.train {folder.name}`"
        )
    return AutoencoderTiny.from_pretrained(folder / "vae").eval().requires_grad_(False)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Turns uint8 pictures into float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def random_crop(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cuts a square of `size` pixels, at the same random place, out of every picture."""
    top, left = torch.randint(images.shape[-1] - size + 1, (2,), generator=generator).tolist()
    crop = images[..., top : top + size, left : left + size]
    return crop.contiguous(memory_format=torch.channels_last)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, along width and height."""
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, edge_weight: float
) -> torch.Tensor:
    """L1 + L2 of the pixels, and L1 of the edges, which carry OpenMoji's black outlines."""
    loss = nn.functional.l1_loss(output, target) + nn.functional.mse_loss(output, target)
    for ours, theirs in zip(edges(output), edges(target), strict=True):
        loss = loss + edge_weight * nn.functional.l1_loss(ours, theirs)
    return loss


def moment_penalty(latents: torch.Tensor, std: float) -> torch.Tensor:
    """Holds every latent channel near mean 0 and deviation `std`: what a diffusion model wants."""
    flat = latents.transpose(0, 1).flatten(1)  # (C, B*h*w)
    return (flat.mean(1) / std).square().mean() + (flat.std(1) / std - 1).square().mean()


def add_latent_noise(
    latents: torch.Tensor, greatest: float, generator: torch.Generator
) -> torch.Tensor:
    """Adds normal noise of a deviation drawn from 0..greatest, another for every picture."""
    noise = torch.randn(latents.shape, generator=generator)
    amount = torch.rand((len(latents), 1, 1, 1), generator=generator)
    return latents + greatest * amount * noise


@torch.no_grad()
def encode_pictures(model: AutoencoderTiny, pictures: PictureSet) -> torch.Tensor:
    """Encodes all pictures to scaled latents [N, 16, 8, 8], of unit deviation once trained."""
    batches = pictures.images.split(64)
    latents = torch.cat([model.encode(to_model_range(batch)).latents for batch in batches])
    return latents * model.config.scaling_factor


class _Stage:
    """Optimiser and state of a stage that trains some of an autoencoder's parameters."""

    def __init__(
        self,
        model: AutoencoderTiny,
        trained: nn.Module,
        config: AutoencoderConfig | DecoderConfig,
    ) -> None:
        # 1.35 x faster on a CPU than the default layout
        self.model = model.to(memory_format=torch.channels_last)
        self.trained = trained
        self.rates = config
        self.optimizer = torch.optim.AdamW(
            trained.parameters(), lr=config.learning_rate, weight_decay=1e-4
        )

    def update(self, loss: torch.Tensor, step: int) -> None:
        config = self.rates
        factor = cosine_rate(step, config.steps, config.warmup_steps)
        set_rate(self.optimizer, config.learning_rate * factor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class AutoencoderTraining(_Stage):
    """Trains encoder and decoder together, on crops."""

    def __init__(
        self,
        pictures: PictureSet,
        config: AutoencoderConfig,
        model: AutoencoderTiny | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        model = (model or build_autoencoder(config)).train()
        super().__init__(model, model, config)
        self.pictures = pictures
        self.config = config

    def step(self, step: int) -> float:
        """Takes one update; returns the loss of the pictures."""
        config = self.config
        generator = step_generator(config.seed, step)
        chosen = self.pictures.images[self.pictures.sample(config.batch_size, generator)]
        target = to_model_range(random_crop(chosen, config.crop_size, generator))
        latents = self.model.encode(target).latents
        greatest = config.latent_std * config.latent_noise
        output = self.model.decode(add_latent_noise(latents, greatest, generator)).sample
        loss = reconstruction_loss(output, target, config.edge_weight)
        penalty = moment_penalty(latents, config.latent_std)
        self.update(loss + config.moment_weight * penalty, step)
        return loss.item()


class DecoderTraining(_Stage):
    """Trains the decoder alone on whole pictures, so that the latents stay as they are."""

    def __init__(self, model: AutoencoderTiny, pictures: PictureSet, config: DecoderConfig) -> None:
        model.requires_grad_(False).decoder.requires_grad_(True)
        super().__init__(model, model.decoder, config)
        self.pictures = pictures
        self.config = config
        self.latents = encode_pictures(model, pictures)  # (N, 16, 8, 8)

    def step(self, step: int) -> float:
        """Takes one update; returns the loss of the pictures."""
        config = self.config
        generator = step_generator(config.seed, step)
        chosen = self.pictures.sample(config.batch_size, generator)
        target = to_model_range(self.pictures.images[chosen])
        latents = add_latent_noise(self.latents[chosen], config.latent_noise, generator)
        output = self.model.decode(latents / self.model.config.scaling_factor).sample
        loss = reconstruction_loss(output, target, config.edge_weight)
        self.update(loss, step)
        return loss.item()


def train_autoencoder(
    pictures: PictureSet,
    folder: Path,
    config: AutoencoderConfig,
    resume: bool = False,
    model: AutoencoderTiny | None = None,
) -> AutoencoderTiny:
    """Trains the autoencoder and saves it as a diffusers folder.

    Args:
        pictures: training pictures.
        folder: receives `checkpoint.pt` on the way and `vae/` in the end.
        config: sizes, rates, steps, seed.
        resume: go on from the folder's checkpoint.
        model: an autoencoder to train on; by default a new one.

    Returns:
        The trained autoencoder, its `scaling_factor` set to 1 / deviation of the latents.
    """
    training = AutoencoderTraining(pictures, config, model)
    run(training, folder, config.steps, resume)
    model = training.model.eval()
    model.register_to_config(scaling_factor=1.0)
    latents = encode_pictures(model, pictures)
    model.register_to_config(scaling_factor=1 / latents.std().item())
    model.save_pretrained(folder / "vae")
    return model


def train_decoder(
    pictures: PictureSet,
    autoencoder: Path,
    folder: Path,
    config: DecoderConfig,
    resume: bool = False,
) -> AutoencoderTiny:
    """Trains the autoencoder's decoder on; independent of the teacher, which sees latents only.

    Args:
        pictures: training pictures.
        autoencoder: the folder that `train_autoencoder` wrote.
        folder: receives `checkpoint.pt` on the way and `vae/` in the end.
        config: rates, steps, seed.
        resume: go on from the folder's checkpoint.

    Returns:
        The autoencoder with the better decoder.
    """
    training = DecoderTraining(load_autoencoder(autoencoder), pictures, config)
    run(training, folder, config.steps, resume)
    training.model.save_pretrained(folder / "vae")
    return training.model
