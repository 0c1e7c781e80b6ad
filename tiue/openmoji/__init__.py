"""The embedded model: a small text-to-image teacher of OpenMoji pictures and its student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiue import embedded

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from tiue.pipelines import TiUEPipeline

__all__ = ["WEIGHTS", "load_openmoji", "load_openmoji_teacher"]

WEIGHTS = Path(__file__).parent / "weights"


def load_openmoji(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS, student: Path | None = None
) -> TiUEPipeline:
    """Loads the one-pass model of OpenMoji pictures; see `tiue.embedded.load_student`."""
    return embedded.load_student("openmoji", weights, torch_dtype, student)


def load_openmoji_teacher(
    torch_dtype: torch.dtype | None = None, weights: Path = WEIGHTS
) -> StableDiffusionPipeline:
    """Loads its teacher as diffusers' own pipeline; see `tiue.embedded.load_teacher`."""
    return embedded.load_teacher("openmoji", weights, torch_dtype)
