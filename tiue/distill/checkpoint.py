"""What a run leaves to go on from: folders that appear once they are complete and on disk.

`checkpoints/step-<n>/` holds `unet/`, `unet_ema/` (of a transformer `transformer/` and
`transformer_ema/`) and `scheduler/` (diffusers), `lora/` (PEFT), of a student that is a LoRA
`student_lora/` too, of a run with a GAN loss `critic.safetensors`,
`config.yaml`, and what accelerate's `save_state`
writes: both optimisers, both rate schedules, the random state of every process, and `RunState`.
Sharded optimisers are in `optimizers/`, as torch.distributed.checkpoint writes them.
"""

import logging
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from diffusers.training_utils import EMAModel
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from tiue.distill.adversary import HEAD, critic_parameters
from tiue.distill.config import DistillConfig
from tiue.distill.networks import family_of
from tiue.distill.output import list_checkpoints
from tiue.distill.settings import CONFIG, changed_fields, load_config, write_config
from tiue.distill.sharding import (
    is_sharded,
    load_optimizers,
    put,
    save_optimizers,
    whole,
    whole_state,
)
from tiue.distill.step import Trained, averaged_from
from tiue.distill.student import merged_state
from tiue.errors import CheckpointError, TiUEError
from tiue.files import WRITE_ERRORS, cannot_write, sync_folder, sync_tree
from tiue_kernels import configs

logger = logging.getLogger(__name__)

_NAME = "step-{:08d}"
_LORA_FILE = "adapter_model.safetensors"
_CRITIC_FILE = "critic.safetensors"
_LORA_PREFIX = "base_model.model."  # where `PeftModel` keeps the model that it wraps
_STUDENT_PREFIX = "unet."  # where `Student` keeps its UNet
_UNREADABLE = (
    OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Student updates done.
        samples_seen: Samples of all processes so far: the place in the order of prompts.
        samples_per_step: Samples of an update, over all processes and micro-batches.
        prompts_digest: Tells the prompts from others.
        teacher_digest: Tells the teacher from others, wherever its files lie.
        pictures_digest: Tells the GAN loss's pictures from others.
        ema_steps: Updates of the moving average.
        guard: Running means of what is watched.
        kernel_configs: Launch configurations of the kernels, by device: another one sums in
            another order.
        allowed: Settings that may be others than a checkpoint's; of this start alone.
        changed: What they were and are; of this start alone.
    """

    samples_per_step: int
    prompts_digest: str
    teacher_digest: str = ""
    pictures_digest: str = ""
    step: int = 0
    samples_seen: int = 0
    ema_steps: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    kernel_configs: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    changed: dict[str, list[Any]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """What outlasts this start, by name."""
        self.kernel_configs = configs.in_use()
        return {k: v for k, v in asdict(self).items() if k not in ("allowed", "changed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: If it is of another teacher, other prompts or another batch, and that
                is not allowed.
        """
        samples, now = state["samples_per_step"], self.samples_per_step
        compared = {
            "prompts_digest": (
                ("prompts", "embeddings"),
                "the prompts are not those that the run was started with; give the same file",
            ),
            "teacher_digest": (
                ("teacher",),
                "the teacher is not the one that the run was started with; give the same weights",
            ),
            "pictures_digest": (
                ("gan_pictures", "gan_weight"),
                "the pictures are not those that the run was started with; give the same ones",
            ),
            "samples_per_step": (
                ("batch_size", "gradient_accumulation_steps"),
                f"its updates had {samples} samples, and now they have {now}: batch_size x "
                "gradient_accumulation_steps x processes must stay the same",
            ),
        }
        state = dict(state)
        for name, (settings, reason) in compared.items():
            before, own = state.pop(name, ""), getattr(self, name)
            if before in (own, ""):
                continue
            if not set(settings) & set(self.allowed):
                raise CheckpointError(f"{reason}, or --allow-change {settings[0]}")
            self.changed[name] = [before, own]
        vars(self).update(state)
        # So that the run goes on bit for bit, whatever was tuned since.
        for device in configs.use(self.kernel_configs):
            logger.info("Kernels on %s are launched as the checkpoint's were.", device)


class Checkpoints:
    """Writes and reads the checkpoints of one run, on all processes together.

    Args:
        folder: Folder of all checkpoints; on several machines a shared one.
        config: The run's settings.
        accelerator: Has prepared student and LoRA teacher, in this order.
        student: The student.
        lora: The LoRA teacher; a UNet with the adapter.
        ema: The student's moving average, if one is kept.
        scheduler: The student's scheduler.
        state: Where the run stands; read and written with each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: DistillConfig,
        accelerator: Accelerator,
        student: Trained,
        lora: Trained,
        ema: EMAModel | None,
        scheduler: SchedulerMixin,
        state: RunState,
    ) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.student, self.lora, self.ema = student, lora, ema
        self.scheduler, self.state = scheduler, state
        self._trained = {"student": student, "lora": lora}
        self._sharded = is_sharded(student.network)
        self._component = family_of(accelerator.unwrap_model(student.network).unet).component
        accelerator.register_for_checkpointing(state)
        accelerator.register_save_state_pre_hook(self._write_models)
        accelerator.register_load_state_pre_hook(self._read_models)

    def save(self) -> Path:
        """Write a checkpoint of the step that the state names, and drop the oldest ones.

        Returns:
            Its folder.

        Raises:
            OutputError: If it cannot be written; those before it stay.
            CheckpointError: If a weight is not finite; nothing is written.
        """
        place = self.folder / _NAME.format(self.state.step)
        partial = self.folder / f".{place.name}.partial"
        self._require_finite_weights()
        main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        try:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            wait()
            self.accelerator.save_state(str(partial))
            wait()
            if main:
                self.scheduler.save_pretrained(partial / "scheduler")
                write_config(self.config, partial / CONFIG)
                sync_tree(partial)
                if place.exists():  # the same step of this run, written before
                    shutil.rmtree(place)
                partial.rename(place)
                sync_folder(self.folder)
                for outdated in list_checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                    shutil.rmtree(outdated, ignore_errors=True)
        except WRITE_ERRORS as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise cannot_write(place, error) from error
        wait()
        return place

    def load(self, place: Path) -> DistillConfig:
        """Read a checkpoint back into everything that is prepared; rates stay as they are set now.

        Args:
            place: A folder that `save` returned.

        Returns:
            The settings that it was written under.

        Raises:
            CheckpointError: If it is damaged, or of a run with other settings.
        """
        try:
            saved = load_config(place / CONFIG)
        except TiUEError as error:
            raise self._unreadable(place, error) from error
        changed = changed_fields(self.config, saved)
        refused = [name for name in changed if name not in self.config.allow_change]
        if refused:
            values = "; ".join(
                f"{n} was {changed[n][0]!r} and is {changed[n][1]!r}" for n in refused
            )
            raise CheckpointError(
                f"'{place}' is of a run with other settings: {values}. They decide what the "
                f"weights become: give those of '{place / CONFIG}', go on with others by "
                f"--allow-change {refused[0]}, or start anew with --student "
                f"{place / self._component}."
            )
        self.state.changed = dict(changed)
        given = [_settings_of(trained) for trained in (self.student, self.lora)]
        scaler = self.accelerator.scaler
        if not (place / "scaler.pt").exists():
            self.accelerator.scaler = None  # float16 was not on before
        try:
            self.accelerator.load_state(str(place))
        except TiUEError as error:
            raise CheckpointError(f"Cannot resume from '{place}': {error}.") from error
        except _UNREADABLE as error:
            raise self._unreadable(place, error) from error
        finally:
            self.accelerator.scaler = scaler
        for trained, settings in zip((self.student, self.lora), given, strict=True):
            _put_settings(trained, settings)
        return saved

    def write_student(self, folder: Path, averaged: bool = True) -> None:
        """Write the student as a UNet's or transformer's folder; every process must ask.

        Args:
            folder: The folder; made if missing.
            averaged: Of the moving average's weights, where one is kept.
        """
        network = self.accelerator.unwrap_model(self.student.network)
        # Written inside: the state of a network that is not sharded is its parameters, no copies.
        with averaged_weights(self.student, self.ema if averaged else None):
            if self.config.student_lora_rank:
                weights = merged_state(network.unet) if self.accelerator.is_main_process else {}
            else:
                weights = whole_state(network, self._sharded)
            if self.accelerator.is_main_process:
                weights = {name.removeprefix(_STUDENT_PREFIX): w for name, w in weights.items()}
                write_unet(network.unet, weights, folder)

    def write_student_lora(self, folder: Path, averaged: bool = True) -> None:
        """Write the student's LoRA in PEFT's format; every process must ask.

        Args:
            folder: The folder; made if missing.
            averaged: Of the moving average's weights, where one is kept.
        """
        unet = self.accelerator.unwrap_model(self.student.network).unet
        with averaged_weights(self.student, self.ema if averaged else None):
            self._write_lora(unet, folder)

    def _unreadable(self, place: Path, error: Exception) -> CheckpointError:
        if self.state.changed:
            cure = f"Does it fit the changed {', '.join(self.state.changed)}?"
        else:
            older = [found for found in list_checkpoints(self.folder) if found.name < place.name]
            cure = (
                f"Delete this folder to go on from {older[-1].name}."
                if older
                else "There is no older one: start anew in another folder."
            )
        return CheckpointError(f"Cannot resume from '{place}' ({error}). {cure}")

    def _write_models(self, _models: list[Any], weights: list[Any], output: str) -> None:
        weights.clear()  # else accelerate would write them a second time
        folder, lora_unet = Path(output), self.accelerator.unwrap_model(self.lora.network)
        self.write_student(folder / self._component, averaged=False)
        if self.ema is not None:
            self.write_student(folder / f"{self._component}_ema")
        if self.config.student_lora_rank:
            self.write_student_lora(folder / "student_lora", averaged=False)
            if self.ema is not None:
                self.write_student_lora(folder / "student_lora_ema")
        self._write_lora(lora_unet, folder / "lora")
        self._write_critic(lora_unet, folder / _CRITIC_FILE)
        if self._sharded:
            save_optimizers(self._trained, folder)

    def _write_lora(self, unet: Any, folder: Path) -> None:
        lora = {name: whole(p) for name, p in _lora_parameters(unet).items()}
        lora = get_peft_model_state_dict(unet, state_dict=lora)
        if self.accelerator.is_main_process:
            unet.peft_config["default"].save_pretrained(folder)
            save_file(
                {_LORA_PREFIX + name: weight.contiguous() for name, weight in lora.items()},
                folder / _LORA_FILE,
                metadata={"format": "pt"},
            )

    def _write_critic(self, unet: Any, path: Path) -> None:
        weights = {name: whole(p).contiguous() for name, p in critic_parameters(unet).items()}
        if weights and self.accelerator.is_main_process:
            save_file(weights, path, metadata={"format": "pt"})

    def _read_student(self, folder: Path, average: bool) -> None:
        unet, ending = self.accelerator.unwrap_model(self.student.network).unet, "_ema" * average
        if self.config.student_lora_rank:
            _read_lora(unet, folder / f"student_lora{ending}")
        else:
            _set_weights(unet, _read_network(unet, folder / f"{self._component}{ending}"))

    def _read_models(self, models: list[Any], source: str) -> None:
        folder, unwrap = Path(source), self.accelerator.unwrap_model
        lora_unet = unwrap(self.lora.network)
        models.clear()  # else accelerate would look for its own files of them
        self._read_student(folder, average=False)
        _read_lora(lora_unet, folder / "lora")
        _read_critic(lora_unet, folder / _CRITIC_FILE)
        if self._sharded:
            load_optimizers(self._trained, folder)
        if self.ema is not None:
            self.ema.store(self.student.local)
            self._read_student(folder, average=True)
            average = averaged_from(self.student, self.config.ema_on_cpu)
            self.ema.shadow_params = [p.detach().clone() for p in average]
            self.ema.restore(self.student.local)

    @torch.no_grad()
    def _require_finite_weights(self) -> None:
        for trained in (self.student, self.lora):
            total = torch.stack([p.abs().max().float() for p in trained.local if p.numel()]).sum()
            # On all processes together, or some would wait for one that has stopped.
            if not self.accelerator.reduce(total, "sum").isfinite():
                raise CheckpointError(
                    f"After step {self.state.step} a weight is not finite, so no checkpoint is "
                    "written of it. Go on from the last one with --resume and lower rates."
                )


@contextmanager
def averaged_weights(trained: Trained, ema: EMAModel | None) -> Iterator[None]:
    """Put the moving average in the place of the student's weights inside the context."""
    if ema is None:
        yield
        return
    ema.store(trained.local)
    ema.copy_to(trained.local)
    try:
        yield
    finally:
        ema.restore(trained.local)


def write_unet(unet: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write a network's folder as `save_pretrained` does, of weights that may come from elsewhere.

    Args:
        unet: Gives the configuration.
        state: The weights.
        folder: The folder; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unet.save_config(folder)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")


def _settings_of(trained: Trained) -> tuple[list[Any], list[dict[str, Any]]]:
    """Rates and the optimiser's other settings as they are given for this start."""
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in trained.optimizer.param_groups
    ]
    return list(trained.schedule.base_lrs), groups


def _put_settings(trained: Trained, settings: tuple[list[Any], list[dict[str, Any]]]) -> None:
    """Put them in the place of the checkpoint's, at the place in their course that was reached."""
    schedule, (rates, groups) = trained.schedule, settings
    schedule.base_lrs = rates
    schedule._last_lr = [
        rate * factor(schedule.last_epoch)
        for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)
    ]
    for group, given, rate in zip(
        trained.optimizer.param_groups, groups, schedule._last_lr, strict=True
    ):
        group.update(given, lr=rate)


def _read_network(own: Any, folder: Path) -> dict[str, Tensor]:
    network = family_of(own).plain.from_pretrained(folder, use_safetensors=True)
    return network.state_dict()


def _set_weights(unet: Any, state: dict[str, Tensor]) -> None:
    # Copies into the shards of a sharded model, and into the parameters of any other.
    set_model_state_dict(unet, dict(state), options=StateDictOptions(full_state_dict=True))


def _read_lora(unet: Any, folder: Path) -> None:
    saved = load_file(folder / _LORA_FILE)
    weights = {name.removeprefix(_LORA_PREFIX): weight for name, weight in saved.items()}
    # PEFT keeps an adapter's name inside the parameters' names, and leaves it out of files.
    own = {n.replace(".default", ""): p for n, p in _lora_parameters(unet).items()}
    if weights.keys() != own.keys():
        raise KeyError("the LoRA is of another model")
    for name, parameter in own.items():
        put(parameter, weights[name])


def _read_critic(unet: Any, path: Path) -> None:
    own = critic_parameters(unet)
    weights = load_file(path) if own else {}
    if weights.keys() != own.keys():
        raise KeyError("the critic is of another model")
    for name, parameter in own.items():
        put(parameter, weights[name])


def _lora_parameters(unet: Any) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in unet.named_parameters()
        if parameter.requires_grad and not name.startswith(f"{HEAD}.")
    }
