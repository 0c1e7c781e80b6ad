"""GroupNorm(x) of a map as tokens, pixel by pixel."""

import torch

from tiue_kernels.layout import like
from tiue_kernels.reference.group_norm import arithmetic_type, centre, group_norm, group_norm_bwd


def group_norm_tokens_fwd(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, stats = group_norm(x.to(arithmetic_type(x)), num_groups, weight, bias, eps)
    return out.flatten(2).transpose(1, 2).to(x.dtype).contiguous(), stats


def group_norm_tokens_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centred = centre(x.to(stats.dtype), stats)
    grad = grad_out.transpose(1, 2).unflatten(2, x.shape[2:]).to(stats.dtype)
    grad_x, grad_weight, grad_bias = group_norm_bwd(grad, centred, stats, weight)
    return like(grad_x, x).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
