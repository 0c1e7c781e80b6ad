"""Diffusers' own call, driven on a copy of a pipeline that alone knows the call's schedule."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import types
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from tiue.pipelines import inputs
from tiue.pipelines.parts import has_hook, tokenizer_parts

# To a type checker a pipeline; in truth what is driven comes after it in the order of classes.
_Pipeline: Any = DiffusionPipeline if TYPE_CHECKING else object


class Driven(_Pipeline):
    """A pipeline of diffusers, which it is inherited beside, that draws in one pass.

    A call runs on a shallow copy of the pipeline: nothing that belongs to one call is kept on the
    pipeline or on its models. What draws is `_draw`.

    Attributes:
        num_decoder_steps: K where a call does not say.
    """

    num_decoder_steps: int = 4
    scheduler: Any
    # Of a copy that a call runs on: what it is a copy of, and where its models run.
    _original: Any = None
    _device: torch.device | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, DiffusionPipeline):
            cls.__call__ = _call_of(cls)

    def _draw(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_decoder_steps: int | None,
        skip_below: float | None,
    ) -> Any:
        """A call of the pipeline."""
        raise NotImplementedError

    def _students(self) -> dict[str, type[Any]]:
        """Components that are students, to the diffusers classes that their weights belong to."""
        raise NotImplementedError

    def _call_on_copy(self, arguments: dict[str, Any], **parts: Any) -> Any:
        """Diffusers' call on a copy with other parts than the pipeline's."""
        run = copy.copy(self)
        run.__dict__.update(_original=self, **tokenizer_parts(self), **parts)
        if run._device is None:
            run._device = self._execution_device
        return super(Driven, run).__call__(**arguments)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's models and the rest that it is made of."""
        return super().components if self._original is None else self._original.components

    @property
    def _execution_device(self) -> torch.device:
        """The parent's, looked for once a call.

        It walks through every layer seven times, 1.5 ms of the embedded model's 40; layers without
        a hook of accelerate or diffusers on one device need one walk.
        """
        if self._device is not None:
            return self._device
        modules = self._models()
        devices = {tensor.device for module in modules for tensor in _first_tensor(module)}
        if len(devices) != 1 or any(map(has_hook, modules)):
            return super()._execution_device
        return devices.pop()

    def _models(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def to_json_string(self) -> str:
        """The model_index.json of a saved folder, one that plain diffusers loads too.

        It names the diffusers classes that the weights belong to, and no folder of this machine.
        """
        index = json.loads(super().to_json_string())
        theirs = next(c for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        students = {name: ["diffusers", cls.__name__] for name, cls in self._students().items()}
        index |= {"_class_name": theirs.__name__, **students}
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

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

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold."""
        return dict(vars(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Made again of the class that `driven_class` was given, since its own has no place."""
        cls = type(self)
        bases = cls.__bases__ if cls.__module__ == __name__ else (None, cls)
        return _unmade, bases, self.__getstate__()


@functools.cache
def driven_class(driver: Any, cls: Any) -> Any:
    """A subclass of a pipeline's class, of the same name, that a subclass of `Driven` drives."""
    if issubclass(cls, driver):
        return cls
    own = {"__module__": __name__, "__doc__": cls.__doc__}
    return types.new_class(cls.__name__, (driver, cls), exec_body=lambda body: body.update(own))


def driven(driver: Any, pipe: DiffusionPipeline) -> Any:
    """A pipeline of that class with everything that another one holds; nothing is copied."""
    kind: Any = type(pipe)
    cls = driven_class(driver, kind)
    made = cls.__new__(cls)
    vars(made).update(vars(pipe))
    return made


def _first_tensor(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return list(itertools.islice(tensors, 1))


def _unmade(driver: Any, cls: Any) -> Any:
    cls = cls if driver is None else driven_class(driver, cls)
    return cls.__new__(cls)


def _call_of(cls: Any) -> Any:
    """The call of a class, with the arguments that diffusers' own has and one pass answers to."""
    theirs = super(Driven, cls).__call__

    def call(
        self: Any,
        *args: Any,
        num_decoder_steps: int | None = None,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._draw(args, kwargs, num_decoder_steps, skip_below)

    return inputs.documented(call, theirs)
