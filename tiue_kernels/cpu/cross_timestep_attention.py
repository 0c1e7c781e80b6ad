"""Launcher of csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch

from tiue_kernels import cpu


def cross_timestep_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return cpu.library().attention(query, key, value, num_heads, scale)
