"""The up blocks for K timesteps over shared encoder features."""

from dataclasses import replace
from typing import Any

import torch

from tiue.unet_blocks import SharedContext, all_rows, call, mixes_rows, run_resnet, run_transformer
from tiue_kernels.nn import FusedUpsample2D
from tiue_kernels.nn import upsampler as run_upsampler
from tiue_kernels.nn.layers import is_plain, repeat_rows, tell_once


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
        if timesteps > 1 and mixes_rows(block):
            alone = replace(context, timesteps=1, _repeated=None)
            rows = (all_rows(hidden, time_embedding), time_embedding)
            parts = zip(*(part.unflatten(0, (timesteps, -1)) for part in rows), strict=True)
            return torch.cat(
                [
                    decode_up_block(block, own, skips, own_embedding, alone, upsample_size)
                    for own, own_embedding in parts
                ]
            )
        arguments = context.repeated if getattr(block, "has_cross_attention", False) else {}
        return block(
            hidden_states=all_rows(hidden, time_embedding),
            temb=time_embedding,
            res_hidden_states_tuple=repeat_rows(skips, timesteps),
            upsample_size=upsample_size,
            **arguments,
        )

    checkpointing = torch.is_grad_enabled() and block.gradient_checkpointing
    run = block._gradient_checkpointing_func if checkpointing else call
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
        hidden = run(run_resnet, resnet, hidden, time_embedding, skip)
        if attention is not None:
            hidden = run_transformer(attention, hidden, context)

    for upsampler in block.upsamplers or ():
        if FusedUpsample2D.stands_for(upsampler):
            hidden = run_upsampler(upsampler, hidden, upsample_size)
        else:
            hidden = upsampler(hidden, upsample_size)
    return hidden
