"""The optional GAN loss: a critic on the LoRA teacher's features, against real pictures.

As DMD2 has it (arXiv 2405.14867): a head on the bottleneck of the network that follows the student
tells the student's images from real ones, both noisy, and what teaches the head teaches that
network's LoRA too. Unlike there, the critic reads the empty prompt, so pictures need no captions.
"""

import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from tiue.distill import losses
from tiue.distill.data import SampleDraws
from tiue.distill.pictures import Pictures
from tiue.distill.teacher import Teacher
from tiue.distill.text import Text
from tiue.unet import TiUEUNet

HEAD = "critic"  # the head's name inside the teacher's UNet


class CriticHead(nn.Sequential):
    """A logit for every place of a feature map.

    Args:
        channels: Of the map.
    """

    def __init__(self, channels: int) -> None:
        width = max(channels // 4, 8)
        super().__init__(
            nn.GroupNorm(math.gcd(channels, 8), channels),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(math.gcd(width, 8), width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(math.gcd(width, 8), width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, 1, h, w] of features [B, C, h, w]."""
        return super().forward(features)


def add_critic(unet: TiUEUNet, device: torch.device) -> None:
    """Put a new head into a teacher's UNet, where it is spread and updated with the LoRA."""
    unet.add_module(HEAD, CriticHead(unet.config.block_out_channels[-1]).to(device))


def critic_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a UNet's head, by name; none where it has no head."""
    head = getattr(unet, HEAD, None)
    return {} if head is None else dict(head.named_parameters())


class Adversary:
    """The student's gradient and the critic's loss.

    Args:
        accelerator: Gives autocast.
        teacher: Its UNet has a head (`add_critic`) and is prepared.
        empty: The empty prompt, one row.
        pictures: The real ones.
        latent_shape: C, H, W of a sample.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: Teacher,
        empty: Text,
        pictures: Pictures,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.accelerator, self.teacher, self.empty = accelerator, teacher, empty
        self.pictures, self.latent_shape = pictures, latent_shape
        # A method of the UNet that returns a tensor: its call gathers what FSDP2 has spread, and
        # the hook on the tensor does for backward.
        teacher.unet.classify = partial(_classify, teacher.unet)
        register_fsdp_forward_method(teacher.unet, "classify")

    def score(self, images: Tensor, draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """Find where images would look more real to the critic.

        Found here and handed to the student, so that no gradient reaches the teacher and its graph
        is gone before the student's backward.

        Args:
            images: The student's, [B, C, H, W].
            draws: Their random numbers.

        Returns:
            The loss, and N times its gradient for the images with N their number of elements,
            float32.
        """
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = losses.gan_loss(self._logits(*self._noisy(images, draws)))
            # Of N times the loss, which float16 can hold.
            (gradient,) = torch.autograd.grad(loss * images.numel(), images)
        return loss.detach(), gradient

    def critic_loss(self, images: Tensor, draws: SampleDraws) -> Tensor:
        """Teach the critic on images [B, C, H, W] and as many real pictures: its loss."""
        real = self.pictures[draws.integers(0, len(self.pictures) - 1)]
        parts = [self._noisy(latents, draws) for latents in (images, real)]
        noisy, timesteps = (torch.cat(both) for both in zip(*parts, strict=True))
        made, true = self._logits(noisy, timesteps).chunk(2)
        return losses.critic_loss(made, true)

    def _noisy(self, latents: Tensor, draws: SampleDraws) -> tuple[Tensor, Tensor]:
        schedule = self.teacher.noise_schedule
        timesteps = draws.integers(0, len(schedule) - 1)
        noise = draws.normal(self.latent_shape)
        return schedule.add_noise(latents, noise, timesteps), timesteps

    def _logits(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        text = self.empty.map(lambda row: row.expand(len(noisy), *row.shape[1:]))
        with self.accelerator.autocast():
            return self.teacher.classify(noisy, timesteps, text).float()


def _classify(unet: Any, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    features = unet.encode(noisy, timesteps, text.tokens, **text.conditions())
    return getattr(unet, HEAD)(features.hidden)
