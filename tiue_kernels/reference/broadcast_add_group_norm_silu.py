"""SiLU(GroupNorm(hidden_kb + shared_b + time_embedding_kb)), plain and scale-shift."""

import torch
import torch.nn.functional as F


def broadcast_add_group_norm_silu_fwd(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> torch.Tensor:
    batch = shared.shape[0]
    timesteps = time_embedding.shape[0] // max(batch, 1)
    time_embedding = time_embedding[:, :, None, None]

    rows = shared[None]  # (1, B, C, H, W)
    if hidden is not None:
        rows = rows + hidden.unflatten(0, (timesteps, batch))
    if not scale_shift:
        rows = rows + time_embedding.unflatten(0, (timesteps, batch))
    rows = rows.expand(timesteps, *shared.shape).flatten(0, 1)  # (K*B, C, H, W)

    rows = F.group_norm(rows, num_groups, weight, bias, eps)
    if scale_shift:
        scale, shift = time_embedding.chunk(2, dim=1)
        rows = rows * (1 + scale) + shift
    return F.silu(rows)
