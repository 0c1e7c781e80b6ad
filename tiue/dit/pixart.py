"""PixArt-alpha and -sigma in one pass (adaLN-single, cross-attention)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin

from tiue.dit.blocks import (
    adaptive_layer_norm,
    all_rows,
    cross_attention,
    feed_forward,
    is_plain_norm,
    join,
    residual,
    self_attention,
)
from tiue.dit.student import OnePassTransformer, TransformerFeatures, shared_timestep
from tiue.errors import InputError
from tiue.features import mask_to_bias
from tiue.schedule import OnePassSchedule
from tiue_kernels.nn.layers import is_plain, repeat_rows, tell_once


class TiUEPixArtTransformer2DModel(OnePassTransformer, PeftAdapterMixin, PixArtTransformer2DModel):
    """A `PixArtTransformer2DModel` whose first blocks run once and whose last run K timesteps.

    What does not depend on the timestep is computed once: patches, positions, caption projection,
    text keys and values of every block, the first decoder block's layer norm. Takes adapters
    (`add_adapter`), which diffusers' own does not.
    """

    PARENT = PixArtTransformer2DModel

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        schedule: OnePassSchedule | None = None,
        **conditioning: Any,
    ) -> Any:
        """One timestep as the parent computes it; with a schedule, the one pass's weighted sum."""
        if schedule is None:
            return super().forward(
                hidden_states, encoder_hidden_states, timestep, *args,
                return_dict=return_dict, **conditioning,
            )  # fmt: skip
        assert encoder_hidden_states is not None
        return self._run_pass(
            schedule, return_dict, hidden_states, encoder_hidden_states, **conditioning
        )

    def encode(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> TransformerFeatures:
        """Run patches, caption projection and the shared blocks once.

        Args:
            sample: [B, C, H, W].
            timestep: the shared blocks' timestep, a scalar.
            encoder_hidden_states: [B, L, D], the caption's embeddings.
            added_cond_kwargs: `resolution` [B, 2] and `aspect_ratio` [B, 1], where the model was
                trained with them.
            cross_attention_kwargs: for custom attention processors.
            attention_mask: [B, N], 1 = keep, or a bias [B, 1, N].
            encoder_attention_mask: [B, L], 1 = keep, or a bias [B, 1, L].

        Returns:
            The features that `decode` takes, any number of times.

        Raises:
            InputError: shapes that do not fit, or conditions that are missing.
        """
        grid = self._check_inputs(sample, encoder_hidden_states)
        if self.use_additional_conditions and added_cond_kwargs is None:
            raise InputError(
                "this PixArt was trained with its sizes as conditions: give added_cond_kwargs with"
                " resolution [B, 2] and aspect_ratio [B, 1]"
            )
        rows = sample.shape[0]
        hidden = self.pos_embed(sample)
        modulation, _ = self.adaln_single(
            shared_timestep(timestep, sample),
            added_cond_kwargs,
            batch_size=rows,
            hidden_dtype=hidden.dtype,
        )
        text = encoder_hidden_states
        if self.caption_projection is not None:
            text = self.caption_projection(text).view(rows, -1, hidden.shape[-1])
        mask = _bias(attention_mask, sample.dtype)
        text_mask = _bias(encoder_attention_mask, sample.dtype)
        arguments = (mask, text, text_mask, modulation, cross_attention_kwargs, None)
        for block in self.shared_blocks:
            hidden = self._run(block, hidden, *arguments)
        conditioning = {
            "added_cond_kwargs": added_cond_kwargs,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": mask,
            "encoder_attention_mask": text_mask,
        }
        return TransformerFeatures(hidden, text, grid, conditioning=conditioning)

    def _decode_tokens(
        self, features: TransformerFeatures, timesteps: torch.Tensor
    ) -> torch.Tensor:
        count, batch = len(timesteps), features.hidden.shape[0]
        given = features.conditioning
        hidden = features.hidden
        modulation, embedded = self.adaln_single(
            timesteps.repeat_interleave(batch),
            repeat_rows(given["added_cond_kwargs"], count),
            batch_size=count * batch,
            hidden_dtype=hidden.dtype,
        )
        for block in self.decoder_blocks:
            hidden = self._run(
                _decoder_block, block, hidden, features.text, modulation, given,
                self.recompute_feed_forward, decoder=True,
            )  # fmt: skip
        hidden = all_rows(hidden, count * batch)
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).unbind(1)
        return adaptive_layer_norm(self.norm_out, hidden, shift, scale)


def _decoder_block(
    block: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    modulation: torch.Tensor,
    given: dict[str, Any],
    recompute_feed_forward: bool,
) -> torch.Tensor:
    """[B or K*B, N, C] -> [K*B, N, C]."""
    rows = modulation.shape[0]
    timesteps = rows // text.shape[0]
    mask, text_mask = given["attention_mask"], given["encoder_attention_mask"]
    kwargs = given["cross_attention_kwargs"]
    if kwargs or not _is_plain_block(block):
        if timesteps > 1:
            tell_once(block)
        return block(
            all_rows(hidden, rows),
            attention_mask=repeat_rows(mask, timesteps),
            encoder_hidden_states=repeat_rows(text, timesteps),
            encoder_attention_mask=repeat_rows(text_mask, timesteps),
            timestep=modulation,
            cross_attention_kwargs=kwargs,
        )
    table = block.scale_shift_table[None] + modulation.reshape(rows, 6, -1)
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.unbind(1)
    mask = repeat_rows(mask, timesteps)
    tokens, out = self_attention(block.attn1, block.norm1, hidden, shift_attn, scale_attn, mask)
    hidden = join(hidden, gate_attn, tokens, out)
    # PixArt puts no norm before cross-attention; norm2 stands before the feed-forward.
    hidden = residual(hidden, cross_attention(block.attn2, hidden, text, text_mask))
    modulation_ff = (shift_ff, scale_ff, gate_ff)
    return feed_forward(block.ff, block.norm2, hidden, *modulation_ff, recompute_feed_forward)


def _is_plain_block(block: Any) -> bool:
    return (
        is_plain(block, "BasicTransformerBlock")
        and block.norm_type == "ada_norm_single"
        and block.attn2 is not None
        and block._chunk_size is None
        and getattr(block, "fuser", None) is None
        and is_plain_norm(block.norm1)
        and is_plain_norm(block.norm2)
    )


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [B, keys] as a bias; a bias [B, 1, keys] as it is."""
    return mask if mask is None or mask.ndim != 2 else mask_to_bias(mask, dtype)
