"""What the training stages share: the loop, the rate, per-step randomness, whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed
from tqdm import tqdm

from tiue.errors import CheckpointError, OutputError
from tiue.files import write_file, write_json

CHECKPOINT = "checkpoint.pt"


class Training(Protocol):
    """What `run` drives: one update a call, and a state that holds all that updates change."""

    def step(self, step: int) -> float:
        """Takes update number `step`; returns its loss."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, besides its number."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Seeds all randomness of a step from its number, so that resuming needs no saved state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def cosine_rate(step: int, steps: int, warmup_steps: int, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decaying_rate(step: int, steps: int, warmup_steps: int, decay_share: float) -> float:
    """Factor on the learning rate: warm-up, then 1, then down to 0 over the last `decay_share`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return min(1.0, (steps - step) / max(1.0, decay_share * steps))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def join_processes() -> None:
    """Joins the other processes of the stage, where torchrun started several."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")


def process() -> tuple[int, int]:
    """The number of this process and how many there are (1 outside of torchrun)."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Gives every process the mean of all processes' gradients, in one transfer."""
    _, count = process()
    if count > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = (flat / count).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def run(
    training: Training,
    folder: Path,
    steps: int,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
    save_every: int = 250,
    first: int = 0,
    seconds: float = 0.0,
) -> None:
    """Runs a stage to its last step, with checkpoints on the way, written by the first process.

    Args:
        training: the stage.
        folder: receives `checkpoint.pt`, and `training.json` (steps, seconds, threads) in the end.
        steps: updates in all, those before a resumption included.
        resume: go on from the folder's checkpoint, if there is one.
        on_step: called with the number of updates done, after each.
        save_every: updates from one checkpoint to the next.
        first: updates that the stage's weights have had already, where there is no checkpoint.
        seconds: that those took.

    Raises:
        CheckpointError: if the checkpoint is of another model or configuration.
        OutputError: if the folder cannot be written.
    """
    checkpoint = folder / CHECKPOINT
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        try:
            training.load_state_dict(state["training"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint} is of another configuration: train anew, without --resume"
            ) from error
        first, seconds = state["step"], state["seconds"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error

    begin = time.monotonic() - seconds
    rank, processes = process()
    progress = tqdm(
        range(first, steps), initial=first, total=steps, mininterval=10, disable=rank > 0
    )
    average = None
    for step in progress:
        loss = training.step(step)
        average = loss if average is None else 0.98 * average + 0.02 * loss
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if rank > 0:
            continue
        done = step + 1
        seconds = time.monotonic() - begin
        if done % save_every == 0 or done == steps:
            state = {"training": training.state_dict(), "step": done, "seconds": seconds}
            write_file(checkpoint, partial(torch.save, state))
        if on_step is not None:
            on_step(done)
    if rank > 0:
        return
    facts = {
        "steps": steps,
        "seconds": round(seconds),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(folder / "training.json", facts)
