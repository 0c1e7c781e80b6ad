"""K scheduler steps as the one step of a scheduler that diffusers pipelines know how to drive."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from tiue.errors import SchedulerError
from tiue.schedule import OnePassSchedule, begun_at

_log = logging.getLogger(__name__)


class NoStepsError(SchedulerError, AttributeError):
    """A pipeline that reads of its scheduler what the one pass does not have."""


class OnePassScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of one timestep, whose step is S z + noise.

    Its model is a `TiUEUNet` that is called with `schedule`. Made for one call of a pipeline; its
    configuration is that of the scheduler it was made of.

    Args:
        scheduler: what the schedule was made of; not changed.
        schedule: timesteps, S and E.
        num_decoder_steps: that the schedule was made for, some of which it may leave out.
        strength: likewise.
    """

    order = 1

    def __init__(
        self,
        scheduler: Any,
        schedule: OnePassSchedule,
        num_decoder_steps: int,
        strength: float = 1.0,
    ) -> None:
        self._internal_dict = scheduler.config
        self._made_of = (scheduler, strength, num_decoder_steps)
        self.schedule = schedule
        self.init_noise_sigma = schedule.init_noise_sigma
        self.timesteps = schedule.encoder_timestep[None]

    def set_timesteps(
        self,
        num_inference_steps: int = 1,
        device: str | torch.device | None = None,
        mu: float | None = None,
    ) -> None:
        """Bring the timestep to a device; there is one, whatever number is asked for.

        Args:
            num_inference_steps: not read.
            device: of the timestep.
            mu: the shift for the picture's size, of a flow-matching scheduler that wants one.
        """
        if mu is not None:
            scheduler, strength, steps = self._made_of
            self.schedule = OnePassSchedule.from_scheduler(scheduler, steps, strength, mu)
        self.timesteps = self.schedule.encoder_timestep[None].to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """As `OnePassSchedule.scale_model_input`."""
        return self.schedule.scale_model_input(sample)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """S z + noise.

        Args:
            model_output: [B, C, H, W], sum_k E_k eps_k, guided or not.
            timestep: the one timestep.
            sample: [B, C, H, W], z, not scaled.
            return_dict: whether to return a `SchedulerOutput` rather than a tuple.

        Returns:
            [B, C, H, W].
        """
        result = self.schedule.add(sample, model_output)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noise pictures' latents as the scheduler does that the schedule was made of."""
        scheduler, strength, num_decoder_steps = self._made_of
        begun = begun_at(scheduler, strength, num_decoder_steps)
        begun.set_timesteps(num_decoder_steps)
        return begun.add_noise(original_samples, noise, timesteps)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NoStepsError(
                f"{error}. What asked for it goes through the steps of a scheduler one by one; the"
                " one pass takes them all at once, so it cannot run there"
            ) from None


def with_one_pass(scheduler: Any) -> Any:
    """The scheduler that came with some weights, or DDIM in its place where it has no one pass."""
    try:
        OnePassSchedule.from_scheduler(scheduler, 2)  # PNDM of one step would pass
    except SchedulerError as error:
        _log.warning("DDIM replaces the model's scheduler, which has no one pass: %s", error)
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    return scheduler
