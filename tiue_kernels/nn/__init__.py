"""Fused modules for any trainer: thin over `tiue_kernels.functional`.

`FusedResnetBlock2D.from_module(resnet)` shares the layers of the diffusers module that it stands
for: the same parameters under the same state-dict keys, none of its own. Adapters, hooks and
attention processors on those layers, set before or later, keep their effect. `fuse(model)`
replaces every module of a model that has a fused form, in place.
"""

from tiue_kernels.nn.activations import FusedGEGLU
from tiue_kernels.nn.attention import FusedBasicTransformerBlock
from tiue_kernels.nn.convolutions import GroupNormSiLUConv2d
from tiue_kernels.nn.fuse import fuse
from tiue_kernels.nn.resnet import FusedResnetBlock2D
from tiue_kernels.nn.upsampling import FusedUpsample2D

__all__ = [
    "FusedBasicTransformerBlock",
    "FusedGEGLU",
    "FusedResnetBlock2D",
    "FusedUpsample2D",
    "GroupNormSiLUConv2d",
    "fuse",
]
