"""Replaces what has a fused form, in place."""

from __future__ import annotations

from torch import nn

from tiue_kernels.nn.activations import FusedGEGLU
from tiue_kernels.nn.attention import FusedBasicTransformerBlock
from tiue_kernels.nn.fused import Fused
from tiue_kernels.nn.resnet import FusedResnetBlock2D
from tiue_kernels.nn.upsampling import FusedUpsample2D

CLASSES: tuple[type[Fused], ...] = (
    FusedBasicTransformerBlock,
    FusedGEGLU,
    FusedResnetBlock2D,
    FusedUpsample2D,
)


def fuse(model: nn.Module) -> list[str]:
    """Replaces every module inside a model that has a fused form, in place.

    State-dict keys, parameters (an optimiser made before stays right) and results stay; what has
    hooks, a replaced forward or an option that its fused form does not know is left alone.

    Args:
        model: for instance a diffusers UNet, ControlNet or VAE; itself it is not replaced.

    Returns:
        The names of the modules that were replaced.
    """
    replaced = []
    for parent_name, parent in list(model.named_modules()):
        for name, child in parent.named_children():
            for cls in CLASSES:
                if not isinstance(child, cls) and cls.stands_for(child):
                    parent.register_module(name, cls.from_module(child))
                    replaced.append(f"{parent_name}.{name}" if parent_name else name)
    return replaced
