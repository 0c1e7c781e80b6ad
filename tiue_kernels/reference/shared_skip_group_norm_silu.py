"""SiLU(GroupNorm(concat(hidden, skip))) over K timesteps, without the concat of the whole skip."""

import torch
import torch.nn.functional as F


def shared_skip_group_norm_silu_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_channels, skip_channels = hidden.shape[1], skip.shape[1]
    group_size = (hidden_channels + skip_channels) // num_groups
    hidden_groups = -(-hidden_channels // group_size)
    border = hidden_groups * group_size  # c0: first channel of the first group wholly in skip
    straddling = border - hidden_channels

    if straddling:  # one group reads both sides: its skip channels travel with the hidden ones
        timesteps = hidden.shape[0] // max(skip.shape[0], 1)
        part = skip[:, :straddling].repeat(timesteps, 1, 1, 1)
        hidden = torch.cat([hidden, part], dim=1)
    hidden = F.silu(F.group_norm(hidden, hidden_groups, weight[:border], bias[:border], eps))

    skip = skip[:, straddling:]
    if hidden_groups < num_groups:
        skip_groups = num_groups - hidden_groups
        skip = F.silu(F.group_norm(skip, skip_groups, weight[border:], bias[border:], eps))
    return hidden, skip
