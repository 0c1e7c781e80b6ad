"""A distillation run: builds its parts, steps, keeps checkpoints and shows what happens."""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
)
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from tiue.distill import loading
from tiue.distill.checkpoint import Checkpoints, RunState, averaged_weights
from tiue.distill.config import DistillConfig
from tiue.distill.data import PromptOrder, SampleDraws
from tiue.distill.embeddings import StoredPrompts
from tiue.distill.files import append_line, whole_folder, write_file
from tiue.distill.guards import Guard, Signals
from tiue.distill.losses import timestep_weights
from tiue.distill.monitor import HISTORY, Monitor, check_trackers, describe
from tiue.distill.optimizers import build_optimizer, build_rate_schedule
from tiue.distill.output import claim_output, clear_leftovers, find_checkpoint
from tiue.distill.prompts import prompts_digest, read_prompts
from tiue.distill.settings import CONFIG, write_config
from tiue.distill.step import DistillStep, MicroBatch, Student, Trained
from tiue.distill.teacher import NoiseSchedule, Teacher
from tiue.distill.text import EncodedPrompts, TextEncoder, TextSource
from tiue.distill.validation import Validation
from tiue.errors import CheckpointError, InputError
from tiue.schedule import OnePassSchedule
from tiue.unet import TiUEUNet

logger = logging.getLogger(__name__)

SampleHook = Callable[[TiUEUNet, OnePassSchedule, int], None]
Report = Callable[[str], object]

_WEIGHT_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """One distillation run.

    Everything that a step draws comes from the seed and the samples' places in the run, so a
    resumed run draws what the uninterrupted one would have.

    Args:
        config: The run's settings.
        on_sample: Called as `on_sample(unet, schedule, step)` every `config.sample_every` steps
            with the student (its average, if one is kept) in evaluation mode, without a graph.
        report: Called with text that the user should read; the log is told when not given.

    Raises:
        CheckpointError: If the teacher, the student or the checkpoint cannot be loaded.
        DependencyError: If an optional package that the settings ask for is not installed.
        InputError: If the prompts or the settings cannot be used.
        OutputError: If the output folder cannot be.
    """

    def __init__(
        self,
        config: DistillConfig,
        on_sample: SampleHook | None = None,
        report: Report = logger.info,
    ) -> None:
        self.config, self.on_sample, self.report = config, on_sample, report
        self.accelerator = self._start_accelerator()
        self.stopped_by = 0
        self._lock = claim_output(config.output) if self.accelerator.is_main_process else None
        try:
            self._build()
        except BaseException:
            self._release()
            raise

    def _build(self) -> None:
        config, device = self.config, self.accelerator.device
        main = self.accelerator.is_main_process
        resume_from = find_checkpoint(config.output, config.resume or not main)
        if main:
            clear_leftovers(config.output)
        text, shown = self._load_text()
        self.text, self.order = text, PromptOrder(len(text.prompts), config.seed)
        self.accelerator.wait_for_everyone()

        self.scheduler = loading.load_student_scheduler(
            config.teacher, config.num_decoder_steps, config.timestep_spacing
        )
        self.schedule = OnePassSchedule.from_scheduler(self.scheduler, config.num_decoder_steps)
        noise_schedule = NoiseSchedule(self.scheduler).to(device)
        self._check_timesteps(noise_schedule)

        torch.manual_seed(config.seed)  # for the LoRA's first weights
        teacher_unet = loading.load_unet(config.teacher, _WEIGHT_TYPES[config.mixed_precision])
        self.teacher = Teacher(
            teacher_unet.to(device), noise_schedule, config.lora_rank, config.lora_alpha
        )
        self.unet = self._load_student()
        self.student = self._prepare(
            Student(self.unet, self.schedule), list(self.unet.parameters()), config.learning_rate
        )
        self.lora = self._prepare(
            teacher_unet, self.teacher.lora_parameters, config.lora_learning_rate,
            config.lora_updates,
        )  # fmt: skip
        self.teacher.trained = self.lora.network
        self.ema = None
        if config.ema_decay > 0:
            self.ema = EMAModel(self.student.parameters, decay=config.ema_decay, foreach=True)
        clip = None
        if config.clip_weight or config.clip_weight_end:
            clip = loading.load_clip_scorer(config.clip_model, config.clip_vae, device)

        self.latent_shape = self._latent_shape()
        self.validation = self._validation(shown)
        self.guard = Guard(config.divergence_factor, config.mixed_precision == "fp16")
        self.train_step = DistillStep(
            config, self.accelerator, self.student, self.lora, self.teacher, self.schedule,
            self.latent_shape, text.empty, self.guard, self.ema, clip,
        )  # fmt: skip
        per_step = config.batch_size * config.gradient_accumulation_steps
        self.state = RunState(
            samples_per_step=per_step * self.accelerator.num_processes,
            prompts_digest=prompts_digest(text.prompts),
            teacher_digest=self._teacher_digest(),
            allowed=config.allow_change,
        )
        self.checkpoints = Checkpoints(
            config.output / "checkpoints", config, self.accelerator, self.student, self.lora,
            self.ema, self.scheduler, self.state,
        )  # fmt: skip
        if resume_from is not None:
            self._resume(resume_from)
        if main:
            write_file(config.output / CONFIG, lambda path: write_config(config, path))
            self._note_start()

    @property
    def step(self) -> int:
        """Student updates done."""
        return self.state.step

    def train(self) -> Path:
        """Run to the last step, or until SIGINT or SIGTERM, and write the student.

        Returns:
            The output folder: `unet/` and `scheduler/` (the average, if one is kept), `pipeline/`
            where the teacher is a whole pipeline, `checkpoints/`, `samples/`, `config.yaml`,
            `log.jsonl` and `summary.json`. A run that a signal ended has no `unet/` yet.

        Raises:
            NonFiniteError: If a loss or gradient becomes NaN or infinite.
            DivergenceError: If a loss or gradient norm runs away.
            OutputError: If the output folder cannot be written.
        """
        try:
            if self.step < self.config.steps:
                self._run()
            else:
                self._tell(f"All {self.step} steps of this run are done; --steps makes more.")
            if not self.stopped_by:
                self._write_student()
            self.accelerator.wait_for_everyone()
        finally:
            self._release()
        return self.config.output

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _run(self) -> None:
        config = self.config
        self._say_what_kl_is()
        weights = timestep_weights(self.teacher.noise_schedule.sigma, config.weighting)
        monitor = Monitor(config, self.accelerator, self.step, weights)
        ended, saved = "failed", self.step
        try:
            with Signals() as signals:
                while self.step < config.steps and not self.stopped_by:
                    self._one_step(monitor)
                    asked = self._asked(signals)
                    due = asked or self._is_due(config.checkpoint_every)
                    if due and not self.guard.suspicious:
                        saved = self._save()
                # A run that a signal stopped inside a suspicious streak keeps the last good one.
                if saved < self.step and not (self.stopped_by and self.guard.suspicious):
                    saved = self._save()
                if self.step == config.steps:
                    self.stopped_by = 0  # the last step was the end anyway
            name = signal.Signals(self.stopped_by).name if self.stopped_by else ""
            ended = f"stopped by {name}" if name else "complete"
        finally:
            summary = monitor.close(self.step, ended)
        self._tell(describe(summary, config.output))
        if self.stopped_by:
            self._tell(f"Go on from step {saved} with --resume.")

    def _one_step(self, monitor: Monitor) -> None:
        config, started = self.config, time.perf_counter()
        rate = self.student.optimizer.param_groups[0]["lr"]
        result = self.train_step(self._batches(), self.step + 1)
        self.state.step += 1
        self.state.samples_seen += self.state.samples_per_step
        seconds = time.perf_counter() - started
        monitor.after_step(self.step, result, self.state.samples_per_step, seconds, rate)
        if self._is_due(config.sample_every) and (self.validation or self.on_sample):
            with averaged_weights(self.student, self.ema):
                self._sample(monitor)

    def _batches(self) -> list[MicroBatch]:
        """This process's micro-batches of the next update."""
        config, accelerator = self.config, self.accelerator
        batches = []
        for micro in range(config.gradient_accumulation_steps):
            place = micro * accelerator.num_processes + accelerator.process_index
            first = self.state.samples_seen + place * config.batch_size
            samples = range(first, first + config.batch_size)
            indices = self.order[samples]
            batches.append(
                MicroBatch(
                    prompts=[self.text.prompts[i] for i in indices.tolist()],
                    prompt_embeds=self.text[indices],
                    draws=SampleDraws(config.seed, samples, accelerator.device),
                )
            )
        return batches

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _asked(self, signals: Signals) -> bool:
        """Note what signals ask of any process, for all must do the same after the same step.

        Returns:
            Whether a checkpoint is asked for.
        """
        keep = signals.checkpoint
        if keep:
            signals.checkpoint = False
        asked = torch.tensor([signals.stop > 0, keep], device=self.accelerator.device).float()
        stop, keep = (self.accelerator.reduce(asked, "sum") > 0).tolist()
        if stop:
            self.stopped_by = signals.stop or signal.SIGTERM
        return keep

    def _sample(self, monitor: Monitor) -> None:
        self.unet.eval()
        if self.validation is not None:
            # Every process runs the student: it may be sharded.
            images = self.validation.draw(self.student.network, self.schedule)
            monitor.pictures(self.step, images, self.validation.prompts)
        if self.on_sample is not None and self.accelerator.is_main_process:
            with torch.no_grad():
                self.on_sample(self.unet, self.schedule, self.step)
        self.unet.train()

    def _save(self) -> int:
        if self.ema is not None:
            self.state.ema_steps = self.ema.optimization_step
        self.state.guard = self.guard.state_dict()
        self.checkpoints.save()
        return self.step

    def _resume(self, place: Path) -> None:
        saved, config = self.checkpoints.load(place), self.config
        for name, (before, now) in self.state.changed.items():
            self._tell(f"Changed as allowed: {name} was {before!r} and is {now!r}.")
        courses = [f"the rates ({config.lr_scheduler})"] * (
            config.lr_scheduler in ("linear", "cosine")
        )
        courses += ["the CLIP weight"] * (config.clip_weight != config.clip_weight_end)
        if courses and saved.steps != config.steps:
            self._tell(
                f"steps was {saved.steps} and is {config.steps}: {' and '.join(courses)} run over "
                f"all of them, so from step {self.step} on they follow another course. The "
                f"student's next rate is {self.student.optimizer.param_groups[0]['lr']:.3g}."
            )
        if self.ema is not None:
            self.ema.optimization_step = self.state.ema_steps
        self.guard.load_state_dict(self.state.guard)

    def _write_student(self) -> None:
        output, main = self.config.output, self.accelerator.is_main_process
        with whole_folder(output / "unet") if main else nullcontext(output) as written:
            self.checkpoints.write_student(written)
        if not main:
            return
        with whole_folder(output / "scheduler") as written:
            self.scheduler.save_pretrained(written)
        if self.config.save_pipeline:
            plain = UNet2DConditionModel.from_pretrained(output / "unet")
            pipeline = loading.load_pipeline_around(self.config.teacher, plain, self.scheduler)
            if pipeline is not None:
                with whole_folder(output / "pipeline") as written:
                    pipeline.save_pretrained(written)
        self.report(f"The student is in {output}.")

    def _teacher_digest(self) -> str:
        main = self.accelerator.is_main_process
        digest = [loading.teacher_digest(self.config.teacher) if main else ""]
        return broadcast_object_list(digest)[0]

    def _note_start(self) -> None:
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": self.step,
            "steps": self.config.steps,
            "processes": self.accelerator.num_processes,
            "changed": self.state.changed,
        }
        append_line(self.config.output / HISTORY, line)

    def _tell(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.report(text)

    def _start_accelerator(self) -> Accelerator:
        config = self.config
        check_trackers(config.trackers)
        if config.deterministic:
            # cuBLAS reads it at its first call.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps,
                adjust_scheduler=False,
                sync_with_dataloader=False,
            ),
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(str(config.output), str(config.output / "logs")),
            step_scheduler_with_optimizer=False,
        )
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and accelerator.num_processes == 1:
            raise InputError(
                f"{world} processes were started, and each would train alone: accelerate finds no "
                "GPU that they could share. Give --cpu (cpu: true) to train on CPUs, or start one."
            )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError(
                "DeepSpeed wraps one network, and student and LoRA teacher are two: choose FSDP2 "
                "(fsdp_version: 2) or plain data parallelism in `accelerate config`."
            )
        return accelerator

    def _load_text(self) -> tuple[TextSource, tuple[list[str], Tensor] | None]:
        """The prompts' embeddings, and the validation prompts with theirs where pictures are due.

        A text encoder that all is made of beforehand is let go of here.
        """
        config, device = self.config, self.accelerator.device
        encoder: TextEncoder | None = None
        text: TextSource
        if config.embeddings is not None:
            verify = config.verify_embeddings and self.accelerator.is_local_main_process
            text = StoredPrompts(config.embeddings, device, verify)
        else:
            assert config.prompts is not None
            prompts = read_prompts(config.prompts, config.prompt_column, self._tell)
            encoder = loading.load_text_encoder(config.teacher, device)
            text = EncodedPrompts(prompts, encoder, config.embedding_cache_mib << 20)
        if not config.sample_every:
            return text, None
        shown = list(config.validation_prompts) or text.prompts[:4]
        if set(shown) <= set(text.prompts):
            return text, (shown, text[torch.tensor([text.prompts.index(p) for p in shown])])
        encoder = encoder or loading.load_text_encoder(config.teacher, device)
        return text, (shown, encoder(shown))

    def _validation(self, shown: tuple[list[str], Tensor] | None) -> Validation | None:
        if shown is None:
            return None
        vae = loading.load_vae(self.config.teacher, self.accelerator.device)
        if vae is None:
            logger.warning("The teacher '%s' has no VAE: no pictures.", self.config.teacher)
            return None
        main = self.accelerator.is_main_process
        return Validation(*shown, self.latent_shape, vae if main else None, self.config.seed)

    def _load_student(self) -> TiUEUNet:
        config = self.config
        unet = loading.load_unet(config.student or config.teacher).train()
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            own, taught = unet.config[name], self.teacher.unet.config[name]
            if own != taught:
                raise CheckpointError(
                    f"The student's {name} is {own} and the teacher's {taught}: they must share "
                    "latents and text encoder. Start from a UNet of the teacher's kind."
                )
        unet.recompute_feed_forward = config.recompute_feed_forward
        if config.gradient_checkpointing != "none":
            unet.enable_gradient_checkpointing()
        if config.gradient_checkpointing == "encoder":
            for module in unet.up_blocks.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
        return unet

    def _prepare(
        self,
        network: nn.Module,
        parameters: list[nn.Parameter],
        learning_rate: float,
        updates_per_step: int = 1,
    ) -> Trained:
        """Give a network its optimiser, and both to accelerate; one network a call, for FSDP2."""
        optimizer = build_optimizer(self.config, parameters, learning_rate)
        rates = build_rate_schedule(self.config, optimizer, updates_per_step)
        network, optimizer, rates = self.accelerator.prepare(network, optimizer, rates)
        # Sharding puts others in the place of the parameters that were given.
        trained = [p for p in network.parameters() if p.requires_grad]
        return Trained(network, trained, optimizer, rates)

    def _latent_shape(self) -> tuple[int, int, int]:
        config, size = self.config, self.unet.config.sample_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        height, width = config.height or height, config.width or width
        if height is None or width is None:
            raise InputError("This UNet names no sample size; set height and width.")
        return (self.unet.config.in_channels, height, width)

    def _check_timesteps(self, noise_schedule: NoiseSchedule) -> None:
        config = self.config
        if config.max_timestep >= len(noise_schedule):
            raise InputError(
                f"max_timestep is {config.max_timestep}, and the teacher's timesteps end at "
                f"{len(noise_schedule) - 1}."
            )
        if config.kl_weight > 0 and noise_schedule.prediction_type != "epsilon":
            logger.warning(
                "The KL term takes the UNet's outputs for noise, and this teacher's are of type "
                "'%s': set kl_weight to 0 unless they are normal too.",
                noise_schedule.prediction_type,
            )

    def _say_what_kl_is(self) -> None:
        config = self.config
        maps = config.num_decoder_steps * self.state.samples_per_step
        strength = config.kl_weight * (maps if config.kl_reduction == "sum" else 1)
        self._tell(
            f"KL: {config.kl_weight:g} x the {config.kl_reduction} over the {maps} noise maps of "
            f"an update, that is {strength:g} x their mean (published: 3.2 x)."
        )
