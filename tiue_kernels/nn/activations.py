"""GEGLU as a module, and the feed-forward around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tiue_kernels.functional import geglu, geglu_feed_forward
from tiue_kernels.nn.fused import Fused
from tiue_kernels.nn.layers import is_affine_layer_norm, is_idle, is_plain
from tiue_kernels.nn.low_rank import linear, weights_of


class FusedGEGLU(Fused):
    """Stands for diffusers' `GEGLU`: a projection, and x1 * gelu(x2) of its halves in one pass."""

    STANDS_FOR = "GEGLU"
    proj: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., D]."""
        return geglu(self.proj(hidden_states))


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
    positions = math.prod(tokens.shape[:-1])
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
