"""Transformers in one pass: the first blocks run once, the last ones for K timesteps in one batch.

TiUE (Li et al., CVPR 2025, arXiv 2505.21960) shares a UNet's encoder; a diffusion transformer has
none, so a border is set between blocks that are shared and blocks that are not.
"""

from typing import Any

from tiue.dit.hunyuan import TiUEHunyuanDiT2DModel
from tiue.dit.pixart import TiUEPixArtTransformer2DModel
from tiue.dit.sd3 import TiUESD3Transformer2DModel
from tiue.dit.student import OnePassTransformer, TransformerFeatures
from tiue.errors import ArchitectureError

__all__ = [
    "STUDENTS",
    "TiUEHunyuanDiT2DModel",
    "TiUEPixArtTransformer2DModel",
    "TiUESD3Transformer2DModel",
    "TransformerFeatures",
    "student_of",
]

STUDENTS: tuple[type[OnePassTransformer], ...] = (
    TiUEHunyuanDiT2DModel,
    TiUEPixArtTransformer2DModel,
    TiUESD3Transformer2DModel,
)


def student_of(transformer: Any) -> Any:
    """The student of a transformer of any family that has one; a student is left as it is.

    Args:
        transformer: diffusers' model.

    Returns:
        The student, which shares every module with it.

    Raises:
        ArchitectureError: a family without a student; the message lists those that have one.
    """
    if isinstance(transformer, OnePassTransformer):
        return transformer
    for student in STUDENTS:
        if isinstance(transformer, student.PARENT):
            return student.from_transformer(transformer)
    families = ", ".join(student.PARENT.__name__ for student in STUDENTS)
    raise ArchitectureError(
        f"a {type(transformer).__name__} has no one-pass student; these have one: {families}"
    )
