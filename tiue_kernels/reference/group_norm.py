"""SiLU(GroupNorm(x)) and its gradients with the statistics in the open, for the norm operators.

Half types are computed in float32 and rounded once at the end. Unlike F.group_norm, one value a
group is no error: its variance is 0.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import for_group_norm, like


def arithmetic_type(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def group_norm(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm(x) for x in its arithmetic type, and the statistics [2, rows, groups]."""
    x = _dense(x)
    taken, pivot = for_group_norm(x), None
    if not taken.is_contiguous():
        # torch sums squares of channels_last maps unshifted: an error of 3e-3 at a mean of 100.
        pivot = x.unflatten(1, (num_groups, -1)).mean((2, 3, 4))
        taken = x - _by_channel(pivot, x)
    # torch reads a strided scale or shift as if it were dense.
    weight, bias = weight.to(x.dtype).contiguous(), bias.to(x.dtype).contiguous()
    out, mean, rstd = torch.native_group_norm(taken, weight, bias, *_sizes(x), num_groups, eps)
    return like(out, x), torch.stack([mean if pivot is None else mean + pivot, rstd])


def centre(x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """x less the mean of its group: what the backward functions work on.

    With the mean still inside, products with x cancel, beyond twice torch's error at a mean of 100.
    """
    return _dense(x - _by_channel(stats[0], x))


def affine(
    centred: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """GroupNorm(x) again, from the centred x and the saved statistics."""
    dtype = centred.dtype
    scale = _by_channel(stats[1], centred) * weight.to(dtype)[:, None, None]
    return torch.addcmul(bias.to(dtype)[:, None, None], centred, scale)


def group_norm_bwd(
    grad_out: torch.Tensor, centred: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of GroupNorm at x, weight and bias, all in the arithmetic type."""
    rstd, taken = stats[1], for_group_norm(centred)
    grad, *grads = torch.ops.aten.native_group_norm_backward(
        like(grad_out, taken),  # in another format than x it gives wrong sums, unnoticed
        taken,
        torch.zeros_like(rstd),
        rstd,
        weight.to(centred.dtype).contiguous(),
        *_sizes(centred),
        rstd.shape[1],
        [True, True, True],
    )
    return like(grad, centred), *grads


def group_norm_silu_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of SiLU(GroupNorm(x)) at x, weight and bias, all in the arithmetic type."""
    centred = centre(x, stats)
    normal = affine(centred, stats, weight, bias)
    grad = torch.ops.aten.silu_backward(like(grad_out, x).to(x.dtype), normal)
    return group_norm_bwd(grad, centred, stats, weight)


def group_norm_silu(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(GroupNorm(x)) in the dtype of x, and the statistics [2, rows, groups]."""
    out, stats = group_norm(x.to(arithmetic_type(x)), num_groups, weight, bias, eps)
    return F.silu(out, inplace=True).to(x.dtype), stats


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows, channels and pixels."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _by_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[rows, groups] to [rows, channels, 1, 1]."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], dim=1)[:, :, None, None]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x contiguous or channels_last, strides of axes of one entry included: torch asks for it."""
    x = like(x, x)
    if x.is_contiguous():
        return x
    channels, height, width = x.shape[1:]
    strides = (channels * height * width, 1, width * channels, channels)
    return x.as_strided(x.shape, strides)
