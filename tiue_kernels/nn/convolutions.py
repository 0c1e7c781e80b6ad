"""Norm, SiLU and convolution as one call, and as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiue_kernels.functional import conv2d, group_norm_silu_conv2d
from tiue_kernels.nn.layers import (
    is_affine_group_norm,
    is_idle,
    is_plain,
    is_untouched,
)
from tiue_kernels.nn.low_rank import weights_of_conv


def norm_silu_conv(
    norm: Any,
    activation: Any,
    conv: Any,
    x: torch.Tensor,
    dropout: Any = None,
    plain_silu: bool | None = None,
) -> torch.Tensor:
    """conv(dropout(activation(norm(x)))), fused where the layers are GroupNorm, SiLU and a conv.

    Args:
        norm: `nn.GroupNorm`, or what stands for it.
        activation: `nn.SiLU`, or what stands for it.
        conv: `nn.Conv2d`, or what stands for it.
        x: [rows, C, H, W].
        dropout: between activation and convolution; None for none.
        plain_silu: whether the activation is a plain SiLU, of a caller that knows; None: asks.

    Returns:
        [rows, C_out, H', W'].
    """
    idle = dropout is None or is_idle(dropout)
    weights = weights_of_conv(conv)
    if plain_silu is None:
        plain_silu = is_plain(activation, nn.SiLU)
    if idle and plain_silu and weights is not None and is_affine_group_norm(norm):
        return weights.apply(
            lambda weight, bias: group_norm_silu_conv2d(
                x, *norm_arguments(norm), weight, bias, norm.eps, weights.layer.padding
            ),
            pixels(x),
        )
    x = activation(norm(x))
    return run_conv(conv, x if dropout is None else dropout(x))


def norm_arguments(norm: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Groups, scale and shift."""
    return norm.num_groups, norm.weight, norm.bias


def run_conv(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution, called through its adapter where it has one."""
    weights = weights_of_conv(conv)
    if weights is None:
        return conv(x)
    padding = weights.layer.padding
    return weights.apply(lambda weight, bias: conv2d(x, weight, bias, padding), pixels(x))


def pixels(x: torch.Tensor) -> int:
    """Rows times pixels of [rows, C, H, W]."""
    return x.shape[0] * x.shape[2] * x.shape[3]


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
