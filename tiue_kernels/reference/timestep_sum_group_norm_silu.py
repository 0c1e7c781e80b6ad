"""sum_k E_k SiLU(GroupNorm(hidden_kb)): the K timesteps become one row a sample."""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import like
from tiue_kernels.reference.group_norm import (
    affine,
    arithmetic_type,
    centre,
    group_norm,
    group_norm_bwd,
)


def timestep_sum_group_norm_silu_fwd(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    active, stats = group_norm(hidden.to(arithmetic_type(hidden)), num_groups, weight, bias, eps)
    active = F.silu(active, inplace=True).unflatten(0, (len(coefficients), -1))
    # Accumulated in float32: |E_k| reaches 2.5 and the terms cancel.
    total = torch.zeros_like(active[0])
    for coefficient, rows in zip(coefficients.to(active.dtype), active, strict=True):
        total.addcmul_(rows, coefficient)
    return like(total.to(hidden.dtype), hidden), stats


def timestep_sum_group_norm_silu_bwd(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    timesteps = len(coefficients)
    rows = like(hidden, hidden).to(arithmetic_type(hidden))
    centred = centre(rows, stats)
    normal = affine(centred, stats, weight, bias)
    grad = like(grad_out, hidden).to(rows.dtype)  # (B, C, H, W)
    grad_coefficients = (F.silu(normal).unflatten(0, (timesteps, -1)) * grad).sum((1, 2, 3, 4))

    factors = coefficients.to(rows.dtype).repeat_interleave(len(grad))[:, None, None, None]
    grad = like(grad.repeat(timesteps, 1, 1, 1), rows) * factors
    grad = torch.ops.aten.silu_backward(grad, normal)
    grad_hidden, grad_weight, grad_bias = group_norm_bwd(grad, centred, stats, weight)
    return (
        grad_hidden.to(hidden.dtype),
        grad_coefficients.to(coefficients.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )
