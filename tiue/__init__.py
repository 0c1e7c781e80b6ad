"""TiUE: a Stable Diffusion student that makes an image in one pass, with no loop over the UNet.

The encoder of the UNet runs once, the decoder for K timesteps in one batch
(Li et al., CVPR 2025, arXiv 2505.21960).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiue.dit import (
        TiUEHunyuanDiT2DModel,
        TiUEPixArtTransformer2DModel,
        TiUESD3Transformer2DModel,
    )
    from tiue.openmoji import load_openmoji
    from tiue.pipelines import TiUEPipeline, TiUEXLPipeline, one_pass
    from tiue.scenes import load_scenes
    from tiue.schedule import OnePassSchedule
    from tiue.unet import TiUEUNet

__version__ = "0.2.0"
__all__ = [
    "OnePassSchedule",
    "TiUEHunyuanDiT2DModel",
    "TiUEPipeline",
    "TiUEPixArtTransformer2DModel",
    "TiUESD3Transformer2DModel",
    "TiUEUNet",
    "TiUEXLPipeline",
    "load_openmoji",
    "load_scenes",
    "one_pass",
]

# Imported at first use: torch and diffusers take seconds, `tiue --help` must not.
_HOMES = {
    "OnePassSchedule": "tiue.schedule",
    "TiUEHunyuanDiT2DModel": "tiue.dit",
    "TiUEPipeline": "tiue.pipelines",
    "TiUEPixArtTransformer2DModel": "tiue.dit",
    "TiUESD3Transformer2DModel": "tiue.dit",
    "TiUEUNet": "tiue.unet",
    "TiUEXLPipeline": "tiue.pipelines",
    "load_openmoji": "tiue.openmoji",
    "load_scenes": "tiue.scenes",
    "one_pass": "tiue.pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
