"""The fused upsampler."""

from __future__ import annotations

from typing import Any

import torch

from tiue_kernels.functional import upsampler
from tiue_kernels.nn.fused import Fused


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
