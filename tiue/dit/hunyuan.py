"""Hunyuan-DiT in one pass: long skips, a UNet's shape without its resolutions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanDiT2DModel

from tiue.dit.blocks import (
    adaptive_layer_norm,
    all_rows,
    cross_attention,
    is_plain_norm,
    recomputed,
    residual,
    shared_skip_layer_norm_linear,
)
from tiue.dit.student import OnePassTransformer, TransformerFeatures, shared_timestep
from tiue.errors import InputError
from tiue.schedule import OnePassSchedule
from tiue_kernels.nn.layers import is_plain, repeat_rows, tell_once


class TiUEHunyuanDiT2DModel(OnePassTransformer, HunyuanDiT2DModel):
    """A `HunyuanDiT2DModel` whose first blocks run once and whose last run K timesteps.

    The later half of the blocks reads outputs of the earlier half: those of shared blocks are never
    repeated, their share of norm and projection is computed once (`shared_skip_layer_norm_linear`).
    Text, its keys and values, the pooled conditions and the rotary tables are computed once too.
    """

    PARENT = HunyuanDiT2DModel
    BLOCKS = "blocks"

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        schedule: OnePassSchedule | None = None,
        **conditioning: Any,
    ) -> Any:
        """One timestep as the parent computes it; with a schedule, the one pass's weighted sum."""
        if schedule is None:
            return super().forward(
                hidden_states, timestep, encoder_hidden_states, *args,
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
        text_embedding_mask: torch.Tensor | None = None,
        encoder_hidden_states_t5: torch.Tensor | None = None,
        text_embedding_mask_t5: torch.Tensor | None = None,
        image_meta_size: torch.Tensor | None = None,
        style: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        controlnet_block_samples: list[torch.Tensor] | None = None,
    ) -> TransformerFeatures:
        """Run patches, text projection and the shared blocks once.

        Args:
            sample: [B, C, H, W].
            timestep: the shared blocks' timestep, a scalar.
            encoder_hidden_states: [B, L, D], of the CLIP text encoder.
            text_embedding_mask: [B, L], 1 = keep.
            encoder_hidden_states_t5: [B, L5, D5], of the T5 encoder.
            text_embedding_mask_t5: [B, L5], 1 = keep.
            image_meta_size: [B, 6], where the model was trained with it.
            style: [B], likewise.
            image_rotary_emb: cosines and sines [N, head_dim].
            controlnet_block_samples: ControlNet's, added to the skips once, for all k.

        Returns:
            The features that `decode` takes, any number of times.

        Raises:
            InputError: shapes that do not fit, or conditions that are missing.
        """
        grid = self._check_inputs(sample, encoder_hidden_states)
        needed = {
            "text_embedding_mask": text_embedding_mask,
            "encoder_hidden_states_t5": encoder_hidden_states_t5,
            "text_embedding_mask_t5": text_embedding_mask_t5,
        }
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise InputError(f"Hunyuan-DiT needs {', '.join(missing)} too")
        assert text_embedding_mask is not None
        assert text_embedding_mask_t5 is not None
        assert encoder_hidden_states_t5 is not None
        hidden = self.pos_embed(sample)
        dtype = hidden.dtype
        constant = self._constant_conditions(
            encoder_hidden_states_t5, image_meta_size, style, dtype
        )
        temb = self._embed_timesteps(shared_timestep(timestep, sample), dtype) + constant

        text_t5 = self.text_embedder(encoder_hidden_states_t5.flatten(0, 1))
        text_t5 = text_t5.unflatten(0, encoder_hidden_states_t5.shape[:2])
        text = torch.cat([encoder_hidden_states, text_t5], dim=1)
        kept = torch.cat([text_embedding_mask, text_embedding_mask_t5], dim=-1)
        text = torch.where(kept.unsqueeze(2).bool(), text, self.text_embedding_padding)

        skips: list[torch.Tensor] = []
        control = list(controlnet_block_samples or ())
        given = {"image_rotary_emb": image_rotary_emb, "constant": constant}
        for layer in range(self.num_shared_blocks):
            hidden = self._run_layer(layer, hidden, text, temb, given, skips, control)
        given["control"] = tuple(control)
        return TransformerFeatures(hidden, text, grid, tuple(skips), given)

    def _decode_tokens(
        self, features: TransformerFeatures, timesteps: torch.Tensor
    ) -> torch.Tensor:
        given, hidden = features.conditioning, features.hidden
        count, batch = len(timesteps), hidden.shape[0]
        # [K, 1, D] + [B, D]: what the timestep adds to what it does not change.
        temb = self._embed_timesteps(timesteps, hidden.dtype).unsqueeze(1) + given["constant"]
        temb = temb.flatten(0, 1)
        skips, control = list(features.skips), list(given["control"])
        for layer in range(self.num_shared_blocks, len(self.blocks)):
            hidden = self._run_layer(layer, hidden, features.text, temb, given, skips, control)
        if control:
            raise InputError(f"{len(control)} of the ControlNet's samples meet no skip connection")
        return self.norm_out(all_rows(hidden, count * batch), temb.to(torch.float32))

    def _run_layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        given: dict[str, Any],
        skips: list[torch.Tensor],
        control: list[torch.Tensor],
    ) -> torch.Tensor:
        """Run a block, and take from and put on `skips` what it reads and is read of it."""
        skip = None
        if layer > len(self.blocks) // 2:
            skip = skips.pop()
            if control:
                skip = residual(control.pop(), skip)
        hidden = _block(
            self.blocks[layer], hidden, text, temb, given["image_rotary_emb"], skip,
            self.recompute_feed_forward,
        )  # fmt: skip
        if layer < len(self.blocks) // 2 - 1:
            skips.append(hidden)
        return hidden

    def _embed_timesteps(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        embed = self.time_extra_emb
        return embed.timestep_embedder(embed.time_proj(timesteps).to(dtype))

    def _constant_conditions(
        self,
        text_t5: torch.Tensor,
        image_meta_size: torch.Tensor | None,
        style: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[B, D]: pooled text, sizes and style, which no timestep changes."""
        embed = self.time_extra_emb
        parts = [embed.pooler(text_t5)]
        if embed.use_style_cond_and_image_meta_size:
            if image_meta_size is None or style is None:
                raise InputError(
                    "this Hunyuan-DiT was trained with sizes and style as conditions: give"
                    " image_meta_size [B, 6] and style [B]"
                )
            sizes = embed.size_proj(image_meta_size.reshape(-1)).to(dtype)
            parts += [sizes.view(-1, 6 * 256), embed.style_embedder(style)]
        return embed.extra_embedder(torch.cat(parts, dim=1))


def _block(
    block: Any,
    hidden: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    rotary: Any,
    skip: torch.Tensor | None,
    recompute_feed_forward: bool,
) -> torch.Tensor:
    """[B or K*B, N, C] -> rows of temb."""
    rows = temb.shape[0]
    timesteps = rows // text.shape[0]
    if not _is_plain_block(block):
        if timesteps > 1:
            tell_once(block)
        return block(
            all_rows(hidden, rows),
            temb=temb,
            encoder_hidden_states=repeat_rows(text, timesteps),
            image_rotary_emb=rotary,
            skip=None if skip is None else all_rows(skip, rows),
        )
    if block.skip_linear is not None:
        assert skip is not None
        if hidden.shape[0] < skip.shape[0]:
            hidden = all_rows(hidden, skip.shape[0])
        hidden = shared_skip_layer_norm_linear(hidden, skip, block.skip_norm, block.skip_linear)
    norm = block.norm1
    shift = norm.linear(norm.silu(temb.to(torch.float32)).to(temb.dtype))
    tokens = adaptive_layer_norm(norm.norm, hidden, shift)
    hidden = residual(hidden, block.attn1(tokens, image_rotary_emb=rotary))
    tokens = cross_attention(block.attn2, block.norm2(hidden), text, rotary=rotary)
    hidden = hidden + tokens
    branch = recomputed(recompute_feed_forward, lambda own: block.ff(block.norm3(own)), hidden)
    return hidden + branch


def _is_plain_block(block: Any) -> bool:
    return (
        is_plain(block, "HunyuanDiTBlock")
        and is_plain(block.norm1, "AdaLayerNormShift")
        and is_plain_norm(block.norm1.norm)
    )
