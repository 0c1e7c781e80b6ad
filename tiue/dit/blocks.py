"""Transformer blocks over K timesteps, taken apart where their parts do not depend on k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiue_kernels import functional
from tiue_kernels.nn.layers import is_idle, is_named, is_plain, repeat_rows, tell_once

_NORMS = ("LayerNorm", "FP32LayerNorm")
_PROCESSORS = ("AttnProcessor2_0", "HunyuanAttnProcessor2_0")


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
    if is_bare_norm(norm) and scale is not None and scale.dtype == hidden.dtype:
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


def modulated_projections(
    norm: Any,
    hidden: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    layers: Sequence[Any],
) -> list[torch.Tensor]:
    """layer_i(norm(hidden) * (1 + scale) + shift) each; backward makes the tokens anew.

    Args:
        norm: a LayerNorm.
        hidden: [B, N, C] or [K*B, N, C].
        shift: [K*B, C].
        scale: [K*B, C].
        layers: Linear from C.

    Returns:
        [K*B, N, C_i] each.
    """
    plain = is_bare_norm(norm) and all(is_plain(layer, nn.Linear) for layer in layers)
    if plain and len({layer.bias is None for layer in layers}) == 1:
        weights = [layer.weight for layer in layers]
        biases = None if layers[0].bias is None else [layer.bias for layer in layers]
        return functional.adaptive_layer_norm_linear(
            hidden, scale, shift, weights, biases, norm.eps
        )
    tokens = adaptive_layer_norm(norm, hidden, shift, scale)
    return [layer(tokens) for layer in layers]


def join(
    hidden: torch.Tensor, gate: torch.Tensor, tokens: torch.Tensor, layers: Any
) -> torch.Tensor:
    """hidden + gate * layers(tokens), whose branch is not kept for backward.

    Args:
        hidden: [B, N, C] or [K*B, N, C].
        gate: [K*B, C].
        tokens: [K*B, N, D].
        layers: an attention's output, a list of Linear and Dropout; empty where it has run.

    Returns:
        [K*B, N, C].
    """
    linear = layers[0] if len(layers) else None
    if (
        linear is not None
        and is_plain(linear, nn.Linear)
        and all(is_idle(layer) for layer in list(layers)[1:])
        and _fit(hidden, gate, tokens)
    ):
        hidden = hidden.to(torch.promote_types(hidden.dtype, gate.dtype))  # as under autocast
        return functional.linear_gated_residual(hidden, gate, tokens, linear.weight, linear.bias)
    for layer in layers:
        tokens = layer(tokens)
    return gated_residual(hidden, gate, tokens)


def feed_forward(
    feed: Any,
    norm: Any,
    hidden: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    recompute: bool,
) -> torch.Tensor:
    """hidden + gate * feed(norm(hidden) * (1 + scale) + shift).

    Backward computes norm and activation again, and keeps neither them nor the branch.

    Args:
        feed: diffusers' `FeedForward`.
        norm: a LayerNorm.
        hidden: [B, N, C] or [K*B, N, C].
        shift: [K*B, C].
        scale: [K*B, C].
        gate: [K*B, C].
        recompute: whether backward runs the first product again too.

    Returns:
        [K*B, N, C].
    """
    if is_bare_norm(norm) and _is_plain_feed_forward(feed) and _fit(hidden, scale, gate):
        first, _, last, *_ = feed.net
        return functional.adaptive_feed_forward(
            hidden.to(torch.promote_types(hidden.dtype, gate.dtype)), scale, shift, gate,
            first.proj.weight, first.proj.bias, last.weight, last.bias,
            first.approximate, norm.eps, recompute,
        )  # fmt: skip

    first, *others = feed.net

    def project(*given: torch.Tensor) -> torch.Tensor:
        return first.proj(adaptive_layer_norm(norm, *given))

    def end(projection: torch.Tensor) -> torch.Tensor:
        tokens = first.gelu(projection)
        for layer in others:
            tokens = layer(tokens)
        return tokens

    def whole(*given: torch.Tensor) -> torch.Tensor:
        return feed(adaptive_layer_norm(norm, *given))

    if not recompute and is_plain(feed, "FeedForward") and is_plain(first, "GELU"):  # with LoRAs
        branch = recomputed(True, end, recomputed(True, project, hidden, shift, scale))
    else:
        branch = recomputed(recompute, whole, hidden, shift, scale)
    return gated_residual(hidden, gate, branch)


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
    attention: Any,
    norm: Any,
    hidden: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    mask: torch.Tensor | None = None,
    joint: bool = False,
) -> tuple[torch.Tensor, Any]:
    """Attention of every row's modulated tokens to themselves, for `join`.

    Args:
        attention: diffusers' `Attention`, called whole where it is not plain.
        norm: a LayerNorm.
        hidden: [B, N, C] or [K*B, N, C].
        shift: [K*B, C].
        scale: [K*B, C].
        mask: [K*B, 1, N] bias, or None.
        joint: whether it is one of Stable Diffusion 3's.

    Returns:
        [K*B, N, C], and the layers that are still to run.
    """
    if not is_plain_attention(attention, joint) or attention.norm_cross:
        tokens = adaptive_layer_norm(norm, hidden, shift, scale)
        return attention(tokens, attention_mask=mask), ()
    layers = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = modulated_projections(norm, hidden, shift, scale, layers)
    query = _by_head(query, attention.heads, attention.norm_q)
    key = _by_head(key, attention.heads, attention.norm_k)
    tokens = functional.cross_timestep_attention(
        query, key, value, attention.heads, attention_bias=mask
    )
    return tokens, attention.to_out


def cross_attention(
    attention: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None = None,
    rotary: Any = None,
) -> torch.Tensor:
    """Attention of K*B rows to B rows of text, whose keys and values are made once.

    Backward attends again: keys of a text are few, and queries cost less than what is not kept.

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
    if not is_plain_attention(attention):
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
    query = _by_head(attention.to_q(hidden), heads, attention.norm_q, rotary)
    key = _by_head(attention.to_k(text), heads, attention.norm_k)

    def end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tokens = functional.cross_timestep_attention(query, key, value, heads, attention_bias=mask)
        for layer in attention.to_out:
            tokens = layer(tokens)
        return tokens

    return recomputed(True, end, query, key, attention.to_v(text))


def joint_attention(
    attention: Any, tokens: Sequence[torch.Tensor], words: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of tokens and text to both, before its output layers.

    Args:
        attention: diffusers' `Attention`, a plain one.
        tokens: queries, keys and values [K*B, N, C] of the picture.
        words: those [K*B, L, C] of the text.

    Returns:
        [K*B, N, C] and [K*B, L, C].
    """
    norms = (attention.norm_q, attention.norm_k, None)
    added = (attention.norm_added_q, attention.norm_added_k, None)
    heads = attention.heads
    query, key, value = (
        torch.cat([_by_head(own, heads, norm), _by_head(word, heads, other)], dim=1)
        for own, word, norm, other in zip(tokens, words, norms, added, strict=True)
    )
    out = functional.cross_timestep_attention(query, key, value, heads)
    border = tokens[0].shape[1]
    return out[:, :border], out[:, border:]


def _by_head(tokens: torch.Tensor, heads: int, norm: Any, rotary: Any = None) -> torch.Tensor:
    """Norm and rotary embedding, where there are any, of every head's part of [rows, N, C]."""
    if norm is None and rotary is None:
        return tokens
    split = tokens.unflatten(-1, (heads, -1)).transpose(1, 2)  # [rows, heads, N, C / heads]
    if norm is not None:
        split = norm(split)
    if rotary is not None:
        split = apply_rotary_emb(split, rotary)
    return split.transpose(1, 2).flatten(2).to(tokens.dtype)


def is_plain_attention(attention: Any, joint: bool = False) -> bool:
    """Whether attention is its projections, norms of queries and keys, and nothing else.

    Args:
        attention: diffusers' `Attention`.
        joint: whether it is Stable Diffusion 3's, which may have a text's projections too.
    """
    processors = ("JointAttnProcessor2_0",) if joint else _PROCESSORS
    absent = ("group_norm", "spatial_norm") + (() if joint else ("added_kv_proj_dim",))
    return (
        is_plain(attention, "Attention")
        and is_named(attention.processor, *processors)
        and attention.inner_dim == attention.inner_kv_dim
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and all(getattr(attention, name) is None for name in absent)
    )


def is_plain_norm(norm: Any) -> bool:
    """Whether a norm is a LayerNorm over the last axis that nothing is attached to."""
    return is_plain(norm, nn.LayerNorm, *_NORMS) and len(norm.normalized_shape) == 1


def is_bare_norm(norm: Any) -> bool:
    """Whether a norm is such a LayerNorm, without scale and shift of its own."""
    return is_plain_norm(norm) and norm.weight is None


def _is_plain_feed_forward(feed: Any) -> bool:
    """Whether a feed-forward is two products and a GELU between them."""
    if not (is_plain(feed, "FeedForward") and is_plain(feed.net[0], "GELU")):
        return False
    first, dropout, last, *others = feed.net
    linears = is_plain(first.proj, nn.Linear) and is_plain(last, nn.Linear)
    return linears and all(is_idle(layer) for layer in (dropout, *others))


def _fit(*tensors: torch.Tensor) -> bool:
    """Whether the operators take these dtypes: one, or several that autocast settles."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return True
    return torch.is_autocast_enabled(tensors[0].device.type)
