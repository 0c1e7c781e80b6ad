"""Stable Diffusion 3 and 3.5 in one pass: joint attention of text and picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils.peft_utils import apply_lora_scale

from tiue.dit.blocks import (
    adaptive_layer_norm,
    all_rows,
    feed_forward,
    is_plain_attention,
    is_plain_norm,
    join,
    joint_attention,
    modulated_projections,
    self_attention,
)
from tiue.dit.student import OnePassTransformer, TransformerFeatures, shared_timestep
from tiue.errors import InputError
from tiue.schedule import OnePassSchedule
from tiue_kernels.nn.layers import is_plain


class TiUESD3Transformer2DModel(OnePassTransformer, SD3Transformer2DModel):
    """A `SD3Transformer2DModel` whose first blocks run once and whose last run K timesteps.

    Text is changed by every block here, so only the shared blocks' work, the pooled text and the
    first decoder block's norms are saved.
    """

    PARENT = SD3Transformer2DModel

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        schedule: OnePassSchedule | None = None,
        **conditioning: Any,
    ) -> Any:
        """One timestep as the parent computes it; with a schedule, the one pass's weighted sum."""
        if schedule is None:
            return super().forward(
                hidden_states, encoder_hidden_states, pooled_projections, timestep, *args,
                return_dict=return_dict, **conditioning,
            )  # fmt: skip
        assert encoder_hidden_states is not None
        return self._run_pass(
            schedule, return_dict, hidden_states, encoder_hidden_states,
            pooled_projections=pooled_projections, **conditioning,
        )  # fmt: skip

    def encode(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> TransformerFeatures:
        """Run patches, text projection and the shared blocks once.

        Args:
            sample: [B, C, H, W].
            timestep: the shared blocks' timestep, a scalar.
            encoder_hidden_states: [B, L, D].
            pooled_projections: [B, P], the pooled text.
            joint_attention_kwargs: "scale" weighs a LoRA.

        Returns:
            The features that `decode` takes, any number of times.

        Raises:
            InputError: shapes that do not fit, pooled text that is missing, an IP-Adapter.
        """
        grid = self._check_inputs(sample, encoder_hidden_states)
        if pooled_projections is None:
            raise InputError("Stable Diffusion 3 needs pooled_projections [B, P] too")
        if joint_attention_kwargs and "ip_adapter_image_embeds" in joint_attention_kwargs:
            raise InputError(
                "IP-Adapters of Stable Diffusion 3 depend on the timestep in every block and have"
                " no one pass: leave ip_adapter_image_embeds out"
            )
        return self._encode(
            sample,
            timestep,
            encoder_hidden_states,
            pooled_projections,
            grid,
            joint_attention_kwargs=joint_attention_kwargs,
        )

    @apply_lora_scale("joint_attention_kwargs")
    def _encode(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor,
        pooled: torch.Tensor,
        grid: tuple[int, int],
        joint_attention_kwargs: dict[str, Any] | None,
    ) -> TransformerFeatures:
        hidden = self.pos_embed(sample).contiguous()
        pooled_embedding = self.time_text_embed.text_embedder(pooled)
        temb = self._embed_timesteps(shared_timestep(timestep, sample), pooled) + pooled_embedding
        text = self.context_embedder(text)
        for block in self.shared_blocks:
            text, hidden = self._run(block, hidden, text, temb, joint_attention_kwargs)
        given = {
            "pooled_projections": pooled,
            "pooled_embedding": pooled_embedding,
            "joint_attention_kwargs": joint_attention_kwargs,
        }
        return TransformerFeatures(hidden, text, grid, conditioning=given)

    def _decode_tokens(
        self, features: TransformerFeatures, timesteps: torch.Tensor
    ) -> torch.Tensor:
        kwargs = features.conditioning["joint_attention_kwargs"]
        return self._decode_all(features, timesteps, joint_attention_kwargs=kwargs)

    @apply_lora_scale("joint_attention_kwargs")
    def _decode_all(
        self,
        features: TransformerFeatures,
        timesteps: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        given, hidden, text = features.conditioning, features.hidden, features.text
        times = self._embed_timesteps(timesteps, given["pooled_projections"])
        temb = (times.unsqueeze(1) + given["pooled_embedding"]).flatten(0, 1)  # [K*B, C]
        for block in self.decoder_blocks:
            if not joint_attention_kwargs and _is_plain(block):
                text, hidden = self._run(
                    _decoder_block, block, hidden, text, temb, self.recompute_feed_forward,
                    decoder=True,
                )  # fmt: skip
            else:
                hidden, text = all_rows(hidden, len(temb)), all_rows(text, len(temb))
                text, hidden = self._run(
                    block, hidden, text, temb, joint_attention_kwargs, decoder=True
                )
        return self.norm_out(hidden, temb)

    def _embed_timesteps(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        embed = self.time_text_embed
        return embed.timestep_embedder(embed.time_proj(timesteps).to(like.dtype))


def _decoder_block(
    block: Any, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A block whose modulation has K*B rows; norms once where tokens and text have B of them."""
    attention, norm, norm_context = block.attn, block.norm1, block.norm1_context
    signal = norm.linear(norm.silu(temb))
    shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = signal.chunk(
        9 if block.use_dual_attention else 6, dim=1
    )
    text_signal = norm_context.linear(norm_context.silu(temb))
    if block.context_pre_only:
        text_scale, text_shift = text_signal.chunk(2, dim=1)
    else:
        parts = text_signal.chunk(6, dim=1)
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = parts
    given = (norm.norm, hidden, shift, scale)
    given_text = (norm_context.norm, text, text_shift, text_scale)
    if is_plain_attention(attention, joint=True):
        layers = (attention.to_q, attention.to_k, attention.to_v)
        text_layers = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        tokens, words = joint_attention(
            attention,
            modulated_projections(*given, layers),
            modulated_projections(*given_text, text_layers),
        )
        out, text_out = attention.to_out, [attention.to_add_out]
    else:
        tokens, words = attention(
            hidden_states=adaptive_layer_norm(*given),
            encoder_hidden_states=adaptive_layer_norm(*given_text),
        )
        out, text_out = [], []
    joined = join(hidden, gate, tokens, out)
    if dual:
        dual_shift, dual_scale, dual_gate = dual
        tokens, out = self_attention(
            block.attn2, norm.norm, hidden, dual_shift, dual_scale, joint=True
        )
        joined = join(joined, dual_gate, tokens, out)
    hidden = feed_forward(block.ff, block.norm2, joined, shift_ff, scale_ff, gate_ff, recompute)
    if block.context_pre_only:
        return None, hidden
    text = join(text, text_gate, words, text_out)
    text = feed_forward(
        block.ff_context, block.norm2_context, text, text_shift_ff, text_scale_ff, text_gate_ff,
        recompute,
    )  # fmt: skip
    return text, hidden


def _is_plain(block: Any) -> bool:
    norms = ("AdaLayerNormZero", "AdaLayerNormContinuous", "SD35AdaLayerNormZeroX")
    return (
        is_plain(block, "JointTransformerBlock")
        and block._chunk_size is None
        and is_plain(block.norm1, *norms)
        and is_plain(block.norm1_context, *norms)
        and all(is_plain_norm(norm.norm) for norm in (block.norm1, block.norm1_context))
    )
