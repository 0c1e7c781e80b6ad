"""The down blocks and the mid block, once for all timesteps."""

from typing import Any

import torch

from tiue.unet_blocks import SharedContext, call, run_resnet, run_transformer
from tiue_kernels.nn.layers import is_plain


def encode_down_block(
    block: Any,
    hidden: torch.Tensor,
    time_embedding: torch.Tensor,
    context: SharedContext,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run one down block.

    Args:
        block: a down block of diffusers.
        hidden: [B, C, h, w].
        time_embedding: [B, E].
        context: text, masks and adapter arguments, of one timestep.
        residual: [B, C_out, h, w] of a T2I-Adapter, added before the downsampler; for blocks with
            cross-attention alone.

    Returns:
        What goes on, and the skips.
    """
    crosses = getattr(block, "has_cross_attention", False)
    if not is_plain(block, "DownBlock2D", "CrossAttnDownBlock2D"):
        arguments = context.repeated if crosses else {}
        if residual is not None:
            arguments = {**arguments, "additional_residuals": residual}
        return block(hidden_states=hidden, temb=time_embedding, **arguments)

    checkpointing = torch.is_grad_enabled() and block.gradient_checkpointing
    run = block._gradient_checkpointing_func if checkpointing else call
    skips: tuple[torch.Tensor, ...] = ()
    attentions = block.attentions if crosses else [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        hidden = run(run_resnet, resnet, hidden, time_embedding)
        if attention is not None:
            hidden = run_transformer(attention, hidden, context)
        if residual is not None and resnet is block.resnets[-1]:
            hidden = hidden + residual
        skips += (hidden,)
    if block.downsamplers is not None:
        for downsampler in block.downsamplers:
            hidden = downsampler(hidden)
        skips += (hidden,)
    return hidden, skips


def encode_mid_block(
    block: Any, hidden: torch.Tensor, time_embedding: torch.Tensor, context: SharedContext
) -> torch.Tensor:
    """Run the mid block.

    Args:
        block: a mid block of diffusers.
        hidden: [B, C, h, w].
        time_embedding: [B, E].
        context: text, masks and adapter arguments, of one timestep.

    Returns:
        [B, C, h, w].
    """
    if not is_plain(block, "UNetMidBlock2DCrossAttn"):
        crosses = getattr(block, "has_cross_attention", False)
        return block(hidden, time_embedding, **(context.repeated if crosses else {}))
    checkpointing = torch.is_grad_enabled() and block.gradient_checkpointing
    run = block._gradient_checkpointing_func if checkpointing else call
    hidden = run_resnet(block.resnets[0], hidden, time_embedding)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        hidden = run_transformer(attention, hidden, context)
        hidden = run(run_resnet, resnet, hidden, time_embedding)
    return hidden
