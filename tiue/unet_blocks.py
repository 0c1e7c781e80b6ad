"""Resnets and transformers of the encoder and the decoder, taken apart as far as is exact.

A layer is taken apart, into the block functions of `tiue_kernels.nn`, only when it is
plain: of a class that they stand for, without hooks, called through its own `forward`. Any other
is called whole, over repeated shared tensors: right, only slower, and said once in the log.
What may read other rows of its batch than its own is called once a timestep, with B rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from tiue_kernels import functional
from tiue_kernels.layout import memory_format
from tiue_kernels.nn import (
    FusedBasicTransformerBlock,
    FusedResnetBlock2D,
    resnet_block,
    transformer_block,
)
from tiue_kernels.nn.layers import is_affine_group_norm, is_plain, repeat_rows, tell_once
from tiue_kernels.nn.low_rank import Weights, weights_of, weights_of_conv


@dataclass
class SharedContext:
    """What the K timesteps share beside the features, and the repeated form for whole calls.

    Attributes:
        timesteps: K.
        encoder_hidden_states: [B, L, D], or a tuple whose first entry is that (IP-Adapter).
        attention_mask: [B, 1, keys] bias of self-attention, or None.
        encoder_attention_mask: [B, 1, L] bias of cross-attention, or None.
        cross_attention_kwargs: what custom attention processors are given.
        recompute_feed_forward: whether backward runs the feed-forwards' first product again.
    """

    timesteps: int
    encoder_hidden_states: Any
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any] | None
    recompute_feed_forward: bool = False
    _repeated: dict[str, Any] | None = None

    def tell_once(self, module: nn.Module) -> None:
        """Says that a module is called whole, where that repeats something."""
        if self.timesteps > 1:
            tell_once(module)

    @property
    def repeated(self) -> dict[str, Any]:
        """Arguments of an attention layer that is called whole, with K*B rows."""
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot trace.
        if self._repeated is None:
            self._repeated = self._repeat()
        return self._repeated

    def _repeat(self) -> dict[str, Any]:
        kwargs = self.cross_attention_kwargs
        if kwargs is not None and "gligen" in kwargs:
            kwargs = {**kwargs, "gligen": repeat_rows(kwargs["gligen"], self.timesteps)}
        return {
            "encoder_hidden_states": repeat_rows(self.encoder_hidden_states, self.timesteps),
            "attention_mask": repeat_rows(self.attention_mask, self.timesteps),
            "encoder_attention_mask": repeat_rows(self.encoder_attention_mask, self.timesteps),
            "cross_attention_kwargs": kwargs,
        }


def run_resnet(
    resnet: Any,
    hidden: torch.Tensor,
    time_embedding: torch.Tensor,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden of K*B or B rows, and in the decoder a skip [B, C_s, H, W] -> [K*B, C_out, H, W]."""
    if FusedResnetBlock2D.stands_for(resnet):
        return resnet_block(resnet, hidden, time_embedding, skip)
    if skip is None:
        return resnet(hidden, time_embedding)
    tell_once(resnet)
    rows = all_rows(hidden, time_embedding)
    return resnet(torch.cat([rows, all_rows(skip, time_embedding)], dim=1), time_embedding)


def run_transformer(transformer: Any, hidden: torch.Tensor, context: SharedContext) -> torch.Tensor:
    """[K*B, C, H, W] -> [K*B, C, H, W], text keys and values once for all timesteps."""
    if context.timesteps > 1 and mixes_rows(transformer):
        context.tell_once(transformer)
        alone = replace(context, timesteps=1, _repeated=None)
        rows = hidden.unflatten(0, (context.timesteps, -1))
        return torch.cat([run_transformer(transformer, own, alone) for own in rows])

    kwargs = context.cross_attention_kwargs
    plain = is_plain(transformer, "Transformer2DModel") and transformer.is_input_continuous
    if kwargs or not plain:
        context.tell_once(transformer)
        return transformer(hidden, **context.repeated, return_dict=False)[0]

    tokens, inner_dim = _tokens(transformer, hidden)
    checkpointing = torch.is_grad_enabled() and transformer.gradient_checkpointing
    run = transformer._gradient_checkpointing_func if checkpointing else call
    for block in transformer.transformer_blocks:
        tokens = run(_transformer_block, block, tokens, context)
    return _map(transformer, tokens, hidden, inner_dim)


def _tokens(transformer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[K*B, C, H, W] -> [K*B, H*W, inner_dim] and inner_dim: norm and projection in."""
    norm, weights = transformer.norm, _projection(transformer.proj_in)
    if weights is None or not is_affine_group_norm(norm):
        return transformer._operate_on_continuous_inputs(hidden)
    tokens = weights.apply(
        lambda weight, bias: functional.group_norm_linear(
            hidden, norm.num_groups, norm.weight, norm.bias, weight.flatten(1), bias, norm.eps
        ),
        hidden.shape[0] * hidden.shape[2] * hidden.shape[3],
    )
    return tokens, tokens.shape[-1]


def _map(
    transformer: Any, tokens: torch.Tensor, residual: torch.Tensor, inner_dim: int
) -> torch.Tensor:
    """[K*B, H*W, inner_dim] and [K*B, C, H, W] -> [K*B, C, H, W]: projection out and sum."""
    rows, _, height, width = residual.shape
    weights = _projection(transformer.proj_out)
    in_place = memory_format(residual) == torch.channels_last  # tokens are such a map already
    if weights is None or weights.runs_beside(math.prod(tokens.shape[:-1])):
        in_place = False
    elif weights.down is not None:
        in_place = True
    if weights is None or not in_place:
        return transformer._get_output_for_continuous_inputs(
            tokens, residual, rows, height, width, inner_dim
        )
    out = F.linear(tokens, weights.merged().flatten(1), weights.bias)
    return residual + out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _projection(layer: Any) -> Weights | None:
    """The weights of a linear layer or of a 1 x 1 convolution; None for any other."""
    weights = weights_of(layer, nn.Linear)
    if weights is not None:
        return weights
    weights = weights_of_conv(layer)
    if weights is None or weights.layer.kernel_size != (1, 1) or set(weights.layer.padding) != {0}:
        return None
    return weights


def _transformer_block(block: Any, tokens: torch.Tensor, context: SharedContext) -> torch.Tensor:
    """[K*B, H*W, C] -> [K*B, H*W, C]."""
    if not FusedBasicTransformerBlock.stands_for(block):
        context.tell_once(block)
        return block(tokens, **context.repeated)
    return transformer_block(
        block,
        tokens,
        context.encoder_hidden_states,
        context.attention_mask,
        context.encoder_attention_mask,
        recompute_feed_forward=context.recompute_feed_forward,
    )


def mixes_rows(module: nn.Module) -> bool:
    """Whether an attention processor inside may read other rows of the batch than its own.

    Those of diffusers' models keep to their rows, but for perturbed-attention guidance, which tells
    the guided rows from the rest by their place. What others wrote may do anything.
    """
    # Not `modules()`, a generator in a generator: a pass looks through its decoder once.
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Attention):
            kind = type(part.processor)
            if "PAG" in kind.__name__ or not kind.__module__.startswith("diffusers.models."):
                return True
        waiting += [child for child in part._modules.values() if child is not None]
    return False


def all_rows(tensor: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
    """A tensor of B or K*B rows with the K*B rows of the time embedding, newly written."""
    return repeat_rows(tensor, time_embedding.shape[0] // max(tensor.shape[0], 1))


def call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)
