"""Fused modules for any trainer: thin over `tiue_kernels.functional`.

`FusedResnetBlock2D.from_module(resnet)` shares the layers of the diffusers module that it stands
for: the same parameters under the same state-dict keys, none of its own. Adapters, hooks and
attention processors on those layers, set before or later, keep their effect. `fuse(model)`
replaces every module of a model that has a fused form, in place. `resnet_block` and the other
functions run a block that is not replaced, for K timesteps at once.
"""

from tiue_kernels.nn.activations import FusedGEGLU, feed_forward
from tiue_kernels.nn.attention import FusedBasicTransformerBlock, transformer_block
from tiue_kernels.nn.convolutions import GroupNormSiLUConv2d, norm_silu_conv
from tiue_kernels.nn.fuse import fuse
from tiue_kernels.nn.resnet import FusedResnetBlock2D, resnet_block
from tiue_kernels.nn.upsampling import FusedUpsample2D, upsampler

__all__ = [
    "FusedBasicTransformerBlock",
    "FusedGEGLU",
    "FusedResnetBlock2D",
    "FusedUpsample2D",
    "GroupNormSiLUConv2d",
    "feed_forward",
    "fuse",
    "norm_silu_conv",
    "resnet_block",
    "transformer_block",
    "upsampler",
]
