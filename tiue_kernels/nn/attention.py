"""The transformer block, over K timesteps that share a text, and as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tiue_kernels.functional import cross_timestep_attention, layer_norm_linear
from tiue_kernels.nn.activations import feed_forward
from tiue_kernels.nn.fused import Fused
from tiue_kernels.nn.layers import (
    is_affine_layer_norm,
    is_named,
    is_plain,
    repeat_rows,
    tell_once,
)
from tiue_kernels.nn.low_rank import linear, weights_of


class FusedBasicTransformerBlock(Fused):
    """Stands for diffusers' `BasicTransformerBlock` with layer norms, as Stable Diffusion's are.

    Attributes:
        recompute_feed_forward: set it to run the feed-forward's first product again in backward
            rather than to keep it.
    """

    STANDS_FOR = "BasicTransformerBlock"
    recompute_feed_forward = False

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        if module.norm_type != "layer_norm" or module.pos_embed is not None:
            return "has another norm than LayerNorm, or position embeddings"
        if module.attn2 is None or module.only_cross_attention:
            return "has no self-attention, or no cross-attention"
        if module._chunk_size is not None:
            return "has its feed-forward in chunks"
        if getattr(module, "fuser", None) is not None:
            return "has gated attention (GLIGEN)"
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: [K*B, N, C]; K is 1 unless several timesteps share a text.
            attention_mask: [B, 1, N] bias of self-attention.
            encoder_hidden_states: [B, L, D] text.
            encoder_attention_mask: [B, 1, L] bias of cross-attention.
            timestep: not read, like the last two: blocks with layer norms have no use for it.
            cross_attention_kwargs: what custom attention processors are given.
            class_labels: not read.
            added_cond_kwargs: not read.

        Returns:
            [K*B, N, C].

        Raises:
            ValueError: the shapes do not fit together.
        """
        return transformer_block(
            self,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            encoder_attention_mask,
            cross_attention_kwargs,
            self.recompute_feed_forward,
        )


def transformer_block(
    block: Any,
    tokens: torch.Tensor,
    encoder_hidden_states: Any = None,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    recompute_feed_forward: bool = False,
) -> torch.Tensor:
    """A transformer block whose K timesteps read the same text: its keys and values made once.

    Args:
        block: a `BasicTransformerBlock` with layer norms, self- and cross-attention.
        tokens: [K*B, N, C].
        encoder_hidden_states: [B, L, D] text, or a tuple whose first entry is that (IP-Adapter).
        attention_mask: [B, 1, N] bias of self-attention, or None.
        encoder_attention_mask: [B, 1, L] bias of cross-attention, or None.
        attention_kwargs: what custom attention processors are given.
        recompute_feed_forward: whether backward runs the feed-forward's first product again.

    Returns:
        [K*B, N, C].
    """
    kwargs = attention_kwargs or {}
    text = encoder_hidden_states
    first = text[0] if isinstance(text, (tuple, list)) else text
    timesteps = 1 if first is None else tokens.shape[0] // max(first.shape[0], 1)
    out = _self_attention(block.norm1, block.attn1, tokens, attention_mask, timesteps, kwargs)
    tokens = out + tokens
    out = _cross_attention(
        block.norm2, block.attn2, tokens, text, encoder_attention_mask, timesteps, kwargs
    )
    tokens = out + tokens
    return feed_forward(block.norm3, block.ff, tokens, recompute_feed_forward) + tokens


def _self_attention(
    norm: Any,
    attention: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    timesteps: int,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """[K*B, N, C] -> [K*B, N, C]; every row reads its own keys and values."""
    if mask is not None or kwargs or not _is_plain_attention(attention):
        return attention(norm(tokens), attention_mask=repeat_rows(mask, timesteps), **kwargs)
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = _norm_project(norm, projections, tokens)
    out = cross_timestep_attention(query, key, value, attention.heads)
    for layer in attention.to_out:
        out = linear(layer, out)
    return out


def _cross_attention(
    norm: Any,
    attention: Any,
    tokens: torch.Tensor,
    text: Any,
    mask: torch.Tensor | None,
    timesteps: int,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """[K*B, N, C] -> [K*B, N, C]; the projections are called as modules, adapters and all."""
    plain = _is_plain_attention(attention)
    if not plain and timesteps > 1:
        tell_once(attention)
    if kwargs or not plain or not isinstance(text, torch.Tensor):
        return attention(
            norm(tokens),
            encoder_hidden_states=repeat_rows(text, timesteps),
            attention_mask=repeat_rows(mask, timesteps),
            **kwargs,
        )

    if attention.norm_cross is not None:
        text = attention.norm_encoder_hidden_states(text)
    (query,) = _norm_project(norm, (attention.to_q,), tokens)
    out = cross_timestep_attention(
        query, attention.to_k(text), attention.to_v(text), attention.heads, attention_bias=mask
    )
    for layer in attention.to_out:
        out = linear(layer, out)
    return out


def _norm_project(
    norm: Any, projections: tuple[Any, ...], tokens: torch.Tensor
) -> list[torch.Tensor]:
    """projection_i(norm(tokens)) each; through the modules where one is not plain."""
    known = [weights_of(layer, nn.Linear) for layer in projections]
    parts = [part for part in known if part is not None and part.bias is None]
    if len(parts) < len(projections) or not is_affine_layer_norm(norm):
        tokens = norm(tokens)
        return [layer(tokens) for layer in projections]
    positions = math.prod(tokens.shape[:-1])
    beside = [part.runs_beside(positions) for part in parts]
    weights = [
        part.layer.weight if aside else part.merged(slot)
        for slot, (part, aside) in enumerate(zip(parts, beside, strict=True))
    ]
    weights += [part.down for part, aside in zip(parts, beside, strict=True) if aside]
    out = layer_norm_linear(tokens, norm.weight, norm.bias, weights, norm.eps)
    low = iter(out[len(parts) :])
    return [
        full + part.raised(next(low)) if aside else full
        for full, part, aside in zip(out, parts, beside, strict=False)
    ]


def _is_plain_attention(attention: Any) -> bool:
    return (
        is_plain(attention, "Attention")
        and is_named(attention.processor, "AttnProcessor2_0")
        and attention.inner_dim == attention.inner_kv_dim
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and all(
            getattr(attention, name) is None
            for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim")
        )
    )
