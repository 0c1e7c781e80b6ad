"""sum_k E_k SiLU(GroupNorm(hidden_kb))."""

import torch
import torch.nn.functional as F

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare, rows_like, statistics_dtype
from tiue_kernels.ops.decomposed_norm import group_norm


def _fake(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = hidden.shape[0]
    return (
        rows_like(hidden, rows // coefficients.shape[0], *hidden.shape[1:]),
        hidden.new_empty(2, rows, num_groups, dtype=statistics_dtype(hidden.dtype)),
    )


def _decomposed(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = statistics_dtype(hidden.dtype)
    out, stats = group_norm(hidden.to(dtype), num_groups, weight, bias, eps)
    timesteps = coefficients.shape[0]
    rows = F.silu(out).unflatten(0, (timesteps, hidden.shape[0] // timesteps))
    total = (coefficients.to(dtype)[:, None, None, None, None] * rows).sum(0)
    return total.to(hidden.dtype), stats


forward, backward = declare(
    "timestep_sum_group_norm_silu",
    "(Tensor hidden, Tensor coefficients, int num_groups, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor hidden, Tensor coefficients, int num_groups, Tensor weight,"
    " Tensor bias, Tensor stats)"
    " -> (Tensor grad_hidden, Tensor grad_coefficients, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    kernels={"triton": KERNEL, "reference": ANYWHERE},
    decomposition=_decomposed,
)
