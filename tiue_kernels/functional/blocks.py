"""The blocks of a Stable Diffusion UNet, built of the operators: one path for all who run them.

A block is any module with the attributes of diffusers' class of that name: diffusers' own or a
fused one of `tiue_kernels.nn`. Its layers are taken apart where they are plain and called where an
adapter, a hook or an option changes them, so the result is the block's own in every case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiue_kernels.functional.convolutions import (
    broadcast_add_group_norm_silu_conv2d,
    conv2d,
    group_norm_silu_conv2d,
    shared_skip_group_norm_silu_conv2d,
    split_conv2d,
    upsample_conv2d,
)
from tiue_kernels.functional.norms import broadcast_add_group_norm_silu
from tiue_kernels.functional.transformers import (
    cross_timestep_attention,
    geglu,
    geglu_feed_forward,
    layer_norm_linear,
)
from tiue_kernels.layers import (
    is_affine_group_norm,
    is_affine_layer_norm,
    is_idle,
    is_named,
    is_plain,
    repeat_rows,
    tell_once,
)
from tiue_kernels.low_rank import Weights, linear, weights_of, weights_of_conv


def resnet_block(
    block: Any,
    hidden: torch.Tensor,
    time_embedding: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """A resnet over concat(hidden, skip), in which the timesteps share what does not differ.

    With a skip its half of the first convolution and of the shortcut runs once for all timesteps.
    Where hidden too has B rows beside K*B of the time embedding, the rows part only where that is
    added.

    Args:
        block: a `ResnetBlock2D` without up- or downsampling inside.
        hidden: [K*B, C_h, H, W], or [B, C_h, H, W] while no row differs.
        time_embedding: [K*B, E], where the block takes one.
        skip: [B, C_s, H, W]; None where hidden is the whole input.

    Returns:
        [K*B, C_out, H, W].
    """
    rows = hidden.shape[0] if time_embedding is None else time_embedding.shape[0]
    if skip is not None and hidden.shape[0] < rows:
        hidden, skip = torch.cat([hidden, skip], dim=1), None
    convs = None if skip is None else _split_convs(block)
    if skip is not None and convs is None:
        tell_once(block)
        skip = repeat_rows(skip, rows // max(skip.shape[0], 1))
        hidden, skip = torch.cat([hidden, skip], dim=1), None

    norm, shortcut = block.norm1, block.conv_shortcut
    if skip is None or convs is None:
        shared = norm_silu_conv(norm, block.nonlinearity, block.conv1, hidden)
        out = _second_half(block, None, shared, time_embedding)
        residual = hidden if shortcut is None else _conv2d(shortcut, hidden)
    else:
        own, shared = convs[0].apply(
            lambda weight, bias: shared_skip_group_norm_silu_conv2d(
                *(hidden, skip, *_norm(norm), weight, bias, norm.eps, convs[0].layer.padding)
            ),
            _pixels(hidden),
        )
        out = _second_half(block, own, shared, time_embedding)
        own, residual = convs[1].apply(
            lambda weight, bias: split_conv2d(hidden, skip, weight, bias), _pixels(hidden)
        )
        out = out + own
    out = _add_shared(out, residual)
    return out if block.output_scale_factor == 1.0 else out / block.output_scale_factor


def _split_convs(block: Any) -> tuple[Weights, Weights] | None:
    """Convolution and shortcut where they can be split at the skip's border."""
    if not (is_plain(block.nonlinearity, nn.SiLU) and is_affine_group_norm(block.norm1)):
        return None
    conv, shortcut = weights_of_conv(block.conv1), weights_of_conv(block.conv_shortcut)
    return None if conv is None or shortcut is None else (conv, shortcut)


def _second_half(
    block: Any,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor | None,
) -> torch.Tensor:
    """hidden [K*B, C, H, W] or None, plus shared [B, ...] and embedding; norm, SiLU, conv2."""
    norm, conv, activation = block.norm2, block.conv2, block.nonlinearity
    if block.time_emb_proj is None or time_embedding is None:
        shared = shared if hidden is None else _add_shared(hidden, shared)
        return norm_silu_conv(norm, activation, conv, shared, block.dropout)
    if not block.skip_time_act:
        time_embedding = activation(time_embedding)
    projected = block.time_emb_proj(time_embedding)

    scale_shift = block.time_embedding_norm == "scale_shift"
    if is_affine_group_norm(norm) and is_plain(activation, nn.SiLU):
        inputs = (hidden, shared, projected, *_norm(norm))
        weights = weights_of_conv(conv)
        if weights is not None and is_idle(block.dropout):
            return weights.apply(
                lambda weight, bias: broadcast_add_group_norm_silu_conv2d(
                    *inputs, weight, bias, norm.eps, scale_shift, weights.layer.padding
                ),
                projected.shape[0] * shared.shape[2:].numel(),
            )
        out = broadcast_add_group_norm_silu(*inputs, norm.eps, scale_shift)
        return _conv2d(conv, block.dropout(out))

    out = repeat_rows(shared, projected.shape[0] // max(shared.shape[0], 1))
    out = out if hidden is None else hidden + out
    projected = projected[:, :, None, None]
    if scale_shift:
        scale, shift = projected.chunk(2, dim=1)
        out = norm(out) * (1 + scale) + shift
    else:
        out = norm(out + projected)
    return _conv2d(conv, block.dropout(activation(out)))


def norm_silu_conv(
    norm: Any, activation: Any, conv: Any, x: torch.Tensor, dropout: Any = None
) -> torch.Tensor:
    """conv(dropout(activation(norm(x)))), fused where the layers are GroupNorm, SiLU and a conv.

    Args:
        norm: `nn.GroupNorm`, or what stands for it.
        activation: `nn.SiLU`, or what stands for it.
        conv: `nn.Conv2d`, or what stands for it.
        x: [rows, C, H, W].
        dropout: between activation and convolution; None for none.

    Returns:
        [rows, C_out, H', W'].
    """
    idle = dropout is None or is_idle(dropout)
    weights = weights_of_conv(conv)
    plain = is_affine_group_norm(norm) and is_plain(activation, nn.SiLU)
    if idle and plain and weights is not None:
        return weights.apply(
            lambda weight, bias: group_norm_silu_conv2d(
                x, *_norm(norm), weight, bias, norm.eps, weights.layer.padding
            ),
            _pixels(x),
        )
    x = activation(norm(x))
    return _conv2d(conv, x if dropout is None else dropout(x))


def upsampler(block: Any, hidden: torch.Tensor, size: Any = None) -> torch.Tensor:
    """Nearest upsampling and a convolution.

    Args:
        block: an `Upsample2D`.
        hidden: [rows, C, H, W].
        size: height and width to upsample to; twice those of hidden by default.

    Returns:
        [rows, C, 2 H, 2 W], or of the given size.
    """
    weights = weights_of_conv(block.conv)
    height, width = hidden.shape[2:]
    exact = size is None or tuple(size) == (2 * height, 2 * width)
    if exact and weights is not None:
        conv = weights.layer
        if conv.kernel_size == (3, 3) and set(conv.padding) == {1}:
            return weights.apply(
                lambda weight, bias: upsample_conv2d(hidden, weight, bias), _pixels(hidden)
            )
    size = (2 * height, 2 * width) if size is None else size
    return block.conv(nn.functional.interpolate(hidden, size=tuple(size), mode="nearest"))


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
    positions = tokens.shape[:-1].numel()
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


def feed_forward(
    norm: Any, block: Any, tokens: torch.Tensor, recompute_projection: bool = False
) -> torch.Tensor:
    """block(norm(tokens)), fused where the block is a plain GEGLU feed-forward.

    Args:
        norm: `nn.LayerNorm`, or what stands for it.
        block: a `FeedForward`.
        tokens: [..., C].
        recompute_projection: whether backward runs the first product again.

    Returns:
        [..., C].
    """
    if not (is_plain(block, "FeedForward") and is_plain(block.net[0], "GEGLU", "FusedGEGLU")):
        return block(norm(tokens))
    gate, dropout, *rest = block.net
    weights = [weights_of(layer, nn.Linear) for layer in (gate.proj, rest[0])]
    positions = tokens.shape[:-1].numel()
    first, second = (None if w is None or w.runs_beside(positions) else w for w in weights)
    if is_idle(dropout) and first is not None and second is not None:
        fused = is_affine_layer_norm(norm)
        tokens = geglu_feed_forward(
            tokens if fused else norm(tokens),
            *(first.merged(0), first.bias, second.merged(1), second.bias),
            norm_weight=norm.weight if fused else None,
            norm_bias=norm.bias if fused else None,
            eps=norm.eps if fused else 0.0,
            recompute_projection=recompute_projection,
        )
        rest = rest[1:]
    else:
        tokens = dropout(geglu(linear(gate.proj, norm(tokens))))
    for layer in rest:
        tokens = linear(layer, tokens)
    return tokens


def _norm(norm: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    return norm.num_groups, norm.weight, norm.bias


def _conv2d(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution, called through its adapter where it has one."""
    weights = weights_of_conv(conv)
    if weights is None:
        return conv(x)
    padding = weights.layer.padding
    return weights.apply(lambda weight, bias: conv2d(x, weight, bias, padding), _pixels(x))


def _pixels(x: torch.Tensor) -> int:
    """Rows times pixels of [rows, C, H, W]."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def _add_shared(rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[K*B, ...] + [B, ...], row by row; as many rows on both sides are added as they are."""
    if rows.shape[0] == shared.shape[0]:
        return rows + shared
    return (rows.unflatten(0, (-1, shared.shape[0])) + shared).flatten(0, 1)
