"""The fused resnet."""

from __future__ import annotations

from typing import Any

import torch

from tiue_kernels.functional import resnet_block
from tiue_kernels.nn.fused import Fused


class FusedResnetBlock2D(Fused):
    """Stands for diffusers' `ResnetBlock2D`: norm, SiLU and convolution twice, and a shortcut.

    Keeps for backward its input, the first convolution's output and the statistics of the norms.
    """

    STANDS_FOR = "ResnetBlock2D"

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        if module.upsample is not None or module.downsample is not None:
            return "resamples inside"
        return None

    def forward(
        self,
        input_tensor: torch.Tensor,
        temb: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            input_tensor: [K*B, C, H, W]; K is 1 unless several timesteps share a skip.
            temb: [K*B, E] time embedding, where the block takes one.
            skip: [B, C_s, H, W], joined to the channels of the input and shared by the timesteps.

        Returns:
            [K*B, C_out, H, W].

        Raises:
            ValueError: the shapes do not fit together, or a scale and shift has no embedding.
        """
        return resnet_block(self, input_tensor, temb, skip)
