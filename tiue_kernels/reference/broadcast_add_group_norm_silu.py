"""SiLU(GroupNorm(hidden_kb + shared_b + time_embedding_kb)), plain and scale-shift."""

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


def broadcast_add_group_norm_silu_fwd(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _rows(hidden, shared, time_embedding, scale_shift)
    out, stats = group_norm(rows, num_groups, weight, bias, eps)
    if scale_shift:
        scale, shift = _scale_and_shift(time_embedding, out.dtype)
        out = torch.addcmul(shift, out, 1 + scale)
    return F.silu(out, inplace=True).to(shared.dtype), stats


def broadcast_add_group_norm_silu_bwd(
    grad_out: torch.Tensor,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale_shift: bool,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _rows(hidden, shared, time_embedding, scale_shift)
    centred = centre(rows, stats)
    normal = affine(centred, stats, weight, bias)
    grad = like(grad_out.to(rows.dtype), rows)
    if scale_shift:
        scale, shift = _scale_and_shift(time_embedding, rows.dtype)
        active = torch.addcmul(shift, normal, 1 + scale)
        grad = torch.ops.aten.silu_backward(grad, active)
        grad_time_embedding = torch.cat([(grad * normal).sum((2, 3)), grad.sum((2, 3))], dim=1)
        grad = grad * (1 + scale)
    else:
        grad = torch.ops.aten.silu_backward(grad, normal)

    grad_rows, grad_weight, grad_bias = group_norm_bwd(grad, centred, stats, weight)
    if not scale_shift:
        grad_time_embedding = grad_rows.sum((2, 3))
    timesteps = len(rows) // max(len(shared), 1)
    grad_shared = grad_rows.unflatten(0, (timesteps, len(shared))).sum(0)
    grad_hidden = shared.new_empty(0) if hidden is None else grad_rows.to(hidden.dtype)
    return (
        grad_hidden,
        like(grad_shared.to(shared.dtype), shared if hidden is None else hidden),
        grad_time_embedding.to(time_embedding.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


def _rows(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    scale_shift: bool,
) -> torch.Tensor:
    """What is normalised, [K*B, C, H, W], in the arithmetic type."""
    dtype = arithmetic_type(shared)
    wanted = shared if hidden is None else hidden
    batch = len(shared)
    timesteps = len(time_embedding) // max(batch, 1)

    rows = like(shared, wanted).to(dtype)[None]  # (1, B, C, H, W)
    if hidden is not None:
        rows = rows + like(hidden, hidden).unflatten(0, (timesteps, batch))
    if not scale_shift:
        rows = rows + time_embedding.to(dtype)[:, :, None, None].unflatten(0, (timesteps, batch))
    rows = rows.expand(timesteps, *shared.shape).flatten(0, 1)  # (K*B, C, H, W)
    return like(rows, wanted)


def _scale_and_shift(
    time_embedding: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, shift = time_embedding.to(dtype)[:, :, None, None].chunk(2, dim=1)
    return scale, shift
