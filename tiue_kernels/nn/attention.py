"""The fused transformer block."""

from __future__ import annotations

from typing import Any

import torch

from tiue_kernels.functional import transformer_block
from tiue_kernels.nn.fused import Fused


class FusedBasicTransformerBlock(Fused):
    """Stands for diffusers' `BasicTransformerBlock` with layer norms, as Stable Diffusion's are.

    Attributes:
        recompute_feed_forward: set it to run the feed-forward's first product again in backward
            rather than to keep it.
    """

    STANDS_FOR = "BasicTransformerBlock"
    recompute_feed_forward = False

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        if module.norm_type != "layer_norm" or module.pos_embed is not None:
            return "has another norm than LayerNorm, or position embeddings"
        if module.attn2 is None or module.only_cross_attention:
            return "has no self-attention, or no cross-attention"
        if module._chunk_size is not None:
            return "has its feed-forward in chunks"
        if getattr(module, "fuser", None) is not None:
            return "has gated attention (GLIGEN)"
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: [K*B, N, C]; K is 1 unless several timesteps share a text.
            attention_mask: [B, 1, N] bias of self-attention.
            encoder_hidden_states: [B, L, D] text.
            encoder_attention_mask: [B, 1, L] bias of cross-attention.
            timestep: not read, like the last two: blocks with layer norms have no use for it.
            cross_attention_kwargs: what custom attention processors are given.
            class_labels: not read.
            added_cond_kwargs: not read.

        Returns:
            [K*B, N, C].

        Raises:
            ValueError: the shapes do not fit together.
        """
        return transformer_block(
            self,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            encoder_attention_mask,
            cross_attention_kwargs,
            self.recompute_feed_forward,
        )
