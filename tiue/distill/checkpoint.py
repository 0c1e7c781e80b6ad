"""What a run leaves on disk: folders that diffusers loads, each written whole or not at all."""

import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tiue.errors import CheckpointError, OutputError

_NAME = "step-{:08d}"
_LORA_FILE = "adapter_model.safetensors"
_LORA_PREFIX = "base_model.model."  # where `PeftModel` keeps the model that it wraps
_STATE_FILE = "state.pt"
_UNREADABLE = (
    OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder beside its place and rename it into place once it is complete.

    Args:
        folder: The folder's place; one that is already there is replaced.

    Yields:
        The temporary folder to write into.

    Raises:
        OutputError: If it cannot be written; nothing is left behind then.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A name that no reader takes for a finished folder, on the same file system.
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        written = temporary / "written"
        written.mkdir()
        yield written
        if folder.exists():
            folder.rename(temporary / "replaced")
        written.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of the three
        raise OutputError(
            f"Cannot write '{folder}' ({error}). Choose a folder that can be written and has room."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(
    checkpoints: Path,
    step: int,
    unet: UNet2DConditionModel,
    ema_unet: UNet2DConditionModel | None,
    lora_unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write everything that a run needs to go on, and drop the oldest checkpoints.

    Args:
        checkpoints: Folder of all checkpoints.
        step: Student updates done.
        unet: The student, to `unet/`.
        ema_unet: Its moving average, to `unet_ema/`.
        lora_unet: The teacher with its adapter; the adapter goes to `lora/`, for
            `peft.PeftModel.from_pretrained(unet, folder)`.
        scheduler: The student's scheduler, to `scheduler/`.
        state: Optimisers and counters: tensors, numbers and containers of them.
        keep: Checkpoints to keep, this one among them.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: If it cannot be written.
    """
    folder = checkpoints / _NAME.format(step)
    with whole_folder(folder) as written:
        unet.save_pretrained(written / "unet")
        if ema_unet is not None:
            ema_unet.save_pretrained(written / "unet_ema")
        _save_lora(lora_unet, written / "lora")
        scheduler.save_pretrained(written / "scheduler")
        torch.save(state, written / _STATE_FILE)
    for outdated in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(outdated, ignore_errors=True)
    return folder


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))


def load_checkpoint(
    folder: Path,
    unet: UNet2DConditionModel,
    ema_unet: UNet2DConditionModel | None,
    lora_unet: UNet2DConditionModel,
) -> dict[str, Any]:
    """Read a checkpoint back into models that are already built.

    Args:
        folder: What `save_checkpoint` returned.
        unet: The student.
        ema_unet: Its moving average; where the checkpoint has none, it starts from the student.
        lora_unet: The teacher with its adapter.

    Returns:
        The state that was saved.

    Raises:
        CheckpointError: If a file is missing, damaged or of another model.
    """
    try:
        _load_unet(unet, folder / "unet")
        if ema_unet is not None:
            with_average = (folder / "unet_ema").is_dir()
            _load_unet(ema_unet, folder / ("unet_ema" if with_average else "unet"))
        _load_lora(lora_unet, folder / "lora")
        # weights_only: nothing in this file can be run.
        return torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"Cannot resume from '{folder}' ({error}). Delete this folder to go on from an older "
            "checkpoint, and give the settings that the run was started with."
        ) from error


def _load_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    saved = type(unet).from_pretrained(folder, use_safetensors=True, torch_dtype=unet.dtype)
    unet.load_state_dict(saved.state_dict())


def append_log(path: Path, figures: dict[str, float]) -> None:
    """Append figures to a file as one line of JSON.

    Args:
        path: The file.
        figures: Names and values.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(figures) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write '{path}' ({error}).") from error


def _save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.peft_config["default"].save_pretrained(folder)
    weights = get_peft_model_state_dict(unet)
    save_file(
        {_LORA_PREFIX + name: weight.contiguous() for name, weight in weights.items()},
        folder / _LORA_FILE,
        metadata={"format": "pt"},
    )


def _load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    saved = load_file(folder / _LORA_FILE)
    weights = {name.removeprefix(_LORA_PREFIX): weight for name, weight in saved.items()}
    if weights.keys() != get_peft_model_state_dict(unet).keys():
        raise KeyError("the LoRA is of another model")
    set_peft_model_state_dict(unet, weights)


def prepare_output(output: Path, resume: bool) -> Path | None:
    """Make the output folder and find the checkpoint to go on from.

    Args:
        output: The run's output folder.
        resume: Whether to go on from the newest checkpoint.

    Returns:
        The newest checkpoint, or None for a fresh start.

    Raises:
        OutputError: If the folder cannot be written, or holds another run that `resume` does not
            ask to continue.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to '{output}' ({error}). Choose another folder."
        ) from error
    found = list_checkpoints(output / "checkpoints")
    if found and not resume:
        raise OutputError(
            f"'{output}' already holds a run ({found[-1].name}). Go on with --resume, or choose "
            "another folder."
        )
    return found[-1] if found else None
