"""Distillation of a Stable Diffusion UNet into a TiUE student, from prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiue.distill.config import DistillConfig
from tiue.distill.settings import load_config

if TYPE_CHECKING:
    from tiue.distill.trainer import Report, SampleHook, Trainer

__all__ = ["DistillConfig", "distill", "load_config"]


def distill(
    config: DistillConfig, on_sample: SampleHook | None = None, report: Report | None = None
) -> Path:
    """Distil a teacher into a one-pass student (arXiv 2505.21960).

    Args:
        config: The run's settings.
        on_sample: Called as `on_sample(unet, schedule, step)` every `config.sample_every` steps
            with the student (its average, if one is kept) in evaluation mode, without a graph.
        report: Called with text that the user should read, such as `print`.

    Returns:
        The output folder: `unet/` and `scheduler/` (the average, if one is kept), `pipeline/`
        where the teacher is a whole pipeline, `checkpoints/`, `samples/`, `config.yaml`,
        `log.jsonl`, `history.jsonl` and `summary.json`. A run that SIGINT or SIGTERM ended has no
        `unet/` yet.

    Raises:
        CheckpointError: If the teacher, the student or the checkpoint cannot be loaded.
        DependencyError: If a package that the run needs is not installed.
        DivergenceError: If a loss or gradient norm runs away.
        InputError: If the prompts or the settings cannot be used.
        NonFiniteError: If a loss or gradient becomes NaN or infinite.
        OutputError: If the output folder cannot be written or holds another run.
    """
    return make_trainer(config, on_sample, report).train()


def make_trainer(
    config: DistillConfig, on_sample: SampleHook | None = None, report: Report | None = None
) -> Trainer:
    """Build a run without starting it; arguments and errors are those of `distill`."""
    # Only here: the base install has neither PEFT nor PyYAML, and the command line starts without
    # waiting for them.
    try:
        from tiue.distill.trainer import Trainer
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "peft", "pydantic", "yaml"):
            raise
        from tiue.errors import DependencyError

        raise DependencyError(
            f"Distillation needs {error.name}: pip install 'tiue[train]'."
        ) from error
    return Trainer(config, on_sample, *([report] if report else []))
