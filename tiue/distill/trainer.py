"""A distillation run: builds its parts, steps, keeps checkpoints and shows what happens."""

import logging
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tiue.distill import loading
from tiue.distill.adversary import Adversary, add_critic
from tiue.distill.checkpoint import Checkpoints, RunState, averaged_weights
from tiue.distill.config import DistillConfig
from tiue.distill.data import PromptOrder, SampleDraws
from tiue.distill.export import push_student
from tiue.distill.guards import Guard, Signals
from tiue.distill.losses import timestep_weights
from tiue.distill.monitor import HISTORY, Monitor, describe
from tiue.distill.networks import family_of
from tiue.distill.optimizers import build_optimizer, build_rate_schedule
from tiue.distill.output import claim_output, clear_leftovers, find_checkpoint
from tiue.distill.parts import (
    WEIGHT_TYPES,
    check_text,
    compile_network,
    find_latent_shape,
    load_student,
    load_text,
    load_validation,
    start_accelerator,
)
from tiue.distill.pictures import load_pictures
from tiue.distill.prompts import prompts_digest
from tiue.distill.settings import CONFIG, write_config
from tiue.distill.sharding import accelerate_asks_for_it, shard
from tiue.distill.step import DistillStep, MicroBatch, Student, Trained, averaged_from
from tiue.distill.teacher import NoiseSchedule, Teacher, noise_schedule_of
from tiue.distill.text import Text
from tiue.errors import InputError
from tiue.files import append_line, whole_folder, write_file
from tiue.schedule import OnePassSchedule

logger = logging.getLogger(__name__)

SampleHook = Callable[[Any, OnePassSchedule, int], None]
Report = Callable[[str], object]


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
        if accelerate_asks_for_it():
            config = replace(config, sharding="full")
        self.config, self.on_sample, self.report = config, on_sample, report
        self.accelerator = start_accelerator(config)
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
        text, shown = load_text(config, self.accelerator, self._tell)
        self.text, self.order = text, PromptOrder(len(text.prompts), config.seed)
        self.accelerator.wait_for_everyone()

        self.scheduler = loading.load_student_scheduler(
            config.teacher, config.num_decoder_steps, config.timestep_spacing
        )
        self.schedule = OnePassSchedule.from_scheduler(self.scheduler, config.num_decoder_steps)
        noise_schedule = noise_schedule_of(self.scheduler).to(device)
        self._check_timesteps(noise_schedule)

        torch.manual_seed(config.seed)  # for the LoRA's first weights
        teacher_unet = loading.load_network(config.teacher, WEIGHT_TYPES[config.mixed_precision])
        check_text(text.empty, teacher_unet)
        self.teacher = Teacher(
            teacher_unet.to(device), noise_schedule, config.lora_rank, config.lora_alpha
        )
        self.unet = load_student(config, teacher_unet)
        if config.gan_weight:
            add_critic(teacher_unet, device)
        # The student takes its up blocks apart, so they are never called: one piece.
        self.student = self._prepare(Student(self.unet, self.schedule), [], config.learning_rate)
        blocks = family_of(teacher_unet).blocks(teacher_unet)
        self.lora = self._prepare(
            teacher_unet, blocks, config.lora_learning_rate, config.lora_updates
        )
        self.teacher.trained, self.teacher.lora_parameters = (
            self.lora.network, self.lora.parameters,
        )  # fmt: skip
        self.ema = None
        if config.ema_decay > 0:
            self.ema = EMAModel(
                averaged_from(self.student, config.ema_on_cpu), decay=config.ema_decay, foreach=True
            )
        clip = None
        if config.clip_weight or config.clip_weight_end:
            clip = loading.load_clip_scorer(config.clip_model, config.clip_vae, device)

        self.latent_shape = find_latent_shape(config, self.unet)
        pixels = [loading.pixels_a_latent(config.teacher) * side for side in self.latent_shape[1:]]
        self.size = (*pixels, 0, 0, *pixels)
        adversary = self._build_adversary(text.empty, pixels) if config.gan_weight else None
        if shown is not None:
            shown = (shown[0], shown[1]._replace(size=self.size))
        self._evaluator: Any = None
        if config.evaluate_every:
            from tiue.distill.evaluating import Evaluator  # needs the extra `eval`

            self._evaluator = Evaluator(config, self.accelerator, self.unet, self.scheduler)
        self.validation = load_validation(config, self.accelerator, shown, self.latent_shape)
        self.guard = Guard(config.divergence_factor, config.mixed_precision == "fp16")
        self.train_step = DistillStep(
            config, self.accelerator, self.student, self.lora, self.teacher, self.schedule,
            self.latent_shape, text.empty, self.guard, self.ema, clip, adversary,
        )  # fmt: skip
        per_step = config.batch_size * config.gradient_accumulation_steps
        self.state = RunState(
            samples_per_step=per_step * self.accelerator.num_processes,
            prompts_digest=prompts_digest(text.prompts),
            teacher_digest=self._teacher_digest(),
            pictures_digest=adversary.pictures.digest if adversary else "",
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

    def _build_adversary(self, empty: Text, pixels: list[int]) -> Adversary:
        config, device = self.config, self.accelerator.device
        assert config.gan_pictures is not None
        pictures = load_pictures(
            config.gan_pictures, self.latent_shape, (pixels[0], pixels[1]),
            partial(loading.load_vae, config.teacher, device), device,
        )  # fmt: skip
        self._tell(f"GAN: {len(pictures)} real pictures of '{config.gan_pictures}'.")
        empty = empty._replace(size=self.size)
        return Adversary(self.accelerator, self.teacher, empty, pictures, self.latent_shape)

    @property
    def step(self) -> int:
        """Student updates done."""
        return self.state.step

    def train(self) -> Path:
        """Run to the last step, or until SIGINT or SIGTERM, and write the student.

        Returns:
            The output folder: `unet/` or `transformer/` (the average, if one is kept),
            `scheduler/`, `pipeline/` where the teacher is a whole pipeline, `checkpoints/`,
            `samples/`, `config.yaml`, `log.jsonl` and `summary.json`. A run that a signal ended
            has no student's folder yet.

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
        looks = self._is_due(config.sample_every) and (self.validation or self.on_sample)
        measures = self._is_due(config.evaluate_every)
        if looks or measures:
            with averaged_weights(self.student, self.ema):
                self.unet.eval()
                if looks:
                    self._sample(monitor)
                if measures:
                    self._evaluate()
                self.unet.train()

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
                    text=self.text[indices]._replace(size=self.size),
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
        if self.validation is not None:
            # Every process runs the student: it may be sharded.
            images = self.validation.draw(self.student.network, self.schedule)
            monitor.pictures(self.step, images, self.validation.prompts)
        network = self.student.network
        if self.on_sample is not None:
            if isinstance(network, FSDPModule):
                network.unshard()  # on all processes, for the one that looks
            if self.accelerator.is_main_process:
                with torch.no_grad():
                    self.on_sample(self.unet, self.schedule, self.step)
            if isinstance(network, FSDPModule):
                network.reshard()

    def _evaluate(self) -> None:
        figure = self._evaluator.measure(self.step)
        best = self._evaluator.keep_best(self.step, figure, self.checkpoints, self.scheduler)
        name = self.config.evaluate_metric
        self._tell(
            f"Step {self.step}: {name} {figure:.4g}" + (", the best so far." if best else ".")
        )

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
        family = family_of(self.unet)
        with whole_folder(output / family.component) if main else nullcontext(output) as written:
            self.checkpoints.write_student(written)
        if self.config.student_lora_rank:
            with whole_folder(output / "lora") if main else nullcontext(output) as written:
                self.checkpoints.write_student_lora(written)
        if not main:
            return
        with whole_folder(output / "scheduler") as written:
            self.scheduler.save_pretrained(written)
        if self.config.save_pipeline:
            plain = family.plain.from_pretrained(output / family.component)
            pipeline = loading.load_pipeline_around(self.config.teacher, plain, self.scheduler)
            if pipeline is not None:
                with whole_folder(output / "pipeline") as written:
                    pipeline.save_pretrained(written)
        self.report(f"The student is in {output}.")
        if self.config.push_to_hub:
            push_student(output, self.config.push_to_hub)
            self.report(f"It is on the hub as {self.config.push_to_hub}.")

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

    def _prepare(
        self,
        network: nn.Module,
        blocks: list[nn.Module],
        learning_rate: float,
        updates_per_step: int = 1,
    ) -> Trained:
        """Spread a network over the processes, and give it its optimiser."""
        accelerator, sharded = self.accelerator, self.config.sharding == "full"
        if self.config.compile != "no":
            compile_network(network, self.config.compile)
        if sharded:
            network = shard(network.to(accelerator.device), blocks, accelerator)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.config, parameters, learning_rate)
        rates = build_rate_schedule(self.config, optimizer, updates_per_step)
        if sharded:
            accelerator.register_for_checkpointing(rates)
        else:
            network, optimizer, rates = accelerator.prepare(network, optimizer, rates)
        return Trained(network, parameters, optimizer, rates)

    def _check_timesteps(self, noise_schedule: NoiseSchedule) -> None:
        config = self.config
        if config.max_timestep >= len(noise_schedule):
            raise InputError(
                f"max_timestep is {config.max_timestep}, and the teacher's timesteps end at "
                f"{len(noise_schedule) - 1}."
            )
        if config.kl_weight > 0 and noise_schedule.prediction_type != "epsilon":
            logger.warning(
                "The KL term takes the student's outputs for noise, and this teacher's are of type "
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
