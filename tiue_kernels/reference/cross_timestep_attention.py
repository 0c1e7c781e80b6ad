"""Attention of K*B query rows over B shared (or K*B own) rows of keys and values."""

import torch
import torch.nn.functional as F


def cross_timestep_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> torch.Tensor:
    rows, tokens, channels = query.shape
    batch = key.shape[0]
    timesteps = rows // max(batch, 1)
    heads = (num_heads, channels // num_heads)
    # The timesteps join the query axis, so that one row of keys and values serves all of them.
    query = query.view(timesteps, batch, tokens, *heads).permute(1, 3, 0, 2, 4)
    query = query.reshape(batch, num_heads, timesteps * tokens, heads[1])
    key = key.unflatten(2, heads).transpose(1, 2)
    value = value.unflatten(2, heads).transpose(1, 2)
    if attention_bias is not None:
        attention_bias = attention_bias[:, None]  # [B, 1, 1, tokens of key]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias, scale=scale)
    out = out.view(batch, num_heads, timesteps, tokens, heads[1]).permute(2, 0, 3, 1, 4)
    return out.reshape(rows, tokens, channels)
