"""Forwards for `kernelize`: each stands for the forward of diffusers' class of its name.

They are put on modules that stay what they are, so that parameters, keys and adapters stay too. A
layer with a hook or an adapter is called whole.
"""

from __future__ import annotations

import torch
from torch import nn

from tiue_kernels.functional import broadcast_add_group_norm_silu, geglu
from tiue_kernels.nn import resnet_block

__all__ = ["GEGLU", "GroupNormSiLU", "ResnetBlock2D"]


class GEGLU(nn.Module):
    """A projection, and x1 * gelu(x2) of its halves in one pass."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """[..., C] -> [..., D]."""
        return geglu(self.proj(hidden_states))


class ResnetBlock2D(nn.Module):
    """Norm, SiLU and convolution twice, and a shortcut; one that resamples inside is not for it."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        """[B, C, H, W], [B, E] -> [B, C_out, H, W]."""
        return resnet_block(self, input_tensor, temb)


class GroupNormSiLU(nn.Module):
    """SiLU(GroupNorm(x)) in one pass, of a module with the attributes of `nn.GroupNorm`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same."""
        nothing = x.new_zeros(x.shape[:2])
        return broadcast_add_group_norm_silu(
            None, x, nothing, self.num_groups, self.weight, self.bias, self.eps
        )
