"""Transformer blocks over K timesteps, taken apart where their parts do not depend on k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    if gate.dtype == hidden.dtype == branch.dtype:
        return functional.gated_residual(hidden, gate, branch)
    return residual(hidden, gate.unsqueeze(1) * branch)


def recomputed(enabled: bool, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """A function of tensors whose inner tensors backward computes again, where that is on.

    It stops at the last one that backward reads: of a feed-forward, before its second product.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def feed_forward(
    feed: Any, norm: Callable[..., torch.Tensor], *given: torch.Tensor, recompute: bool
) -> torch.Tensor:
    """feed(norm(*given)), whose norm and activation backward computes again, and does not keep.

    Args:
        feed: diffusers' `FeedForward`.
        norm: norm and modulation.
        given: what norm reads.
        recompute: whether backward runs the first product again too.

    Returns:
        As `given[0]`.
    """
    plain = is_plain(feed, "FeedForward") and is_plain(feed.net[0], "GELU")
    if recompute or not plain:
        return recomputed(recompute, lambda *own: feed(norm(*own)), *given)
    first, *others = feed.net

    def end(projection: torch.Tensor) -> torch.Tensor:
        tokens = first.gelu(projection)
        for layer in others:
            tokens = layer(tokens)
        return tokens

    return recomputed(True, end, recomputed(True, lambda *own: first.proj(norm(*own)), *given))


def residual(hidden: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """hidden + branch, hidden with B rows where all timesteps share it."""
    if hidden.shape[0] == branch.shape[0]:
        return hidden + branch
    return (hidden + branch.unflatten(0, (-1, hidden.shape[0]))).flatten(0, 1)


def shared_skip_layer_norm_linear(
    hidden: torch.Tensor, skip: torch.Tensor, norm: Any, linear: Any
) -> torch.Tensor:
    """linear(norm(concat(hidden, skip))), the skip's half of both computed once for all timesteps.

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
    return functional.shared_skip_layer_norm_linear(
        hidden, skip, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps
    )


def self_attention(
    attention: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of every row's tokens to themselves.

    Args:
        attention: diffusers' `Attention`, called whole where it is not plain.
        hidden: [rows, N, C].
        mask: [rows, 1, N] bias, or None.

    Returns:
        [rows, N, C].
    """
    if _is_plain_attention(attention) and not attention.norm_cross:
        return cross_attention(attention, hidden, hidden, mask)
    return attention(hidden, attention_mask=mask)


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
