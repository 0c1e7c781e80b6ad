"""The resnet, over K timesteps that share a skip, and as a module.

Its layers are taken apart where they are plain and called where an adapter, a hook or an option
changes them, so the result is the block's own in every case; so are those of the other blocks here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tiue_kernels.functional import (
    broadcast_add_group_norm_silu,
    broadcast_add_group_norm_silu_conv2d,
    shared_skip_group_norm_silu_conv2d,
    split_conv2d,
)
from tiue_kernels.nn.convolutions import norm_arguments, norm_silu_conv, pixels, run_conv
from tiue_kernels.nn.fused import Fused
from tiue_kernels.nn.layers import (
    is_affine_group_norm,
    is_idle,
    is_plain,
    repeat_rows,
    tell_once,
)
from tiue_kernels.nn.low_rank import Weights, weights_of_conv


class FusedResnetBlock2D(Fused):
    """Stands for diffusers' `ResnetBlock2D`: norm, SiLU and convolution twice, and a shortcut.

    Keeps for backward its input, the first convolution's output and the statistics of the norms.
    """

    STANDS_FOR = "ResnetBlock2D"

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        if module.upsample is not None or module.downsample is not None:
            return "resamples inside"
        return None

    def forward(
        self,
        input_tensor: torch.Tensor,
        temb: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            input_tensor: [K*B, C, H, W]; K is 1 unless several timesteps share a skip.
            temb: [K*B, E] time embedding, where the block takes one.
            skip: [B, C_s, H, W], joined to the channels of the input and shared by the timesteps.

        Returns:
            [K*B, C_out, H, W].

        Raises:
            ValueError: the shapes do not fit together, or a scale and shift has no embedding.
        """
        return resnet_block(self, input_tensor, temb, skip)


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
    plain_silu = is_plain(block.nonlinearity, nn.SiLU)
    convs = _split_convs(block) if skip is not None and plain_silu else None
    if skip is not None and convs is None:
        tell_once(block)
        skip = repeat_rows(skip, rows // max(skip.shape[0], 1))
        hidden, skip = torch.cat([hidden, skip], dim=1), None

    norm, shortcut = block.norm1, block.conv_shortcut
    if skip is None or convs is None:
        shared = norm_silu_conv(
            norm, block.nonlinearity, block.conv1, hidden, plain_silu=plain_silu
        )
        out = _second_half(block, None, shared, time_embedding, plain_silu)
        residual = hidden if shortcut is None else run_conv(shortcut, hidden)
    else:
        own, shared = convs[0].apply(
            lambda weight, bias: shared_skip_group_norm_silu_conv2d(
                *(hidden, skip, *norm_arguments(norm), weight, bias, norm.eps),
                convs[0].layer.padding,
            ),
            pixels(hidden),
        )
        out = _second_half(block, own, shared, time_embedding, plain_silu)
        own, residual = convs[1].apply(
            lambda weight, bias: split_conv2d(hidden, skip, weight, bias), pixels(hidden)
        )
        out = out + own
    out = _add_shared(out, residual)
    return out if block.output_scale_factor == 1.0 else out / block.output_scale_factor


def _split_convs(block: Any) -> tuple[Weights, Weights] | None:
    """Convolution and shortcut where they can be split at the skip's border."""
    if not is_affine_group_norm(block.norm1):
        return None
    conv, shortcut = weights_of_conv(block.conv1), weights_of_conv(block.conv_shortcut)
    return None if conv is None or shortcut is None else (conv, shortcut)


def _second_half(
    block: Any,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor | None,
    plain_silu: bool,
) -> torch.Tensor:
    """hidden [K*B, C, H, W] or None, plus shared [B, ...] and embedding; norm, SiLU, conv2."""
    norm, conv, activation = block.norm2, block.conv2, block.nonlinearity
    if block.time_emb_proj is None or time_embedding is None:
        shared = shared if hidden is None else _add_shared(hidden, shared)
        return norm_silu_conv(norm, activation, conv, shared, block.dropout, plain_silu)
    if not block.skip_time_act:
        time_embedding = activation(time_embedding)
    projected = block.time_emb_proj(time_embedding)

    scale_shift = block.time_embedding_norm == "scale_shift"
    if plain_silu and is_affine_group_norm(norm):
        inputs = (hidden, shared, projected, *norm_arguments(norm))
        weights = weights_of_conv(conv)
        if weights is not None and is_idle(block.dropout):
            return weights.apply(
                lambda weight, bias: broadcast_add_group_norm_silu_conv2d(
                    *inputs, weight, bias, norm.eps, scale_shift, weights.layer.padding
                ),
                projected.shape[0] * math.prod(shared.shape[2:]),
            )
        out = broadcast_add_group_norm_silu(*inputs, norm.eps, scale_shift)
        return run_conv(conv, block.dropout(out))

    out = repeat_rows(shared, projected.shape[0] // max(shared.shape[0], 1))
    out = out if hidden is None else hidden + out
    projected = projected[:, :, None, None]
    if scale_shift:
        scale, shift = projected.chunk(2, dim=1)
        out = norm(out) * (1 + scale) + shift
    else:
        out = norm(out + projected)
    return run_conv(conv, block.dropout(activation(out)))


def _add_shared(rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[K*B, ...] + [B, ...], row by row; as many rows on both sides are added as they are."""
    if rows.shape[0] == shared.shape[0]:
        return rows + shared
    return (rows.unflatten(0, (-1, shared.shape[0])) + shared).flatten(0, 1)
