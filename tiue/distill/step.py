"""One student update and the LoRA updates that follow it (arXiv 2505.21960)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tiue.distill import losses
from tiue.distill.adversary import Adversary
from tiue.distill.clip import ClipScorer
from tiue.distill.config import DistillConfig
from tiue.distill.data import SampleDraws
from tiue.distill.guards import Guard
from tiue.distill.networks import family_of
from tiue.distill.teacher import Teacher, drop_prompts
from tiue.distill.text import Text
from tiue.schedule import OnePassSchedule


class Student(nn.Module):
    """The K predictions as a `forward`, which is what autocast and data parallelism wrap.

    Args:
        unet: The UNet or transformer that is trained.
        schedule: Its K timesteps.
    """

    def __init__(self, unet: Any, schedule: OnePassSchedule) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule

    def forward(self, latents: Tensor, text: Text) -> Tensor:
        """Predict noise or velocity [K, B, C, H, W] of latents [B, C, H, W] and their prompts."""
        scaled = self.schedule.scale_model_input(latents)
        timesteps = self.schedule.timesteps.to(latents.device)
        given = family_of(self.unet).conditions(self.unet, text)
        return self.unet.predict_noise(scaled, timesteps, text.tokens, **given)


@dataclass
class Trained:
    """A network with what updates it, all prepared by accelerate.

    Attributes:
        network: What is called with a graph.
        parameters: Those of it that are trained.
        optimizer: Updates them.
        rates: Steps the optimiser's learning rate.
    """

    network: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler

    @property
    def local(self) -> list[Any]:
        """What this process holds of the parameters, as plain tensors in the same memory."""
        return [
            p.to_local().detach().requires_grad_() if isinstance(p, DTensor) else p
            for p in self.parameters
        ]

    @property
    def schedule(self) -> Any:
        """The `LambdaLR` under accelerate's wrapper."""
        return getattr(self.rates, "scheduler", self.rates)


def averaged_from(trained: Trained, on_cpu: bool) -> list[Any]:
    """What the moving average is formed of: this process's part, in the memory it is kept in."""
    if not on_cpu:
        return trained.local
    return [p.detach().cpu().requires_grad_() for p in trained.local]


@dataclass
class MicroBatch:
    """B samples of an update.

    Attributes:
        prompts: Their prompts.
        text: What the UNets are told of them.
        draws: Their random numbers.
    """

    prompts: list[str]
    text: Text
    draws: SampleDraws


@dataclass
class StepResult:
    """What an update tells.

    Attributes:
        figures: Losses and norms: means over all micro-batches and processes.
        timesteps: Timesteps of the VSD term, this process's samples.
        score_rms: Root mean square of g of each of them.
    """

    figures: dict[str, float]
    timesteps: list[int]
    score_rms: list[float]


class DistillStep:
    """Updates student and LoRA teacher with one batch.

    An update's loss is a function of all its samples, however they are spread over micro-batches
    and processes: gradients are the mean over them, and random numbers go with the sample.

    Args:
        config: The run's settings.
        accelerator: Spreads and scales.
        student: The prepared student; its network is a `Student`.
        lora: The prepared LoRA teacher; its network predicts noise with the adapter on.
        teacher: Frozen and LoRA teacher.
        schedule: The student's K timesteps.
        latent_shape: C, H, W of a sample.
        empty: The empty prompt, one row.
        guard: Sees figures before an update is applied.
        ema: The student's moving average, if one is kept.
        clip: Looks at pictures for the CLIP loss, if it is on.
        adversary: Has the critic and the real pictures of the GAN loss, if it is on.
    """

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        student: Trained,
        lora: Trained,
        teacher: Teacher,
        schedule: OnePassSchedule,
        latent_shape: tuple[int, int, int],
        empty: Text,
        guard: Guard,
        ema: EMAModel | None = None,
        clip: ClipScorer | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        self.config, self.accelerator, self.guard = config, accelerator, guard
        self.student, self.lora, self.teacher = student, lora, teacher
        self.schedule, self.latent_shape, self.empty = schedule, latent_shape, empty
        self.ema, self.clip, self.adversary = ema, clip, adversary
        # A sum over all maps of an update, as a mean over its parts.
        parts = config.gradient_accumulation_steps * accelerator.num_processes
        self._kl_scale = parts if config.kl_reduction == "sum" else 1

    def __call__(self, batches: Sequence[MicroBatch], step: int) -> StepResult:
        """Make student update number `step` (from 1) and `lora_updates` of the LoRA.

        Args:
            batches: This process's micro-batches, `gradient_accumulation_steps` of them.
            step: The update's number.

        Returns:
            What it tells.

        Raises:
            NonFiniteError: If a loss or gradient is NaN or infinite; the update is not applied.
            DivergenceError: If one has run away; the update is not applied.
        """
        parts, timesteps, fixed = [], [], []
        for batch in batches:
            with self._accumulated(self.student):
                loss, images, told, drawn = self._student_loss(batch, step)
                self.accelerator.backward(loss)
            parts.append(told)
            fixed.append(images)
            timesteps.append(drawn)
        names = ("vsd", "kl", "clip", "gan", "score_norm")
        rms = torch.cat([told[len(names) :] for told in parts])
        means = torch.stack([told[: len(names)] for told in parts]).mean(0)
        figures = self._apply(self.student, dict(zip(names, means, strict=True)), "grad_norm", step)
        if self.ema is not None:
            self.ema.step(averaged_from(self.student, self.config.ema_on_cpu))
        for name, part in (("clip", self.clip), ("gan", self.adversary)):
            if part is None:
                del figures[name]

        for _ in range(self.config.lora_updates):
            lora_told = []
            for batch, images in zip(batches, fixed, strict=True):
                with self._accumulated(self.lora):
                    own = {"lora": self._lora_loss(batch, images)}
                    loss = own["lora"]
                    if self.adversary is not None:
                        own["critic"] = self.adversary.critic_loss(images, batch.draws)
                        loss = loss + self.config.gan_critic_weight * own["critic"]
                    self.accelerator.backward(loss)
                lora_told.append({name: value.detach() for name, value in own.items()})
            columns = zip(*(each.values() for each in lora_told), strict=True)
            mean = dict(zip(own, (torch.stack(column).mean() for column in columns), strict=True))
            figures |= self._apply(self.lora, mean, "lora_grad_norm", step)
        return StepResult(figures, torch.cat(timesteps).tolist(), rms.tolist())

    @contextmanager
    def _accumulated(self, trained: Trained) -> Iterator[None]:
        """One micro-batch; the last one's backward adds up the gradients of all processes."""
        with self.accelerator.accumulate(trained.network):
            if isinstance(trained.network, FSDPModule):
                trained.network.set_requires_gradient_sync(self.accelerator.sync_gradients)
            yield

    def _student_loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's loss, its images, [5 + B] figures and the timesteps [B] of a batch."""
        config, draws = self.config, batch.draws
        latents = draws.normal(self.latent_shape) * self.schedule.init_noise_sigma
        noise_pred = self.student.network(latents, batch.text)
        images = self.schedule.combine(latents, noise_pred)  # latents of images: [B, C, H, W]
        fixed = images.detach()
        timesteps = draws.integers(config.min_timestep, config.max_timestep)
        gradient = self._score_gradient(
            fixed, draws.normal(self.latent_shape), timesteps, batch.text
        )
        vsd = losses.vsd_loss(images, gradient)
        kl = losses.kl_loss(noise_pred, config.kl_weight * self._kl_scale, config.kl_reduction)
        clip = gan = handed = torch.zeros_like(vsd)
        if self.clip is not None:
            image_embeds = self.clip.embed_latents(images.float())
            text_embeds = self.clip.embed_prompts(batch.prompts)
            loss = losses.clip_loss(image_embeds, text_embeds, config.clip_target)
            clip = self._clip_weight(step) * loss
        if self.adversary is not None:
            loss, towards_real = self.adversary.score(fixed, draws)
            gan = config.gan_weight * loss
            handed = config.gan_weight * losses.with_gradient(images, towards_real)
        norms = gradient.flatten(1).norm(dim=1)
        rms = norms / gradient[0].numel() ** 0.5
        figures = torch.cat([torch.stack([vsd, kl, clip, gan, norms.mean()]), rms]).detach()
        return vsd + kl + clip + handed, fixed, figures, timesteps

    def _score_gradient(
        self, images: Tensor, noise: Tensor, timesteps: Tensor, text: Text
    ) -> Tensor:
        schedule = self.teacher.noise_schedule
        noisy = schedule.add_noise(images, noise, timesteps)
        frozen, lora = (
            self.teacher.guided_noise(noisy, timesteps, text, self.empty, scale, lora)
            for scale, lora in (
                (self.config.guidance_scale, False),
                (self.config.lora_guidance_scale, True),
            )
        )
        _, sigma = schedule.at(timesteps)
        return losses.vsd_gradient(frozen, lora, sigma, self.config.weighting)

    def _lora_loss(self, batch: MicroBatch, images: Tensor) -> Tensor:
        schedule, draws = self.teacher.noise_schedule, batch.draws
        timesteps = draws.integers(0, len(schedule) - 1)
        noise = draws.normal(self.latent_shape)
        dropped = draws.chances(self.config.prompt_drop)
        text = drop_prompts(batch.text, self.empty, dropped)
        noisy = schedule.add_noise(images, noise, timesteps)
        target, weight = schedule.target(images, noise), schedule.lora_weight(timesteps)
        return losses.lora_loss(self.teacher.lora_noise(noisy, timesteps, text), target, weight)

    def _apply(
        self, trained: Trained, tensors: dict[str, Tensor], norm_name: str, step: int
    ) -> dict[str, float]:
        """Clip, look at the figures on all processes together, and only then update."""
        norm = self.accelerator.clip_grad_norm_(trained.parameters, self.config.max_grad_norm)
        values = torch.stack([*(t.float() for t in tensors.values()), _whole(norm)])
        # One transfer, hence one wait for the device; NaN on any process is NaN on all.
        means = self.accelerator.reduce(values, "mean").tolist()
        figures = dict(zip([*tensors, norm_name], means, strict=True))
        self.guard.check(figures, step)
        trained.optimizer.step()
        trained.rates.step()
        trained.optimizer.zero_grad()
        return figures

    def _clip_weight(self, step: int) -> float:
        start, end = self.config.clip_weight, self.config.clip_weight_end
        return start + (end - start) * (step - 1) / max(1, self.config.steps - 1)


def _whole(norm: Tensor) -> Tensor:
    """A norm as an ordinary float32 tensor; of sharded gradients it comes as a distributed one."""
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
