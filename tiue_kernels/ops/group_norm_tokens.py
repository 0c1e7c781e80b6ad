"""GroupNorm(x) of a map, written as tokens: in channels_last nothing is moved but by the norm."""

import torch

from tiue_kernels.dispatch import ANYWHERE, Capability
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.ops.decomposed_norm import group_norm


def _fake(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels, height, width = x.shape
    stats = x.new_empty(2, rows, num_groups, dtype=statistics_dtype(x.dtype))
    return x.new_empty(rows, height * width, channels), stats


def _decomposed(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, stats = group_norm(x.to(statistics_dtype(x.dtype)), num_groups, weight, bias, eps)
    return out.flatten(2).transpose(1, 2).to(x.dtype), stats


forward, backward = declare(
    "group_norm_tokens",
    "(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor x, int num_groups, Tensor weight, Tensor bias, Tensor stats)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    kernels={"triton": Capability(), "reference": ANYWHERE},
    decomposition=_decomposed,
)
