"""The published form behind a plain diffusers pipeline: K decodings, K steps of the scheduler.

Written with diffusers' own forward and nothing of this package, so that whatever a pipeline hands
to its UNet means what it means there.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class _EmbeddedError(Exception):
    """Ends a forward when the decoder would begin."""


class PublishedUNet(UNet2DConditionModel):
    """Gives the K model outputs beside each other, on the channels' axis: [B, K * C, H, W]."""

    timesteps: torch.Tensor

    @classmethod
    def of(cls, unet: UNet2DConditionModel, timesteps: torch.Tensor) -> "PublishedUNet":
        """A UNet that shares the modules of another."""
        made = cls.__new__(cls)
        for name, value in vars(unet).items():
            registry = type(value) in (dict, OrderedDict, set)
            made.__dict__[name] = value.copy() if registry else value
        made.__dict__["timesteps"] = timesteps
        return made

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """K times: the encoder at the first timestep, the decoder at the k-th."""
        return_dict = kwargs.pop("return_dict", True)
        outputs = [self._at(k, sample, timestep, *args, **kwargs) for k in self.timesteps]
        output = torch.cat(outputs, dim=1)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _at(self, k: Any, sample: torch.Tensor, start: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings: list[torch.Tensor] = []

        def note(_block: Any, _args: Any, own: dict[str, Any]) -> None:
            embeddings.append(own["temb"])
            raise _EmbeddedError

        def replace(_block: Any, own_args: Any, own: dict[str, Any]) -> Any:
            return own_args, own | {"temb": embeddings[0]}

        def run(timestep: Any, hook: Any) -> Any:
            # diffusers pops residuals off the lists that it is given.
            own = {k: list(v) if isinstance(v, list) else v for k, v in kwargs.items()}
            handles = [
                block.register_forward_pre_hook(hook, with_kwargs=True) for block in self.up_blocks
            ]
            try:
                return super(PublishedUNet, self).forward(sample, timestep, *args, **own)
            except _EmbeddedError:
                return None
            finally:
                for handle in handles:
                    handle.remove()

        run(k, note)
        return run(start, replace).sample


class PublishedScheduler(SchedulerMixin, ConfigMixin):
    """One timestep, at which the K steps of a scheduler are taken one after another."""

    order = 1

    def __init__(self, scheduler: Any, steps: int) -> None:
        self._internal_dict = scheduler.config
        self.inner = copy.deepcopy(scheduler)
        self.inner.set_timesteps(steps)
        self.timesteps = self.inner.timesteps[:1]
        self.init_noise_sigma = self.inner.init_noise_sigma

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """There is one."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return copy.deepcopy(self.inner).scale_model_input(sample, timestep)

    def add_noise(self, *args: Any) -> torch.Tensor:
        return self.inner.add_noise(*args)

    def step(
        self, output: torch.Tensor, _: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> Any:
        inner = copy.deepcopy(self.inner)
        outputs = output.chunk(len(inner.timesteps), dim=1)
        for timestep, own in zip(inner.timesteps, outputs, strict=True):
            sample = inner.step(own, timestep, sample, return_dict=False)[0]
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


def published(pipe: Any, steps: int, scheduler: Any = None) -> Any:
    """A plain pipeline that is driven by the published form, of a plain pipeline's components."""
    made = copy.copy(pipe)
    one_step = PublishedScheduler(scheduler or pipe.scheduler, steps)
    vars(made).update(
        scheduler=one_step,
        unet=PublishedUNet.of(pipe.unet, one_step.inner.timesteps),
        # It slices the timesteps, and wants multiples of 8 of any VAE.
        get_timesteps=lambda *_args, **_kwargs: (one_step.timesteps, 1),
        check_inputs=lambda *_args, **_kwargs: None,
    )
    return made
