"""Attention of K*B query rows over B (or K*B) rows of keys: csrc/cross_timestep_attention."""

import torch


def cross_timestep_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tiue_cuda.cross_timestep_attention_fwd(
        query, key, value, num_heads, scale, attention_bias
    )


def cross_timestep_attention_bwd(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    needs_bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.tiue_cuda.cross_timestep_attention_bwd(
        grad_out,
        query,
        key,
        value,
        num_heads,
        scale,
        attention_bias,
        out,
        logsumexp,
        needs_bias_grad,
    )
