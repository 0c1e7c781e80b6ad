"""SiLU(GroupNorm(concat(hidden, skip))): the launchers of csrc/shared_skip_group_norm_silu."""

import torch


def shared_skip_group_norm_silu_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.tiue_cuda.shared_skip_group_norm_silu_fwd(
        hidden, skip, num_groups, weight, bias, eps
    )


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
    return torch.ops.tiue_cuda.shared_skip_group_norm_silu_bwd(
        grad_hidden_out,
        grad_skip_out,
        hidden,
        skip,
        num_groups,
        weight,
        bias,
        hidden_stats,
        skip_stats,
    )
