"""Transformer blocks over K timesteps, taken apart where their parts do not depend on k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from tiue_kernels import functional
from tiue_kernels.nn.layers import is_named, is_plain, repeat_rows, tell_once

_NORMS = ("LayerNorm", "FP32LayerNorm")


def all_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A tensor of B or K*B rows with K*B rows."""
    return repeat_rows(tensor, rows // tensor.shape[0]) if tensor.shape[0] < rows else tensor


def adaptive_layer_norm(
    norm: Any, hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """norm(hidden) * (1 + scale) + shift, normalised once where all timesteps share the tokens.

    Args:
        norm: a LayerNorm.
        hidden: [B, N, C] or [K*B, N, C].
        shift: [K*B, C].
        scale: [K*B, C]; none where the family only shifts.

    Returns:
        [K*B, N, C].
    """
    plain = is_plain_norm(norm) and norm.weight is None
    if plain and scale is not None and scale.dtype == hidden.dtype:
        return functional.adaptive_layer_norm(hidden, scale, shift, norm.eps)
    groups = (-1, hidden.shape[0])  # (K, B) where the tokens are shared, else (1, K*B)
    normed = norm(hidden)
    if scale is not None:
        normed = normed * (1 + scale.unflatten(0, groups).unsqueeze(2))
    return (normed + shift.unflatten(0, groups).unsqueeze(2)).flatten(0, 1)


def gated_residual(hidden: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """hidden + gate * branch.

    Args:
        hidden: [B, N, C] or [K*B, N, C].
        gate: [K*B, C].
        branch: [K*B, N, C].

    Returns:
        [K*B, N, C].
    """
    return residual(hidden, gate.unsqueeze(1) * branch)


def residual(hidden: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """hidden + branch, hidden with B rows where all timesteps share it."""
    if hidden.shape[0] == branch.shape[0]:
        return hidden + branch
    return (hidden + branch.unflatten(0, (-1, hidden.shape[0]))).flatten(0, 1)


def shared_skip_layer_norm_linear(
    hidden: torch.Tensor, skip: torch.Tensor, norm: Any, linear: Any
) -> torch.Tensor:
    """linear(norm(concat(hidden, skip))), the skip's half of both computed once for all timesteps.

    With mean m and deviation s over both halves, linear(norm(x)) = (W'x - m W'1) / s + W b + c,
    where W' = W * diag(weight of the norm): W' is split, and its part of the skip runs on B rows.

    Args:
        hidden: [K*B, N, C].
        skip: [B, N, D], or [K*B, N, D] where it is not shared.
        norm: LayerNorm over C + D.
        linear: Linear from C + D.

    Returns:
        [K*B, N, C_out].
    """
    rows = hidden.shape[0]
    plain = is_plain(norm, nn.LayerNorm, *_NORMS) and norm.weight is not None
    if skip.shape[0] == rows or not (plain and is_plain(linear, nn.Linear)):
        return linear(norm(torch.cat([hidden, all_rows(skip, rows)], dim=-1)))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    own, shared = hidden.to(dtype), skip.to(dtype)
    border, width = hidden.shape[-1], hidden.shape[-1] + skip.shape[-1]
    # Squared deviations, not squares less a squared mean, which cancel in float32.
    sum_shared = shared.sum(-1, keepdim=True)  # [B, N, 1]
    mean = residual(sum_shared, own.sum(-1, keepdim=True)) / width  # [K*B, N, 1]
    # sum (s - m)^2 = sum (s - m_s)^2 + D (m_s - m)^2, the first term once for all timesteps.
    mean_shared = sum_shared / skip.shape[-1]
    spread_shared = (shared - mean_shared).square().sum(-1, keepdim=True)
    offset = residual(mean_shared, -mean)
    variance = residual(spread_shared, (own - mean).square().sum(-1, keepdim=True))
    variance = (variance + skip.shape[-1] * offset.square()) / width
    inverse = torch.rsqrt(variance + norm.eps)  # [K*B, N, 1]

    weight = linear.weight * norm.weight.to(linear.weight.dtype)  # [C_out, C + D]
    constant = linear.weight @ norm.bias.to(linear.weight.dtype)
    if linear.bias is not None:
        constant = constant + linear.bias
    from_skip = F.linear((shared - mean_shared).to(skip.dtype), weight[:, border:])  # [B, N, C_out]
    from_own = F.linear((own - mean).to(hidden.dtype), weight[:, :border])
    # What centring the skip by its own mean left out, a rank-one term.
    left = offset.to(hidden.dtype) * weight[:, border:].sum(1)
    return residual(from_skip, from_own + left) * inverse.to(hidden.dtype) + constant


def cross_attention(
    attention: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None = None,
    rotary: Any = None,
) -> torch.Tensor:
    """Attention of K*B rows to B rows of text, whose keys and values are made once.

    Args:
        attention: diffusers' `Attention`, called whole where it is not plain.
        hidden: [K*B, N, C].
        text: [B, L, D].
        mask: [B, 1, L] bias, or None.
        rotary: cosines and sines for the queries (Hunyuan), or None.

    Returns:
        [K*B, N, C].
    """
    timesteps = hidden.shape[0] // text.shape[0]
    kwargs = {} if rotary is None else {"image_rotary_emb": rotary}
    if not _is_plain_attention(attention):
        if timesteps > 1:
            tell_once(attention)
        return attention(
            hidden,
            encoder_hidden_states=repeat_rows(text, timesteps),
            attention_mask=repeat_rows(mask, timesteps),
            **kwargs,
        )
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    heads = attention.heads
    query, key = attention.to_q(hidden), attention.to_k(text)
    if attention.norm_q is not None or rotary is not None:
        query = _by_head(query, heads, attention.norm_q, rotary)
    if attention.norm_k is not None:
        key = _by_head(key, heads, attention.norm_k, None)
    out = functional.cross_timestep_attention(
        query, key, attention.to_v(text), heads, attention_bias=mask
    )
    for layer in attention.to_out:
        out = layer(out)
    return out


def _by_head(tokens: torch.Tensor, heads: int, norm: Any, rotary: Any) -> torch.Tensor:
    """Norm and rotary embedding of every head's part of [rows, N, C]."""
    split = tokens.unflatten(-1, (heads, -1)).transpose(1, 2)  # [rows, heads, N, C / heads]
    if norm is not None:
        split = norm(split)
    if rotary is not None:
        split = apply_rotary_emb(split, rotary)
    return split.transpose(1, 2).flatten(2).to(tokens.dtype)


def _is_plain_attention(attention: Any) -> bool:
    """Whether attention is its projections, norms of queries and keys, and nothing else."""
    return (
        is_plain(attention, "Attention")
        and is_named(attention.processor, "AttnProcessor2_0", "HunyuanAttnProcessor2_0")
        and attention.inner_dim == attention.inner_kv_dim
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and all(
            getattr(attention, name) is None
            for name in ("group_norm", "spatial_norm", "added_kv_proj_dim")
        )
    )


def is_plain_norm(norm: Any) -> bool:
    """Whether a norm is a LayerNorm over the last axis that nothing is attached to."""
    return is_plain(norm, nn.LayerNorm, *_NORMS) and len(norm.normalized_shape) == 1
