"""The distillation loop (arXiv 2505.21960): VSD and KL for the student, denoising for the LoRA."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from tiue.distill import checkpoint, loading, losses
from tiue.distill.config import DistillConfig
from tiue.distill.data import PromptOrder, read_prompts
from tiue.distill.teacher import NoiseSchedule, Teacher, drop_prompts
from tiue.distill.text import PromptEmbeddings
from tiue.errors import CheckpointError, InputError, NonFiniteError
from tiue.schedule import OnePassSchedule
from tiue.unet import TiUEUNet

logger = logging.getLogger(__name__)

SampleHook = Callable[[TiUEUNet, OnePassSchedule, int], None]

Tensors = tuple[Tensor, ...] | list[Tensor]

_WEIGHT_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Student(nn.Module):
    """The K noise predictions as a `forward`, which is what autocast and data parallelism wrap.

    Args:
        unet: The UNet that is trained.
        schedule: Its K timesteps.
    """

    def __init__(self, unet: TiUEUNet, schedule: OnePassSchedule) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule

    def forward(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the noise [K, B, C, H, W] of latents [B, C, H, W] and embeddings [B, L, D]."""
        scaled = self.schedule.scale_model_input(latents)
        timesteps = self.schedule.timesteps.to(latents.device)
        return self.unet.predict_noise(scaled, timesteps, prompt_embeds)


class Trainer:
    """One distillation run.

    Everything that a step draws comes from the seed, the step's number and the process's rank, so
    a resumed run draws what the uninterrupted one would have.

    Args:
        config: The run's settings.
        on_sample: Called as `on_sample(unet, schedule, step)` every `config.sample_every` steps
            with the student (its average, if one is kept) in evaluation mode, without a graph.

    Raises:
        CheckpointError: If the teacher, the student or the checkpoint cannot be loaded.
        InputError: If the prompts or the settings cannot be used.
        OutputError: If the output folder cannot be.
    """

    def __init__(self, config: DistillConfig, on_sample: SampleHook | None = None) -> None:
        self.config, self.on_sample = config, on_sample
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
        device = self.accelerator.device
        prompts = read_prompts(config.prompts)
        resume_from = checkpoint.prepare_output(config.output, config.resume)

        self.scheduler = loading.load_student_scheduler(
            config.teacher, config.num_decoder_steps, config.timestep_spacing
        )
        self.schedule = OnePassSchedule.from_scheduler(self.scheduler, config.num_decoder_steps)
        noise_schedule = NoiseSchedule(self.scheduler).to(device)
        if config.kl_weight > 0 and noise_schedule.prediction_type != "epsilon":
            logger.warning(
                "The KL term takes the UNet's outputs for noise, and this teacher's are of type "
                "'%s': set kl_weight to 0 unless they are normal too.",
                noise_schedule.prediction_type,
            )
        if config.max_timestep >= len(noise_schedule):
            raise InputError(
                f"max_timestep is {config.max_timestep}, and the teacher's timesteps end at "
                f"{len(noise_schedule) - 1}."
            )

        tokenizer, text_encoder = loading.load_text(config.teacher)
        self.embeddings = PromptEmbeddings(
            prompts, tokenizer, text_encoder.to(device), config.embedding_cache_mib << 20
        )
        self.order = PromptOrder(len(prompts), config.seed)

        torch.manual_seed(config.seed)  # for the LoRA's first weights
        teacher_unet = loading.load_unet(config.teacher, _WEIGHT_TYPES[config.mixed_precision])
        self.teacher = Teacher(
            teacher_unet.to(device), noise_schedule, config.lora_rank, config.lora_alpha
        )
        self.unet = loading.load_unet(config.student or config.teacher).train()
        self._require_same_kind()
        self.latent_shape = self._latent_shape()
        self.ema = self._average() if config.ema_decay > 0 else None

        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=config.learning_rate, betas=betas, fused=True
        )
        lora_optimizer = torch.optim.Adam(
            self.teacher.lora_parameters, lr=config.lora_learning_rate, betas=betas, fused=True
        )
        student = Student(self.unet, self.schedule)
        self.student, self.optimizer, self.teacher.trained, self.lora_optimizer = (
            self.accelerator.prepare(student, optimizer, self.teacher.trained, lora_optimizer)
        )

        self.step, self.samples_seen = 0, 0
        if resume_from is not None:
            self._resume(resume_from)

    def train(self) -> Path:
        """Run to the last step and write the student.

        Returns:
            The output folder: `unet/` and `scheduler/` (the average, if one is kept), `pipeline/`
            where the teacher is a whole pipeline, `checkpoints/` and `log.jsonl`.

        Raises:
            NonFiniteError: If a loss or gradient becomes NaN or infinite.
            OutputError: If the output folder cannot be written.
        """
        config = self.config
        with tqdm(
            total=config.steps, initial=self.step, unit="step",
            disable=not self.accelerator.is_main_process,
        ) as progress:  # fmt: skip
            while self.step < config.steps:
                started = time.perf_counter()
                figures = self._train_step()
                seconds = time.perf_counter() - started
                self.step += 1
                images = config.batch_size * self.accelerator.num_processes
                self.samples_seen += images
                figures |= {"images_per_second": images / seconds, "seconds": seconds}
                progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()})
                progress.update()
                self._after_step(figures)
        if self.accelerator.is_main_process:
            self._write_student()
        self.accelerator.wait_for_everyone()
        return config.output

    def _train_step(self) -> dict[str, float]:
        config, device = self.config, self.accelerator.device
        rank = self.accelerator.process_index
        # The default generator is reseeded too, for dropout.
        words = np.random.SeedSequence((config.seed, self.step, rank)).generate_state(1, np.uint64)
        generator = torch.manual_seed(int(words[0]))
        first = self.samples_seen + rank * config.batch_size
        prompt_embeds = self.embeddings[self.order[range(first, first + config.batch_size)]]

        latents = torch.randn(self.latent_shape, generator=generator).to(device)
        latents = latents * self.schedule.init_noise_sigma
        noise_pred = self.student(latents, prompt_embeds)
        images = self.schedule.combine(latents, noise_pred)  # latents of images: [B, C, H, W]
        fixed = images.detach()
        vsd = losses.vsd_loss(images, self._vsd_gradient(fixed, prompt_embeds, generator))
        kl = losses.kl_loss(noise_pred, config.kl_weight, config.kl_reduction)
        norm = self._update(vsd + kl, list(self.unet.parameters()), self.optimizer)
        if self.ema is not None:
            self.ema.update_parameters(self.unet)

        for _ in range(config.lora_updates):
            lora = self._lora_loss(fixed, prompt_embeds, generator)
            lora_norm = self._update(lora, self.teacher.lora_parameters, self.lora_optimizer)
        names = ("vsd", "kl", "lora", "grad_norm", "lora_grad_norm")
        # One transfer, hence one wait for the device, a step.
        values = torch.stack([vsd, kl, lora, norm, lora_norm]).detach().tolist()
        figures = dict(zip(names, values, strict=True))
        self._require_finite(figures)
        return figures

    def _vsd_gradient(
        self, images: Tensor, prompt_embeds: Tensor, generator: torch.Generator
    ) -> Tensor:
        config, schedule = self.config, self.teacher.noise_schedule
        timesteps = self._timesteps(config.min_timestep, config.max_timestep, generator)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        noisy = schedule.add_noise(images, noise, timesteps)
        frozen, lora = (
            self.teacher.guided_noise(
                noisy, timesteps, prompt_embeds, self.embeddings.empty, scale, lora
            )
            for scale, lora in (
                (config.guidance_scale, False),
                (config.lora_guidance_scale, True),
            )
        )
        _, sigma = schedule.at(timesteps)
        return losses.vsd_gradient(frozen, lora, sigma, config.weighting)

    def _lora_loss(
        self, images: Tensor, prompt_embeds: Tensor, generator: torch.Generator
    ) -> Tensor:
        schedule = self.teacher.noise_schedule
        timesteps = self._timesteps(0, len(schedule) - 1, generator)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        dropped = torch.rand(len(images), generator=generator) < self.config.prompt_drop
        embeds = drop_prompts(prompt_embeds, self.embeddings.empty, dropped.to(images.device))
        noisy = schedule.add_noise(images, noise, timesteps)
        alpha, _ = schedule.at(timesteps)
        return losses.lora_loss(self.teacher.lora_noise(noisy, timesteps, embeds), noise, alpha)

    def _timesteps(self, least: int, greatest: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(least, greatest + 1, (self.config.batch_size,), generator=generator)
        return drawn.to(self.accelerator.device)

    def _update(
        self, loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Tensor:
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _require_finite(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            # float16's loss scaling meets infinite gradients on purpose and skips their update.
            skipped = self.config.mixed_precision == "fp16" and name.endswith("grad_norm")
            if not skipped and not np.isfinite(value):
                raise NonFiniteError(
                    f"{name} is {value} at step {self.step + 1}. Lower the learning rates or "
                    "train without mixed precision; --resume goes on from the last checkpoint."
                )

    def _after_step(self, figures: dict[str, float]) -> None:
        config = self.config
        last = self.step == config.steps
        if self.accelerator.is_main_process:
            if self.step % config.log_every == 0 or last:
                checkpoint.append_log(config.output / "log.jsonl", {"step": self.step, **figures})
            if self.on_sample and config.sample_every and self.step % config.sample_every == 0:
                self._sample(self.on_sample)
            if self.step % config.checkpoint_every == 0 or last:
                self._save_checkpoint()
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _sample(self, on_sample: SampleHook) -> None:
        unet = self._ema_unet or self.unet
        training = unet.training
        on_sample(unet.eval(), self.schedule, self.step)
        unet.train(training)

    @property
    def _ema_unet(self) -> TiUEUNet | None:
        return None if self.ema is None else cast(TiUEUNet, self.ema.module)

    def _average(self) -> AveragedModel:
        def follow(averages: Tensors, values: Tensors, updates: Tensor | int) -> None:
            # The first updates weigh more, or the average would be of untrained weights for long.
            decay = min(self.config.ema_decay, (1 + int(updates)) / (10 + int(updates)))
            torch._foreach_lerp_(averages, values, 1 - decay)

        average = AveragedModel(self.unet, self.accelerator.device, multi_avg_fn=follow)
        return average.requires_grad_(False).eval()

    def _require_same_kind(self) -> None:
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            own, taught = self.unet.config[name], self.teacher.unet.config[name]
            if own != taught:
                raise CheckpointError(
                    f"The student's {name} is {own} and the teacher's {taught}: they must share "
                    "latents and text encoder. Start from a UNet of the teacher's kind."
                )

    def _latent_shape(self) -> tuple[int, int, int, int]:
        config, size = self.config, self.unet.config.sample_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        height, width = config.height or height, config.width or width
        if height is None or width is None:
            raise InputError("This UNet names no sample size; set height and width.")
        return (config.batch_size, self.unet.config.in_channels, height, width)

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "optimizer": self.optimizer.state_dict(),
            "lora_optimizer": self.lora_optimizer.state_dict(),
            "ema_updates": int(self.ema.n_averaged) if self.ema is not None else 0,
        }
        checkpoint.save_checkpoint(
            self.config.output / "checkpoints", self.step, self.unet,
            self._ema_unet, self.teacher.unet, self.scheduler, state, self.config.keep_checkpoints,
        )  # fmt: skip

    def _resume(self, folder: Path) -> None:
        state = checkpoint.load_checkpoint(folder, self.unet, self._ema_unet, self.teacher.unet)
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.lora_optimizer.load_state_dict(state["lora_optimizer"])
        if self.ema is not None:
            self.ema.n_averaged.fill_(state["ema_updates"])

    def _write_student(self) -> None:
        output = self.config.output
        with checkpoint.whole_folder(output / "unet") as written:
            (self._ema_unet or self.unet).save_pretrained(written)
        with checkpoint.whole_folder(output / "scheduler") as written:
            self.scheduler.save_pretrained(written)
        if self.config.save_pipeline:
            plain = UNet2DConditionModel.from_pretrained(output / "unet")
            pipeline = loading.load_pipeline_around(self.config.teacher, plain, self.scheduler)
            if pipeline is not None:
                with checkpoint.whole_folder(output / "pipeline") as written:
                    pipeline.save_pretrained(written)
