"""The command line of the distillation, made from the fields of `DistillConfig`."""

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer

from tiue.distill import distill
from tiue.distill.config import DistillConfig


def _signature() -> inspect.Signature:
    """Give every field of the config its option: name, type, default and help are the field's."""
    parameters = []
    hints = typing.get_type_hints(DistillConfig, include_extras=True)
    for field in dataclasses.fields(DistillConfig):
        kind, help_text = typing.get_args(hints[field.name])
        required = field.default is dataclasses.MISSING
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else field.default,
                annotation=Annotated[kind, typer.Option(help=help_text)],
            )
        )
    return inspect.Signature(parameters)


def distill_command(**settings: Any) -> None:
    """Distil a Stable Diffusion model into a one-pass student, from a file of prompts.

    The defaults are the published recipe. OUTPUT receives unet/ and scheduler/, which diffusers
    loads, checkpoints/ to resume from, and log.jsonl.
    """
    output = distill(DistillConfig(**settings))
    typer.echo(f"The student is in {output}.")


distill_command.__signature__ = _signature()  # type: ignore[attr-defined]
