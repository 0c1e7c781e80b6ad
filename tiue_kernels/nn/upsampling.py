"""The upsampler, and as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiue_kernels.functional import upsample_conv2d
from tiue_kernels.nn.convolutions import pixels
from tiue_kernels.nn.fused import Fused
from tiue_kernels.nn.low_rank import weights_of_conv


class FusedUpsample2D(Fused):
    """Stands for diffusers' `Upsample2D` with a convolution, which runs on the small map."""

    STANDS_FOR = "Upsample2D"

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        if not (module.use_conv and module.interpolate and module.name == "conv"):
            return "is not nearest upsampling before a convolution"
        if module.use_conv_transpose or module.norm is not None:
            return "has a transposed convolution or a norm"
        return None

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """Run the upsampler.

        Args:
            hidden_states: [rows, C, H, W].
            output_size: height and width; twice those of the input by default.

        Returns:
            [rows, C_out, 2 H, 2 W], or of the given size.
        """
        return upsampler(self, hidden_states, output_size)


def upsampler(block: Any, hidden: torch.Tensor, size: Any = None) -> torch.Tensor:
    """Nearest upsampling and a convolution.

    Args:
        block: an `Upsample2D`.
        hidden: [rows, C, H, W].
        size: height and width to upsample to; twice those of hidden by default.

    Returns:
        [rows, C, 2 H, 2 W], or of the given size.
    """
    weights = weights_of_conv(block.conv)
    height, width = hidden.shape[2:]
    exact = size is None or tuple(size) == (2 * height, 2 * width)
    if exact and weights is not None:
        conv = weights.layer
        if conv.kernel_size == (3, 3) and set(conv.padding) == {1}:
            return weights.apply(
                lambda weight, bias: upsample_conv2d(hidden, weight, bias), pixels(hidden)
            )
    size = (2 * height, 2 * width) if size is None else size
    return block.conv(nn.functional.interpolate(hidden, size=tuple(size), mode="nearest"))
