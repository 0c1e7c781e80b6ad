"""LayerNorm(x) * (1 + scale) + shift over K timesteps, the shared tokens normalised once."""

import torch


def adaptive_layer_norm_fwd(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = x.to(dtype)
    normed, mean, rstd = torch.native_layer_norm(tokens, x.shape[-1:], None, None, eps)
    out = normed * (1 + by_timestep(scale.to(dtype), x)) + by_timestep(shift.to(dtype), x)
    return out.flatten(0, 1).to(x.dtype), torch.stack([mean, rstd]).squeeze(-1)


def adaptive_layer_norm_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, (mean, rstd) = x.to(stats.dtype), stats.unsqueeze(-1)
    grad = grad_out.to(stats.dtype).unflatten(0, (timesteps_of(scale, x), len(x)))  # (K, R, N, C)
    grad_scale = (grad * ((tokens - mean) * rstd)).sum(2)
    grad_normed = (grad * (1 + by_timestep(scale.to(stats.dtype), x))).sum(0)
    grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normed, tokens, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )
    return (
        grad_x.to(x.dtype),
        grad_scale.flatten(0, 1).to(scale.dtype),
        grad.sum(2).flatten(0, 1).to(shift.dtype),
    )


def timesteps_of(rows: torch.Tensor, x: torch.Tensor) -> int:
    """How many rows of a modulation read one row of tokens."""
    return rows.shape[0] // max(x.shape[0], 1)


def by_timestep(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[K*R, C] as [K, R, 1, C], beside tokens [R, N, C]."""
    return rows.unflatten(0, (timesteps_of(rows, x), x.shape[0])).unsqueeze(2)
