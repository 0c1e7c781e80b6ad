"""The command line of the distillation, made from the fields of `DistillConfig`."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tiue.distill.config import DistillConfig
from tiue.errors import DependencyError
from tiue.terminal import say

# The first field of each section of the help.
_SECTIONS = {
    "teacher": "Model and prompts",
    "steps": "Updates",
    "guidance_scale": "Losses",
    "mixed_precision": "Memory, speed, determinism",
    "divergence_factor": "Checkpoints, log, pictures",
}
_LETTERS = {"output": "-o"}


class SectionedHelp(TyperCommand):
    """Help in sections, of whole option names at any width: rich's tables cut them off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write every option under the title that its `rich_help_panel` names."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _signature() -> inspect.Signature:
    """Give every field of the config its option: name, type and help are the field's."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    "--config",
                    "-c",
                    help="YAML file of settings, or a shipped recipe: sd15, sd21-base, sdxl, "
                    "one-gpu-24gb, openmoji, scenes and more. The options below take precedence.",
                ),
            ],
        )
    ]
    hints = typing.get_type_hints(DistillConfig, include_extras=True)
    section = ""
    for field in dataclasses.fields(DistillConfig):
        section = _SECTIONS.get(field.name, section)
        kind, help_text = typing.get_args(hints[field.name])
        required = field.default is dataclasses.MISSING
        if typing.get_origin(kind) is tuple:
            kind = list[str]
        # None tells an option that was not given from one that says the default.
        optional = kind if isinstance(kind, types.UnionType) else kind | None
        default = "" if required or field.default in (None, ()) else f" [default: {field.default}]"
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    optional,
                    typer.Option(
                        *_declarations(field.name),
                        help=help_text + default,
                        rich_help_panel=section,
                    ),
                ],
            )
        )
    return inspect.Signature(parameters)


def _declarations(name: str) -> list[str]:
    return [f"--{name.replace('_', '-')}", _LETTERS[name]] if name in _LETTERS else []


def distill_command(config: str | None = None, **options: Any) -> None:
    """Distil a Stable Diffusion model into a one-pass student, from prompts alone.

    The defaults are one process of the published recipe. OUTPUT receives unet/ and scheduler/,
    which diffusers loads, checkpoints/ to resume from, config.yaml, log.jsonl, history.jsonl and
    summary.json. Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint and exit
    status 130 or 143; SIGUSR1 makes a checkpoint and goes on.
    """
    from tiue.devices import find_device, keep_freed_memory
    from tiue.distill import make_trainer
    from tiue.distill.settings import load_config

    given = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        settings = load_config(config, **given)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"Distillation needs {error.name}: pip install 'tiue[train]'."
        ) from error
    if settings.cpu or find_device("auto").type == "cpu":
        keep_freed_memory()
    trainer = make_trainer(settings, report=say)
    trainer.train()
    if trainer.stopped_by:  # as a shell tells of a signal, so that `distill && export` stops too
        raise typer.Exit(128 + trainer.stopped_by)


distill_command.__signature__ = _signature()  # type: ignore[attr-defined]


def embed_text_command(
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the model to be distilled.")],
    prompts: Annotated[str, typer.Option(help="As in `tiue distill`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the embeddings.")],
    prompt_column: Annotated[str | None, typer.Option(help="As in `tiue distill`.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Prompts a file.")] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 64,
    cpu: Annotated[bool, typer.Option(help="Use the CPU even where there is a GPU.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Half the size, rounded to 255 steps: lossy.")
    ] = False,
    unpadded: Annotated[
        bool,
        typer.Option(
            "--unpadded", help="Real tokens alone; the last one stands for the padding: lossy."
        ),
    ] = False,
) -> None:
    """Write the text embeddings of prompts once, in float16, for `tiue distill --embeddings`.

    Says what they take before it starts. A run that was interrupted goes on where it was, with the
    same arguments. Several processes share the work: accelerate launch -m tiue embed-text ...
    """
    from tiue.distill.embeddings import embed_text

    embed_text(
        teacher, prompts, output, prompt_column, shard_size, batch_size, cpu, say, int8,
        unpadded,
    )  # fmt: skip
