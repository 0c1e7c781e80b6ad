"""The up blocks for K timesteps over shared encoder features, taken apart as far as is exact.

Every piece is one of diffusers' own modules. A piece is taken apart only when it is plain: of the
exact class, without hooks, called through its own `forward`. Anything that an adapter wraps is
called whole, over repeated shared tensors: right, only slower, and said once in the log.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import logging
from torch import nn

from tiue_kernels import functional

logger = logging.get_logger(__name__)
_told: set[str] = set()


@dataclass
class SharedContext:
    """What the K timesteps share beside the features, and the repeated form for whole calls.

    Attributes:
        timesteps: K.
        encoder_hidden_states: [B, L, D], or a tuple whose first entry is that (IP-Adapter).
        attention_mask: [B, 1, keys] bias of self-attention, or None.
        encoder_attention_mask: [B, 1, L] bias of cross-attention, or None.
        cross_attention_kwargs: what custom attention processors are given.
    """

    timesteps: int
    encoder_hidden_states: Any
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any] | None

    @cached_property
    def repeated(self) -> dict[str, Any]:
        """Arguments of an attention layer that is called whole, with K*B rows."""
        kwargs = self.cross_attention_kwargs
        if kwargs is not None and "gligen" in kwargs:
            kwargs = {**kwargs, "gligen": repeat_rows(kwargs["gligen"], self.timesteps)}
        return {
            "encoder_hidden_states": repeat_rows(self.encoder_hidden_states, self.timesteps),
            "attention_mask": repeat_rows(self.attention_mask, self.timesteps),
            "encoder_attention_mask": repeat_rows(self.encoder_attention_mask, self.timesteps),
            "cross_attention_kwargs": kwargs,
        }


@dataclass
class Rows:
    """A feature map on its way through the decoder.

    Attributes:
        value: [B, C, H, W] while no timestep differs, [K*B, C, H, W] after.
        shared: whether it still has B rows.
    """

    value: torch.Tensor
    shared: bool

    def repeated(self, timesteps: int) -> torch.Tensor:
        """[K*B, C, H, W]."""
        return repeat_rows(self.value, timesteps) if self.shared else self.value


def decode_up_block(
    block: Any,
    rows: Rows,
    skips: tuple[torch.Tensor, ...],
    time_embedding: torch.Tensor,
    context: SharedContext,
    upsample_size: torch.Size | None,
) -> Rows:
    """Run one up block for K timesteps.

    Args:
        block: an up block of diffusers.
        rows: what the block before gave.
        skips: the block's encoder features [B, C_s, H, W], in the encoder's order.
        time_embedding: [K*B, E].
        context: text, masks and adapter arguments.
        upsample_size: height and width to upsample to, where they are no exact double.

    Returns:
        The block's output, K*B rows.
    """
    timesteps = context.timesteps
    freeu = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    if freeu or not is_plain(block, UpBlock2D, CrossAttnUpBlock2D):
        _tell_once(block)
        arguments = context.repeated if getattr(block, "has_cross_attention", False) else {}
        out = block(
            hidden_states=rows.repeated(timesteps),
            temb=time_embedding,
            res_hidden_states_tuple=repeat_rows(skips, timesteps),
            upsample_size=upsample_size,
            **arguments,
        )
        return Rows(out, shared=False)

    checkpointing = torch.is_grad_enabled() and block.gradient_checkpointing
    run = block._gradient_checkpointing_func if checkpointing else _call
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    hidden = rows
    for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
        value = run(_decode_resnet, resnet, hidden.value, hidden.shared, skip, time_embedding)
        if attention is not None:
            value = _decode_transformer(attention, value, context)
        hidden = Rows(value, shared=False)

    value = hidden.value
    for upsampler in block.upsamplers or ():
        value = _upsample(upsampler, value, upsample_size)
    return Rows(value, shared=False)


def _decode_resnet(
    resnet: Any,
    hidden: torch.Tensor,
    shared: bool,
    skip: torch.Tensor,
    time_embedding: torch.Tensor,
) -> torch.Tensor:
    """[K*B or B (shared), C_h, H, W] and skip [B, C_s, H, W] -> [K*B, C_out, H, W]."""
    timesteps = time_embedding.shape[0] // max(skip.shape[0], 1)
    if not _is_separable(resnet):
        _tell_once(resnet)
        rows = repeat_rows(hidden, timesteps) if shared else hidden
        return resnet(torch.cat([rows, repeat_rows(skip, timesteps)], dim=1), time_embedding)

    norm1, conv1, norm2, shortcut = resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv_shortcut
    residual: tuple[torch.Tensor | None, torch.Tensor]
    if shared:  # saving 1: the rows part only where the time embedding is added
        joined = torch.cat([hidden, skip], dim=1)
        conv_hidden, conv_shared = None, _conv2d(conv1, resnet.nonlinearity(norm1(joined)))
        residual = (None, _conv2d(shortcut, joined))
    else:  # saving 2: the skip's half of every convolution once
        parts = functional.shared_skip_group_norm_silu(
            hidden, skip, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps
        )
        conv_hidden, conv_shared = functional.split_conv2d(
            *parts, conv1.weight, conv1.bias, padding=conv1.padding
        )
        residual = functional.split_conv2d(hidden, skip, shortcut.weight, shortcut.bias)

    if not resnet.skip_time_act:
        time_embedding = resnet.nonlinearity(time_embedding)
    out = functional.broadcast_add_group_norm_silu(
        conv_hidden,
        conv_shared,
        resnet.time_emb_proj(time_embedding),
        norm2.num_groups,
        norm2.weight,
        norm2.bias,
        norm2.eps,
        scale_shift=resnet.time_embedding_norm == "scale_shift",
    )
    out = _conv2d(resnet.conv2, resnet.dropout(out))
    residual_hidden, residual_shared = residual
    if residual_hidden is not None:
        out = out + residual_hidden
    out = (out.unflatten(0, (timesteps, skip.shape[0])) + residual_shared).flatten(0, 1)
    return out if resnet.output_scale_factor == 1.0 else out / resnet.output_scale_factor


def _upsample(
    upsampler: Any, hidden: torch.Tensor, upsample_size: torch.Size | None
) -> torch.Tensor:
    """[K*B, C, H, W] -> [K*B, C, 2 H, 2 W], or `upsample_size` where that is no exact double."""
    height, width = hidden.shape[2:]
    if (
        upsample_size not in (None, (2 * height, 2 * width))
        or not is_plain(upsampler, Upsample2D)
        or not (upsampler.use_conv and upsampler.interpolate and upsampler.name == "conv")
        or upsampler.use_conv_transpose
        or upsampler.norm is not None
        or not _is_plain_conv(upsampler.conv)
        or upsampler.conv.kernel_size != (3, 3)
    ):
        return upsampler(hidden, upsample_size)
    return functional.upsample_conv2d(hidden, upsampler.conv.weight, upsampler.conv.bias)


def _is_separable(resnet: Any) -> bool:
    """Whether norm, convolution and shortcut of a resnet can be split at the skip's border."""
    return (
        is_plain(resnet, ResnetBlock2D)
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.time_emb_proj is not None
        and is_plain(resnet.nonlinearity, nn.SiLU)
        and all(
            is_plain(norm, nn.GroupNorm) and norm.affine for norm in (resnet.norm1, resnet.norm2)
        )
        and all(_is_plain_conv(conv) for conv in (resnet.conv1, resnet.conv_shortcut))
    )


def _decode_transformer(
    transformer: Any, hidden: torch.Tensor, context: SharedContext
) -> torch.Tensor:
    """[K*B, C, H, W] -> [K*B, C, H, W], text keys and values once for all timesteps."""
    kwargs = context.cross_attention_kwargs
    plain = is_plain(transformer, Transformer2DModel) and transformer.is_input_continuous
    if kwargs or not plain:
        _tell_once(transformer)
        return transformer(hidden, **context.repeated, return_dict=False)[0]

    rows, _, height, width = hidden.shape
    tokens, inner_dim = transformer._operate_on_continuous_inputs(hidden)
    checkpointing = torch.is_grad_enabled() and transformer.gradient_checkpointing
    run = transformer._gradient_checkpointing_func if checkpointing else _call
    for block in transformer.transformer_blocks:
        tokens = run(_decode_transformer_block, block, tokens, context)
    return transformer._get_output_for_continuous_inputs(
        tokens, hidden, rows, height, width, inner_dim
    )


def _decode_transformer_block(
    block: Any, tokens: torch.Tensor, context: SharedContext
) -> torch.Tensor:
    """[K*B, H*W, C] -> [K*B, H*W, C]."""
    if not _is_layer_norm_block(block):
        _tell_once(block)
        return block(tokens, **context.repeated)

    mask = repeat_rows(context.attention_mask, context.timesteps)
    tokens = block.attn1(block.norm1(tokens), attention_mask=mask) + tokens
    tokens = _cross_attention(block.attn2, block.norm2(tokens), context) + tokens
    return _feed_forward(block.ff, block.norm3(tokens)) + tokens


def _is_layer_norm_block(block: Any) -> bool:
    return (
        is_plain(block, BasicTransformerBlock)
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and block._chunk_size is None
    )


def _cross_attention(attention: Any, tokens: torch.Tensor, context: SharedContext) -> torch.Tensor:
    """[K*B, H*W, C] -> [K*B, H*W, C]; the projections are called as modules, adapters and all."""
    if not _is_plain_attention(attention):
        _tell_once(attention)
        repeated = context.repeated
        return attention(
            tokens,
            encoder_hidden_states=repeated["encoder_hidden_states"],
            attention_mask=repeated["encoder_attention_mask"],
        )

    text = context.encoder_hidden_states
    if attention.norm_cross is not None:
        text = attention.norm_encoder_hidden_states(text)
    out = functional.cross_timestep_attention(  # saving 3
        attention.to_q(tokens),
        attention.to_k(text),
        attention.to_v(text),
        attention.heads,
        attention_bias=context.encoder_attention_mask,
    )
    for layer in attention.to_out:
        out = layer(out)
    return out


def _is_plain_attention(attention: Any) -> bool:
    return (
        is_plain(attention, Attention)
        and type(attention.processor) is AttnProcessor2_0
        and attention.inner_dim == attention.inner_kv_dim
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and all(
            getattr(attention, name) is None
            for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim")
        )
    )


def _feed_forward(feed_forward: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [..., C]."""
    if not (is_plain(feed_forward, FeedForward) and is_plain(feed_forward.net[0], GEGLU)):
        return feed_forward(tokens)
    gate, dropout, *rest = feed_forward.net
    idle = is_plain(dropout, nn.Dropout) and (dropout.p == 0 or not dropout.training)
    if idle and is_plain(gate.proj, nn.Linear) and is_plain(rest[0], nn.Linear):
        linear, *rest = rest
        tokens = functional.geglu_feed_forward(
            tokens, gate.proj.weight, gate.proj.bias, linear.weight, linear.bias
        )
    else:
        tokens = dropout(functional.geglu(gate.proj(tokens)))
    for layer in rest:
        tokens = layer(tokens)
    return tokens


def is_plain(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes and is called through its own forward.

    A hook, an adapter that wraps the layer, a parametrization (another class) or a replaced
    `forward` (accelerate's offloading) would be left out if the module were taken apart.
    """
    return (
        type(module) in classes
        and "forward" not in vars(module)
        and not any(
            getattr(module, hooks)
            for hooks in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        )
    )


def _is_plain_conv(conv: Any) -> bool:
    return (
        is_plain(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.groups == 1
        and set(conv.stride) == set(conv.dilation) == {1}
    )


def _conv2d(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution, called through its adapter where it has one."""
    if not _is_plain_conv(conv):
        return conv(x)
    return functional.conv2d(x, conv.weight, conv.bias, conv.padding)


def repeat_rows(value: Any, timesteps: int) -> Any:
    """Repeat B rows to K*B timestep-major rows, in tensors, tuples, lists and dicts of them."""
    if isinstance(value, torch.Tensor):
        return value.repeat(timesteps, *[1] * (value.ndim - 1))
    if isinstance(value, (tuple, list)):
        return type(value)(repeat_rows(entry, timesteps) for entry in value)
    if isinstance(value, dict):
        return {key: repeat_rows(entry, timesteps) for key, entry in value.items()}
    return value


def _call(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return function(*args)


def _tell_once(module: nn.Module) -> None:
    name = type(module).__name__
    if name not in _told:
        _told.add(name)
        logger.warning(
            f"A {name} of the decoder is called whole, over repeated encoder features, because an "
            "adapter, a hook, FreeU or an option changes it: exact, but slower. Said once."
        )
