"""SiLU(GroupNorm(concat(hidden, skip))) over K timesteps, the skip normalised once."""

import torch
import torch.nn.functional as F

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare, rows_like, statistics_dtype
from tiue_kernels.ops.decomposed_norm import group_norm


def border_group(hidden_channels: int, channels: int, num_groups: int) -> int:
    """How many groups read the hidden part: the first group wholly in the skip has this number."""
    return -(-hidden_channels * num_groups // channels)


def _fake(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    channels = hidden.shape[1] + skip.shape[1]
    groups = border_group(hidden.shape[1], channels, num_groups)
    border = groups * (channels // num_groups)
    dtype = statistics_dtype(hidden.dtype)
    return (
        rows_like(hidden, hidden.shape[0], border, *hidden.shape[2:]),
        rows_like(hidden, skip.shape[0], channels - border, *skip.shape[2:]),
        hidden.new_empty(2, hidden.shape[0], groups, dtype=dtype),
        hidden.new_empty(2, skip.shape[0], num_groups - groups, dtype=dtype),
    )


def _decomposed(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = border_group(hidden.shape[1], weight.shape[0], num_groups)
    border = groups * (weight.shape[0] // num_groups)
    straddling = border - hidden.shape[1]
    dtype = statistics_dtype(hidden.dtype)
    front, back = hidden, skip[:, straddling:]
    if straddling:
        timesteps = hidden.shape[0] // skip.shape[0]
        front = torch.cat([hidden, skip[:, :straddling].repeat(timesteps, 1, 1, 1)], dim=1)
    out, stats = group_norm(front.to(dtype), groups, weight[:border], bias[:border], eps)
    out = F.silu(out).to(hidden.dtype)
    if groups == num_groups:
        return out, back.contiguous(), stats, stats.new_empty(2, skip.shape[0], 0)
    shared, shared_stats = group_norm(
        back.to(dtype), num_groups - groups, weight[border:], bias[border:], eps
    )
    return out, F.silu(shared).to(hidden.dtype), stats, shared_stats


forward, backward = declare(
    "shared_skip_group_norm_silu",
    "(Tensor hidden, Tensor skip, int num_groups, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor hidden_out, Tensor skip_out, Tensor hidden_stats, Tensor skip_stats)",
    "(Tensor grad_hidden_out, Tensor grad_skip_out, Tensor hidden, Tensor skip, int num_groups,"
    " Tensor weight, Tensor bias, Tensor hidden_stats, Tensor skip_stats)"
    " -> (Tensor grad_hidden, Tensor grad_skip, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    # Triton first until a card says otherwise: the CUDA plan fills 80 to 98 of 132 multiprocessors.
    kernels={"triton": KERNEL, "cuda": KERNEL, "reference": ANYWHERE},
    decomposition=_decomposed,
)
