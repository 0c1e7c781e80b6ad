"""The two optimisers and the course of their learning rates."""

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from tiue.distill.config import DistillConfig
from tiue.errors import DependencyError


def build_optimizer(
    config: DistillConfig, parameters: list[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Make one of the two optimisers.

    Args:
        config: Names the optimiser, its betas and its weight decay.
        parameters: What it updates.
        learning_rate: Its rate.

    Returns:
        The optimiser.

    Raises:
        DependencyError: If bitsandbytes is asked for and not installed.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True)
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, weight_decay=decay, fused=True
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise DependencyError(
            "optimizer 'adamw8bit' needs bitsandbytes: pip install 'tiue[bitsandbytes]', or take "
            "'adamw'."
        ) from error
    return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=decay)


def build_rate_schedule(
    config: DistillConfig, optimizer: torch.optim.Optimizer, updates_per_step: int = 1
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the course of an optimiser's learning rate over the run.

    Args:
        config: Names the course and its warm-up, in student updates.
        optimizer: The optimiser.
        updates_per_step: Its updates to one of the student.

    Returns:
        The schedule, to be stepped once an update.
    """
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * updates_per_step,
        num_training_steps=config.steps * updates_per_step,
    )
