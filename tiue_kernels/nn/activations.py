"""The fused GEGLU."""

from __future__ import annotations

import torch
from torch import nn

from tiue_kernels.functional import geglu
from tiue_kernels.nn.fused import Fused


class FusedGEGLU(Fused):
    """Stands for diffusers' `GEGLU`: a projection, and x1 * gelu(x2) of its halves in one pass."""

    STANDS_FOR = "GEGLU"
    proj: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., D]."""
        return geglu(self.proj(hidden_states))
