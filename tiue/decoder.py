"""The up blocks for K timesteps over shared encoder features, taken apart as far as is exact.

A block is taken apart, into the block functions of `tiue_kernels.functional`, only when it is
plain: of a class that they stand for, without hooks, called through its own `forward`. Any other
is called whole, over repeated shared tensors: right, only slower, and said once in the log.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiue_kernels import functional
from tiue_kernels.layers import (
    is_affine_group_norm,
    is_plain,
    is_plain_conv,
    repeat_rows,
    tell_once,
)
from tiue_kernels.nn import FusedBasicTransformerBlock, FusedResnetBlock2D, FusedUpsample2D


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


def decode_up_block(
    block: Any,
    hidden: torch.Tensor,
    skips: tuple[torch.Tensor, ...],
    time_embedding: torch.Tensor,
    context: SharedContext,
    upsample_size: torch.Size | None,
) -> torch.Tensor:
    """Run one up block for K timesteps.

    Args:
        block: an up block of diffusers.
        hidden: what the block before gave: [K*B, C, h, w], or [B, C, h, w] after the encoder.
        skips: the block's encoder features [B, C_s, h, w], in the encoder's order.
        time_embedding: [K*B, E].
        context: text, masks and adapter arguments.
        upsample_size: height and width to upsample to, where they are no exact double.

    Returns:
        The block's output, K*B rows.
    """
    timesteps = context.timesteps
    freeu = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    if freeu or not is_plain(block, "UpBlock2D", "CrossAttnUpBlock2D"):
        tell_once(block)
        arguments = context.repeated if getattr(block, "has_cross_attention", False) else {}
        return block(
            hidden_states=_all_rows(hidden, time_embedding),
            temb=time_embedding,
            res_hidden_states_tuple=repeat_rows(skips, timesteps),
            upsample_size=upsample_size,
            **arguments,
        )

    checkpointing = torch.is_grad_enabled() and block.gradient_checkpointing
    run = block._gradient_checkpointing_func if checkpointing else _call
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
        hidden = run(_decode_resnet, resnet, hidden, skip, time_embedding)
        if attention is not None:
            hidden = _decode_transformer(attention, hidden, context)

    for upsampler in block.upsamplers or ():
        if FusedUpsample2D.stands_for(upsampler):
            hidden = functional.upsampler(upsampler, hidden, upsample_size)
        else:
            hidden = upsampler(hidden, upsample_size)
    return hidden


def _decode_resnet(
    resnet: Any, hidden: torch.Tensor, skip: torch.Tensor, time_embedding: torch.Tensor
) -> torch.Tensor:
    """hidden of K*B or B rows and skip [B, C_s, H, W] -> [K*B, C_out, H, W]."""
    if FusedResnetBlock2D.stands_for(resnet):
        return functional.resnet_block(resnet, hidden, time_embedding, skip)
    tell_once(resnet)
    rows = _all_rows(hidden, time_embedding)
    return resnet(torch.cat([rows, _all_rows(skip, time_embedding)], dim=1), time_embedding)


def _decode_transformer(
    transformer: Any, hidden: torch.Tensor, context: SharedContext
) -> torch.Tensor:
    """[K*B, C, H, W] -> [K*B, C, H, W], text keys and values once for all timesteps."""
    kwargs = context.cross_attention_kwargs
    plain = is_plain(transformer, "Transformer2DModel") and transformer.is_input_continuous
    if kwargs or not plain:
        tell_once(transformer)
        return transformer(hidden, **context.repeated, return_dict=False)[0]

    rows, _, height, width = hidden.shape
    tokens, inner_dim = _tokens(transformer, hidden)
    checkpointing = torch.is_grad_enabled() and transformer.gradient_checkpointing
    run = transformer._gradient_checkpointing_func if checkpointing else _call
    for block in transformer.transformer_blocks:
        tokens = run(_decode_transformer_block, block, tokens, context)
    return transformer._get_output_for_continuous_inputs(
        tokens, hidden, rows, height, width, inner_dim
    )


def _tokens(transformer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[K*B, C, H, W] -> [K*B, H*W, inner_dim] and inner_dim: norm and projection in."""
    norm, project = transformer.norm, transformer.proj_in
    is_matrix = is_plain(project, nn.Linear) or (
        is_plain_conv(project) and project.kernel_size == (1, 1) and set(project.padding) == {0}
    )
    if not (is_matrix and is_affine_group_norm(norm)):
        return transformer._operate_on_continuous_inputs(hidden)
    weight = project.weight.flatten(1)
    tokens = functional.group_norm_linear(
        hidden, norm.num_groups, norm.weight, norm.bias, weight, project.bias, norm.eps
    )
    return tokens, weight.shape[0]


def _decode_transformer_block(
    block: Any, tokens: torch.Tensor, context: SharedContext
) -> torch.Tensor:
    """[K*B, H*W, C] -> [K*B, H*W, C]."""
    if not FusedBasicTransformerBlock.stands_for(block):
        tell_once(block)
        return block(tokens, **context.repeated)
    return functional.transformer_block(
        block,
        tokens,
        context.encoder_hidden_states,
        context.attention_mask,
        context.encoder_attention_mask,
        recompute_feed_forward=context.recompute_feed_forward,
    )


def _all_rows(tensor: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
    """A tensor of B or K*B rows with the K*B rows of the time embedding, newly written."""
    return repeat_rows(tensor, time_embedding.shape[0] // max(tensor.shape[0], 1))


def _call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)
