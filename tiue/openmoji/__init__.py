"""The embedded model: a small text-to-image teacher of OpenMoji pictures and its student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiue.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from tiue.pipelines import TiUEPipeline

__all__ = ["WEIGHTS", "load_openmoji", "load_openmoji_teacher"]

WEIGHTS = Path(__file__).parent / "weights"


def load_openmoji(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS, student: Path | None = None
) -> TiUEPipeline:
    """Loads the embedded one-pass model; no network.

    Args:
        torch_dtype: type of the weights in memory; float32 by default (the files hold float16).
        weights: folder that `python -m tiue.openmoji.train export` wrote.
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

    student = student or _folder(weights, "student")
    dtype = torch_dtype or torch.float32
    return TiUEPipeline.from_pretrained(
        _folder(weights, "teacher"),
        unet=TiUEUNet.from_pretrained(student, subfolder="unet", torch_dtype=dtype),
        scheduler=DDIMScheduler.from_pretrained(student, subfolder="scheduler"),
        torch_dtype=dtype,
    )


def load_openmoji_teacher(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS
) -> StableDiffusionPipeline:
    """Loads the embedded teacher as diffusers' own pipeline; no network.

    Args:
        torch_dtype: type of the weights in memory; float32 by default (the files hold float16).
        weights: folder that `python -m tiue.openmoji.train export` wrote.

    Returns:
        The pipeline, on the CPU.

    Raises:
        CheckpointError: if the weights are missing.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        _folder(weights, "teacher"), torch_dtype=torch_dtype or torch.float32
    )


def _folder(weights: Path, name: str) -> Path:
    folder = weights / name
    if not folder.is_dir():
        raise CheckpointError(
            f"no embedded model in {folder}: install the whole package, or make it with "
            "`python -m tiue.openmoji.train` (autoencoder, teacher, student, export)"
        )
    return folder
