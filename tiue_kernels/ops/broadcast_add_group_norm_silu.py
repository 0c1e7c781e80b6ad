"""SiLU(GroupNorm(hidden_kb + shared_b + time_embedding_kb)), plain and scale-shift."""

import torch
import torch.nn.functional as F

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare, rows_like, statistics_dtype
from tiue_kernels.ops.decomposed_norm import group_norm


def _fake(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = time_embedding.shape[0]
    return (
        rows_like(shared if hidden is None else hidden, rows, *shared.shape[1:]),
        shared.new_empty(2, rows, num_groups, dtype=statistics_dtype(shared.dtype)),
    )


def _decomposed(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = statistics_dtype(shared.dtype)
    embedding = time_embedding.to(dtype)[:, :, None, None]
    rows = shared.to(dtype).repeat(time_embedding.shape[0] // shared.shape[0], 1, 1, 1)
    rows = rows if hidden is None else rows + hidden.to(dtype)
    if scale_shift:
        out, stats = group_norm(rows, num_groups, weight, bias, eps)
        scale, shift = embedding.chunk(2, dim=1)
        out = out * (1 + scale) + shift
    else:
        out, stats = group_norm(rows + embedding, num_groups, weight, bias, eps)
    return F.silu(out).to(shared.dtype), stats


forward, backward = declare(
    "broadcast_add_group_norm_silu",
    "(Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups, Tensor weight,"
    " Tensor bias, float eps, bool scale_shift) -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups,"
    " Tensor weight, Tensor bias, bool scale_shift, Tensor stats)"
    " -> (Tensor grad_hidden, Tensor grad_shared, Tensor grad_time_embedding, Tensor grad_weight,"
    " Tensor grad_bias)",
    fake=_fake,
    kernels={"triton": KERNEL, "reference": ANYWHERE},
    decomposition=_decomposed,
)
