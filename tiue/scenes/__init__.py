"""The scenes model: a text-to-image teacher that has to draw, and its one-pass student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiue import embedded

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from tiue.pipelines import TiUEPipeline

__all__ = ["WEIGHTS", "load_scenes", "load_scenes_teacher"]

WEIGHTS = Path(__file__).parent / "weights"


def load_scenes(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS, student: Path | None = None
) -> TiUEPipeline:
    """Loads the one-pass model of scenes; see `tiue.embedded.load_student`."""
    return embedded.load_student("scenes", weights, torch_dtype, student)


def load_scenes_teacher(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS
) -> StableDiffusionPipeline:
    """Loads its teacher as diffusers' own pipeline; see `tiue.embedded.load_teacher`."""
    return embedded.load_teacher("scenes", weights, torch_dtype)
