"""SiLU(GroupNorm(concat(hidden, skip))) over K timesteps, without the concat of the whole skip."""

import torch

from tiue_kernels.layout import like
from tiue_kernels.reference.group_norm import (
    arithmetic_type,
    group_norm_silu,
    group_norm_silu_bwd,
)


def shared_skip_group_norm_silu_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group_size = (hidden.shape[1] + skip.shape[1]) // num_groups
    hidden_groups = -(-hidden.shape[1] // group_size)
    border = hidden_groups * group_size  # c0: first channel of the first group wholly in skip
    front, back = _parts(hidden, skip, border)

    hidden_out, hidden_stats = group_norm_silu(
        front, hidden_groups, weight[:border], bias[:border], eps
    )
    skip_groups = num_groups - hidden_groups
    if skip_groups:
        skip_out, skip_stats = group_norm_silu(
            back, skip_groups, weight[border:], bias[border:], eps
        )
    else:
        skip_out, skip_stats = like(back, hidden), hidden_stats.new_empty(2, len(skip), 0)
    return hidden_out, skip_out, hidden_stats, skip_stats


def shared_skip_group_norm_silu_bwd(
    grad_hidden_out: torch.Tensor,
    grad_skip_out: torch.Tensor,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    hidden_stats: torch.Tensor,
    skip_stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    channels, batch = hidden.shape[1], skip.shape[0]
    border = grad_hidden_out.shape[1]
    front, back = _parts(hidden, skip, border)
    dtype = arithmetic_type(hidden)

    grad_front, grad_weight, grad_bias = group_norm_silu_bwd(
        grad_hidden_out.to(dtype), front.to(dtype), hidden_stats, weight[:border], bias[:border]
    )
    grad_hidden = like(grad_front[:, :channels].to(hidden.dtype), hidden)
    grad_skip = torch.empty_like(like(skip, hidden))
    straddling = border - channels
    if straddling:
        rows = grad_front[:, channels:].unflatten(0, (-1, batch)) if batch else grad_front[None]
        grad_skip[:, :straddling] = rows.sum(0) if batch else 0
    if border < len(weight):
        grad_back, *grads = group_norm_silu_bwd(
            grad_skip_out.to(dtype), back.to(dtype), skip_stats, weight[border:], bias[border:]
        )
        grad_skip[:, straddling:] = grad_back
        grad_weight = torch.cat([grad_weight, grads[0]])
        grad_bias = torch.cat([grad_bias, grads[1]])
    return grad_hidden, grad_skip, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _parts(
    hidden: torch.Tensor, skip: torch.Tensor, border: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[K*B, c0, H, W] with the straddling group's skip channels, and [B, C - c0, H, W]."""
    straddling = border - hidden.shape[1]
    back = like(skip[:, straddling:], hidden)
    if straddling:  # one group reads both sides: its skip channels travel with the hidden ones
        timesteps = hidden.shape[0] // max(skip.shape[0], 1)
        part = skip[:, :straddling].repeat(timesteps, 1, 1, 1)
        hidden = torch.cat([hidden, like(part, hidden)], dim=1)
    return hidden, back
