"""Norm, SiLU and convolution as one module."""

from __future__ import annotations

import torch
from torch import nn

from tiue_kernels.functional import norm_silu_conv
from tiue_kernels.layers import is_untouched


class GroupNormSiLUConv2d(nn.Sequential):
    """conv(silu(norm(x))), of which backward keeps x and the norm's statistics alone.

    Args:
        norm: the norm.
        activation: the SiLU.
        conv: the convolution; fused with stride 1 and zero padding, called whole otherwise.

    Raises:
        TypeError: a layer is of another class.
    """

    def __init__(self, norm: nn.GroupNorm, activation: nn.SiLU, conv: nn.Conv2d) -> None:
        for layer, cls in ((norm, nn.GroupNorm), (activation, nn.SiLU), (conv, nn.Conv2d)):
            if not isinstance(layer, cls):
                raise TypeError(
                    "GroupNormSiLUConv2d takes a GroupNorm, a SiLU and a Conv2d, got a "
                    f"{type(layer).__name__} for the {cls.__name__}"
                )
        super().__init__(norm, activation, conv)

    @classmethod
    def from_module(cls, module: nn.Sequential) -> GroupNormSiLUConv2d:
        """The fused form of `nn.Sequential(GroupNorm, SiLU, Conv2d)`, whose layers it shares.

        Raises:
            TypeError: the module is no such sequence, or its call is hooked or replaced.
        """
        if type(module) is not nn.Sequential or len(module) != 3 or not is_untouched(module):
            raise TypeError(
                "GroupNormSiLUConv2d stands for an nn.Sequential of three layers without hooks, "
                f"got {type(module).__name__}"
            )
        return cls(*module).train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, C, H, W] -> [rows, C_out, H', W']."""
        return norm_silu_conv(self[0], self[1], self[2], x)
