"""Pipelines of diffusion transformers in one pass, driven by diffusers' own call."""

from __future__ import annotations

import copy
import functools
import json
import types
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from tiue.dit import student_of
from tiue.errors import InputError
from tiue.pipelines import inputs
from tiue.pipelines.parts import Part, tokenizer_parts
from tiue.pipelines.scheduler import OnePassScheduler, with_one_pass
from tiue.schedule import OnePassSchedule, is_flow_matching

# To a type checker a pipeline; in truth what is driven comes after it in the order of classes.
_Pipeline: Any = DiffusionPipeline if TYPE_CHECKING else object

# A shift to make a schedule with until the pipeline says which its pictures' size has: that of a
# picture of 512 x 512 in Stable Diffusion 3.5.
_ANY_SHIFT = 0.69


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


class TransformerPass(_Pipeline):
    """What turns a pipeline of a transformer, which it is inherited beside, into one of one pass.

    A call runs on a shallow copy of the pipeline that alone knows the call's schedule.

    Attributes:
        num_decoder_steps: K where a call does not say.
    """

    num_decoder_steps: int = 4
    transformer: Any
    scheduler: Any
    _original: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, DiffusionPipeline):
            cls.__call__ = _call_of(cls)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's models and the rest that it is made of."""
        return super().components if self._original is None else self._original.components

    def to_json_string(self) -> str:
        """The model_index.json of a saved folder, one that plain diffusers loads too."""
        index = json.loads(super().to_json_string())
        theirs = next(c for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        parent = self.transformer.PARENT.__name__
        index |= {"_class_name": theirs.__name__, "transformer": ["diffusers", parent]}
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

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
        run = copy.copy(self)
        scheduler = OnePassScheduler(self.scheduler, schedule, steps)
        run.__dict__.update(
            _original=self,
            scheduler=scheduler,
            transformer=TransformerPart(self.transformer, scheduler),
            **tokenizer_parts(self),
        )
        try:
            return super(TransformerPass, run).__call__(**arguments)
        except ValueError as error:
            raise InputError(str(error)) from error

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """The parent's; silent inside a call, which is one step."""
        if self._original is None:
            return super().progress_bar(iterable, total)
        return tqdm(iterable, total=total, disable=True)

    def maybe_free_model_hooks(self) -> None:
        """The parent's, of the pipeline itself."""
        if self._original is not None:
            self._original.maybe_free_model_hooks()
        else:
            super().maybe_free_model_hooks()


def transformer_pass(pipe: DiffusionPipeline, num_decoder_steps: int) -> Any:
    """Make a pipeline that draws in one pass of one of a transformer; see `tiue.one_pass`.

    Args:
        pipe: PixArt's, Hunyuan-DiT's or Stable Diffusion 3's.
        num_decoder_steps: K.

    Returns:
        The pipeline; the border is its `transformer.num_shared_blocks`.

    Raises:
        ArchitectureError: a transformer without a one-pass student.
        SchedulerError: a flow-matching scheduler that has no one pass.
    """
    cls: Any = type(pipe)
    cls = _class_of(cls)
    made = cls.__new__(cls)
    vars(made).update(vars(pipe))
    made.transformer = student_of(pipe.transformer)
    scheduler = pipe.scheduler
    made.scheduler = scheduler if is_flow_matching(scheduler) else with_one_pass(scheduler)
    _schedule(made.scheduler, num_decoder_steps)
    made.num_decoder_steps = num_decoder_steps
    return made


def _schedule(scheduler: Any, steps: int) -> OnePassSchedule:
    mu = _ANY_SHIFT if scheduler.config.get("use_dynamic_shifting") else None
    return OnePassSchedule.from_scheduler(scheduler, steps, mu=mu)


@functools.cache
def _class_of(cls: Any) -> Any:
    if issubclass(cls, TransformerPass):
        return cls
    own = {"__module__": __name__, "__doc__": cls.__doc__}
    bases = (TransformerPass, cls)
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(own))


def _call_of(cls: Any) -> Any:
    theirs = super(TransformerPass, cls).__call__

    def call(
        self: Any,
        *args: Any,
        num_decoder_steps: int | None = None,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._draw(args, kwargs, num_decoder_steps, skip_below)

    return inputs.documented(call, theirs)
