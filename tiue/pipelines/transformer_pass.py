"""Pipelines of diffusion transformers in one pass, driven by diffusers' own call."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.pag.pag_utils import PAGMixin

from tiue.dit import STUDENTS, student_of
from tiue.errors import ArchitectureError, InputError
from tiue.pipelines import inputs
from tiue.pipelines.driven import Driven, driven
from tiue.pipelines.parts import Part
from tiue.pipelines.scheduler import OnePassScheduler, with_one_pass
from tiue.schedule import OnePassSchedule, is_flow_matching

# A shift to make a schedule with until the pipeline says which its pictures' size has: that of a
# picture of 512 x 512 in Stable Diffusion 3.5.
_ANY_SHIFT = 0.69
_CONTROL = "controlnet_block_samples"


class TransformerPart(Part):
    """A one-pass transformer whose call is the pass of a call's schedule.

    Args:
        transformer: the student.
        scheduler: the call's, which may make its schedule when it learns of the picture's size.
    """

    def __init__(self, transformer: Any, scheduler: OnePassScheduler) -> None:
        super().__init__(transformer, _scheduler=scheduler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("skip_layers", None):
            raise InputError("skip_guidance_layers has no one pass: leave it out")
        kwargs = {k: v for k, v in kwargs.items() if k != "block_controlnet_hidden_states" or v}
        return self._model(*args, schedule=self._scheduler.schedule, **kwargs)


class TransformerPass(Driven):
    """What turns a pipeline of a transformer, which it is inherited beside, into one pass."""

    transformer: Any

    def _students(self) -> dict[str, type[Any]]:
        return {"transformer": self.transformer.PARENT}

    def _draw(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_decoder_steps: int | None,
        skip_below: float | None,
    ) -> Any:
        arguments = inputs.bind(super().__call__, args, kwargs)
        steps = self.num_decoder_steps if num_decoder_steps is None else num_decoder_steps
        schedule = _schedule(self.scheduler, steps)
        if skip_below is not None:
            if self.scheduler.config.get("use_dynamic_shifting"):
                raise InputError(
                    "skip_below needs a schedule that is known before the pictures' size: leave it"
                    " out with use_dynamic_shifting"
                )
            schedule = schedule.skip_below(skip_below)
        scheduler = OnePassScheduler(self.scheduler, schedule, steps)
        part = TransformerPart(self.transformer, scheduler)
        try:
            return self._call_on_copy(arguments, scheduler=scheduler, transformer=part)
        except ValueError as error:
            raise InputError(str(error)) from error


def transformer_pass(pipe: DiffusionPipeline, num_decoder_steps: int) -> Any:
    """Make a pipeline that draws in one pass of one of a transformer; see `tiue.one_pass`.

    Args:
        pipe: PixArt's, Hunyuan-DiT's or Stable Diffusion 3's.
        num_decoder_steps: K.

    Returns:
        The pipeline; the border is its `transformer.num_shared_blocks`.

    Raises:
        ArchitectureError: a transformer without a one-pass student, perturbed-attention guidance,
            a ControlNet where the family takes none.
        SchedulerError: a flow-matching scheduler that has no one pass.
    """
    made = driven(TransformerPass, pipe)
    made.transformer = student_of(pipe.transformer)
    if isinstance(pipe, PAGMixin):
        raise ArchitectureError(
            f"{type(pipe).__name__} has no one pass: perturbed attention tells guided rows from the"
            " rest by their place in a batch, which K timesteps change. Take the pipeline without"
        )
    if "controlnet" in pipe.components and _CONTROL not in made.transformer.CONDITIONS:
        takers = [own.PARENT.__name__ for own in STUDENTS if _CONTROL in own.CONDITIONS]
        raise ArchitectureError(
            f"the one pass of a {made.transformer.PARENT.__name__} takes no ControlNet; that of"
            f" {', '.join(takers)} does"
        )
    scheduler = pipe.scheduler
    made.scheduler = scheduler if is_flow_matching(scheduler) else with_one_pass(scheduler)
    _schedule(made.scheduler, num_decoder_steps)
    made.num_decoder_steps = num_decoder_steps
    return made


def _schedule(scheduler: Any, steps: int) -> OnePassSchedule:
    mu = _ANY_SHIFT if scheduler.config.get("use_dynamic_shifting") else None
    return OnePassSchedule.from_scheduler(scheduler, steps, mu=mu)
