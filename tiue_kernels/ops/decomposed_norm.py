"""GroupNorm as the decompositions have it."""

import torch


def group_norm(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm(x) and the statistics [2, rows, groups], x in its arithmetic type."""
    rows, channels, height, width = x.shape
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    out, mean, rstd = torch.native_group_norm(
        x.contiguous(), weight, bias, rows, channels, height * width, num_groups, eps
    )
    return out, torch.stack([mean, rstd])
