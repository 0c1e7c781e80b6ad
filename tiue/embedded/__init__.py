"""The models inside this package: where they lie, and how their folders become pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiue.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from tiue.pipelines import TiUEPipeline

EMBEDDED = ("openmoji", "scenes")


def weights_folder(name: str) -> Path:
    """The folder of an embedded model's weights, `teacher/` and `student/`, whether there or not.

    Args:
        name: one of `EMBEDDED`.
    """
    return Path(__file__).parents[1] / name / "weights"


def load_student(
    model: str, weights: Path, torch_dtype: torch.dtype | None = None, student: Path | None = None
) -> TiUEPipeline:
    """Loads an embedded one-pass model; no network.

    Args:
        model: one of `EMBEDDED`.
        weights: folder that the model's `export` command wrote.
        torch_dtype: type of the weights in memory; float32 by default (the files hold float16).
        student: another student than the one in `weights`: a folder with `unet/`, `scheduler/`.

    Returns:
        The student with the teacher's autoencoder, text encoder and tokenizer, on the CPU.

    Raises:
        CheckpointError: if the weights are missing or incomplete.
    """
    import torch
    from diffusers import DDIMScheduler

    from tiue.pipelines import TiUEPipeline
    from tiue.unet import TiUEUNet

    student = student or _existing(model, weights / "student")
    dtype = torch_dtype or torch.float32
    pipe = TiUEPipeline.from_pretrained(
        _existing(model, weights / "teacher"),
        unet=TiUEUNet.from_pretrained(student, subfolder="unet", dtype=dtype),
        scheduler=DDIMScheduler.from_pretrained(student, subfolder="scheduler"),
        dtype=dtype,
    )
    # Else a CPU sorts every map before a convolution and after it: 7.8 ms a picture of a batch of
    # 16 on one thread, in place of 6.0.
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def load_teacher(
    model: str, weights: Path, torch_dtype: torch.dtype | None = None
) -> StableDiffusionPipeline:
    """Loads an embedded teacher as diffusers' own pipeline; no network.

    Args:
        model: one of `EMBEDDED`.
        weights: folder that the model's `export` command wrote.
        torch_dtype: type of the weights in memory; float32 by default (the files hold float16).

    Returns:
        The pipeline, on the CPU.

    Raises:
        CheckpointError: if the weights are missing.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    from tiue.loading.weights import without_tables

    with without_tables():
        return StableDiffusionPipeline.from_pretrained(
            _existing(model, weights / "teacher"), dtype=torch_dtype or torch.float32
        )


def _existing(model: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"no embedded model in {folder}: install the whole package, or make it with "
            f"`python -m tiue.{model}.train` (its stages in order, then export)"
        )
    return folder
