"""SiLU(GroupNorm(x)) and its gradients with the statistics in the open, for the norm operators.

Half types are computed in float32 and rounded once at the end. Unlike F.group_norm, one value a
group is no error: its variance is 0.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import like


def arithmetic_type(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def group_norm(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm(x) for x in its arithmetic type, and the statistics [2, rows, groups]."""
    rows, channels, *size = x.shape
    out, mean, rstd = torch.native_group_norm(
        like(x, x),
        weight.to(x.dtype),
        bias.to(x.dtype),
        rows,
        channels,
        torch.Size(size).numel(),
        num_groups,
        eps,
    )
    return out, torch.stack([mean, rstd])


def affine(
    x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """GroupNorm(x) again from the saved statistics.

    The mean goes first: x * scale + shift in one pass misses twice torch's error at a mean of 100.
    """
    repeats = x.shape[1] // max(stats.shape[2], 1)
    mean, rstd = stats.repeat_interleave(repeats, dim=2)[:, :, :, None, None]
    scale = rstd * weight.to(x.dtype)[:, None, None]
    centred = x - mean
    return torch.addcmul(bias.to(x.dtype)[:, None, None], centred, scale, out=centred)


def group_norm_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of GroupNorm at x, weight and bias, all in the arithmetic type."""
    rows, channels, *size = x.shape
    x = like(x, x)
    mean, rstd = stats
    return torch.ops.aten.native_group_norm_backward(
        like(grad_out, x),  # a gradient in another format than x gives wrong sums, unnoticed
        x,
        mean,
        rstd,
        weight.to(x.dtype),
        rows,
        channels,
        torch.Size(size).numel(),
        stats.shape[2],
        [True, True, True],
    )


def group_norm_silu_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of SiLU(GroupNorm(x)) at x, weight and bias, all in the arithmetic type."""
    grad = torch.ops.aten.silu_backward(like(grad_out, x), affine(x, stats, weight, bias))
    return group_norm_bwd(grad, x, stats, weight)


def group_norm_silu(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(GroupNorm(x)) in the dtype of x, and the statistics [2, rows, groups]."""
    out, stats = group_norm(x.to(arithmetic_type(x)), num_groups, weight, bias, eps)
    return F.silu(out, inplace=True).to(x.dtype), stats
