"""TiUEUNet: a Stable Diffusion UNet whose encoder runs once and whose decoder runs K timesteps."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from tiue.compiled import compile_call
from tiue.decoder import decode_up_block
from tiue.encoder import encode_down_block, encode_mid_block
from tiue.errors import InputError
from tiue.features import EncoderFeatures, as_timesteps, mask_to_bias
from tiue.loading.unet import LoadableUNet
from tiue.model import OnePassModel
from tiue.schedule import OnePassSchedule
from tiue.stages import untimed
from tiue.unet_blocks import SharedContext
from tiue_kernels import functional
from tiue_kernels.nn import norm_silu_conv
from tiue_kernels.nn.layers import is_plain, repeat_rows
from tiue_kernels.nn.low_rank import weights_of

_log = logging.getLogger(__name__)


class TiUEUNet(OnePassModel, LoadableUNet):
    """A `UNet2DConditionModel` that runs its encoder once and its decoder for K timesteps.

    Same configuration and state dict as its parent, and the same `forward` where no `schedule` is
    given. The one pass is that of TiUE (Li et al., CVPR 2025, arXiv 2505.21960), with the exact
    savings of docs/method.md.

    Attributes:
        recompute_feed_forward: set it to compute the first product of the decoder's feed-forwards
            again in backward, rather than keep it: a third of what the decoder keeps (SD 1.5).
    """

    recompute_feed_forward = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        schedule: OnePassSchedule | None = None,
        stage: Callable[[str], AbstractContextManager[None]] = untimed,
        **conditioning: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """One timestep as the parent computes it; with a schedule, the one pass.

        Guidance may be applied to what the one pass gives as to one model output: both are linear.

        Args:
            sample: [B, C, H, W], scaled as the scheduler wants it.
            timestep: a scalar; with a schedule the encoder's.
            encoder_hidden_states: [B, L, D], the prompt embeddings.
            *args: as the parent's, and as `encode`.
            return_dict: whether to return a `UNet2DConditionOutput` rather than a tuple.
            schedule: the decoder's timesteps and their coefficients E.
            stage: names what runs inside the one pass, to time it.
            **conditioning: as the parent's, and as `encode`.

        Returns:
            [B, C, H, W], differentiable: the model output; with a schedule sum_k E_k eps_k, which
            S z is to be added to.

        Raises:
            InputError: channels or rows that do not fit.
        """
        given = (sample, timestep, encoder_hidden_states, *args)
        if schedule is None:
            return super().forward(*given, return_dict=return_dict, **conditioning)
        if not torch.compiler.is_compiling():
            schedule = schedule.on(sample.device)
        with stage("encoder"):
            features = self.encode(*given, **conditioning)
        with stage("decoder"):
            noise = self.combined_noise(features, schedule)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    @apply_forward_hook
    def encode(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> EncoderFeatures:
        """Run `conv_in`, the down blocks and the mid block once.

        Args:
            sample: [B, C, H, W], scaled as the scheduler wants it.
            timestep: the encoder's timestep, a scalar.
            encoder_hidden_states: [B, L, D], the prompt embeddings.
            class_labels: [B] or [B, D], for UNets with a class embedding.
            timestep_cond: [B, D], added to the time embedding's input (guidance embedding).
            attention_mask: [B, keys] of self-attention, 1 = keep.
            cross_attention_kwargs: for the attention processors; "scale" weighs a LoRA.
            added_cond_kwargs: SDXL's `text_embeds` and `time_ids`, IP-Adapter's `image_embeds`.
            down_block_additional_residuals: ControlNet's, added to the skips once, for all k.
            mid_block_additional_residual: ControlNet's, added after the mid block.
            down_intrablock_additional_residuals: T2I-Adapter's.
            encoder_attention_mask: [B, L], 1 = keep.

        Returns:
            The features that `decode` takes, any number of times.

        Raises:
            InputError: channels or rows that do not fit.
        """
        self._check_inputs(sample, encoder_hidden_states)
        if cross_attention_kwargs is not None and "gligen" in cross_attention_kwargs:
            objs = self.position_net(**cross_attention_kwargs["gligen"])
            cross_attention_kwargs = {**cross_attention_kwargs, "gligen": {"objs": objs}}
        controlnet = None
        if mid_block_additional_residual is not None:
            if down_block_additional_residuals is not None:  # diffusers wants both
                controlnet = (down_block_additional_residuals, mid_block_additional_residual)
        elif down_intrablock_additional_residuals is None:
            # diffusers takes a lone `down_block_additional_residuals` for a T2I-Adapter's.
            down_intrablock_additional_residuals = down_block_additional_residuals
        features = self._encode(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels,
            timestep_cond,
            mask_to_bias(attention_mask, sample.dtype),
            added_cond_kwargs,
            controlnet,
            list(down_intrablock_additional_residuals or ()),
            mask_to_bias(encoder_attention_mask, sample.dtype),
            cross_attention_kwargs=cross_attention_kwargs,
        )
        # `_encode` sees them without the LoRA scale, which the decoder applies again.
        return replace(features, cross_attention_kwargs=cross_attention_kwargs)

    def decode(
        self, features: EncoderFeatures, timesteps: torch.Tensor | Sequence[float]
    ) -> torch.Tensor:
        """Run the decoder for K timesteps in one batch over the same features.

        Args:
            features: from `encode`.
            timesteps: [K].

        Returns:
            [K, B, C, H, W], the model output at each timestep.

        Raises:
            InputError: no timestep.
        """
        timesteps = as_timesteps(timesteps, features.hidden.device)
        norm, conv = self.conv_norm_out, self.conv_out

        def last(hidden: torch.Tensor) -> torch.Tensor:
            if norm is None:
                return conv(hidden)
            return norm_silu_conv(norm, self.conv_act, conv, hidden)

        kwargs = features.cross_attention_kwargs
        out = self._decode(features, timesteps, last, cross_attention_kwargs=kwargs)
        return out.unflatten(0, (len(timesteps), features.hidden.shape[0]))

    @property
    def _has_plain_output(self) -> bool:
        """Whether norm and SiLU before the last convolution can be called as an operator."""
        return is_plain(self.conv_norm_out, nn.GroupNorm) and is_plain(self.conv_act, nn.SiLU)

    def decode_combined(
        self, features: EncoderFeatures, latents: torch.Tensor, schedule: OnePassSchedule
    ) -> torch.Tensor:
        """Decode and combine, the K timesteps summed before the last convolution.

        Equal to `schedule.combine(latents, self.decode(features, schedule.timesteps))` up to
        rounding: sum_k E_k conv_out(a_k) = conv_out(sum_k E_k a_k), the bias scaled by sum_k E_k.

        Args:
            features: from `encode`.
            latents: [B, C, H, W], z, not scaled.
            schedule: timesteps, S and E.

        Returns:
            [B, C, H, W].
        """
        return schedule.add(latents, self.combined_noise(features, schedule))

    def combined_noise(self, features: EncoderFeatures, schedule: OnePassSchedule) -> torch.Tensor:
        """sum_k E_k eps_k: what the K timesteps add to S z, summed before the last convolution.

        Args:
            features: from `encode`.
            schedule: timesteps and E.

        Returns:
            [B, C, H, W].
        """
        norm, weights = self.conv_norm_out, weights_of(self.conv_out, nn.Conv2d)
        if not self._has_plain_output or weights is None:
            outputs = self.decode(features, schedule.timesteps)
            return replace(schedule, latent_coefficient=0.0).combine(outputs[0], outputs)

        def last(hidden: torch.Tensor) -> torch.Tensor:
            hidden = functional.timestep_sum_group_norm_silu(
                *(hidden, schedule.noise_coefficients, norm.num_groups),
                *(norm.weight, norm.bias, norm.eps),
            )
            # Again: the LoRA scale of this call is in force now.
            scaled, conv = weights_of(self.conv_out, nn.Conv2d) or weights, weights.layer
            # A product of tensors, at least float32: a number would be read from the device, which
            # the host would wait for.
            dtype = torch.promote_types(conv.bias.dtype, torch.float32)
            total = schedule.noise_coefficients.to(hidden.device, dtype).sum()
            bias = (conv.bias * total).to(conv.bias.dtype)
            return F.conv2d(hidden, scaled.merged(), bias, conv.stride, conv.padding)

        timesteps = as_timesteps(schedule.timesteps, features.hidden.device)
        kwargs = features.cross_attention_kwargs
        return self._decode(features, timesteps, last, cross_attention_kwargs=kwargs)

    def _noise(
        self,
        sample: torch.Tensor,
        schedule: OnePassSchedule,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """By one call of the UNet, hooks and all."""
        timestep, options = schedule.encoder_timestep, {"schedule": schedule, "return_dict": False}
        return self(sample, timestep, prompt_embeds, **options, **conditioning)[0]

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers', with a word that it changes nothing here.

        The attention processors of a UNet know no backends in diffusers either, and keep torch's.

        Args:
            backend: one of diffusers' names.

        Raises:
            ValueError: it is none of them.
        """
        super().set_attention_backend(backend)
        known = any(hasattr(p, "_attention_backend") for p in self.attn_processors.values())
        if not known:
            _log.warning(
                "set_attention_backend(%r) changes nothing: a UNet's attention processors know no"
                " backends. Choose with tiue_kernels.use_backend(cross_timestep_attention=...), or"
                " set a processor with set_attn_processor",
                backend,
            )

    def compile_one_pass(
        self, backend: str | None = None, **options: Any
    ) -> Callable[..., torch.Tensor]:
        """Make a faster `one_pass`, with its arguments; weights may change under it at any time.

        Args:
            backend: as `tiue.compiled.compile_call`: on a GPU None records CUDA graphs.
            **options: likewise.

        Returns:
            What to call in the place of `one_pass`.
        """
        return compile_call(self.one_pass, [self], backend, **options)

    @apply_lora_scale("cross_attention_kwargs")
    def _encode(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        prompt_embeds: torch.Tensor,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        controlnet: tuple[Sequence[torch.Tensor], torch.Tensor] | None,
        adapter: list[torch.Tensor],
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> EncoderFeatures:
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        embedding = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        class_embedding = self.get_class_embed(sample, class_labels)
        added_embedding = self.get_aug_embed(embedding, prompt_embeds, added_cond_kwargs)
        embedding = self._condition(embedding, class_embedding, added_embedding)
        text = self.process_encoder_hidden_states(prompt_embeds, added_cond_kwargs)
        context = SharedContext(
            timesteps=1,
            encoder_hidden_states=text,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            recompute_feed_forward=self.recompute_feed_forward,
        )

        hidden = self.conv_in(sample)
        skips: tuple[torch.Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            crosses = getattr(block, "has_cross_attention", False)
            residual = adapter.pop(0) if adapter and crosses else None
            hidden, outputs = encode_down_block(block, hidden, embedding, context, residual)
            if adapter and not crosses:
                # diffusers adds in place, so the block's last skip carries the residual too.
                hidden = hidden + adapter.pop(0)
                outputs = (*outputs[:-1], hidden)
            skips += outputs

        if self.mid_block is not None:
            hidden = encode_mid_block(self.mid_block, hidden, embedding, context)
            if adapter and adapter[0].shape == hidden.shape:
                hidden = hidden + adapter.pop(0)
        if controlnet is not None:
            down, mid = controlnet
            skips = tuple(skip + extra for skip, extra in zip(skips, down, strict=True))
            hidden = hidden + mid

        return EncoderFeatures(
            hidden=hidden,
            skips=skips,
            encoder_hidden_states=text,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            timestep_cond=timestep_cond,
            class_embedding=class_embedding,
            added_embedding=added_embedding,
            sample_dtype=sample.dtype,
        )

    @apply_lora_scale("cross_attention_kwargs")
    def _decode(
        self,
        features: EncoderFeatures,
        timesteps: torch.Tensor,
        last: Callable[[torch.Tensor], torch.Tensor],
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """last([K*B, C, H, W] before `conv_norm_out`), under the LoRA scale too."""
        count, batch = len(timesteps), features.hidden.shape[0]
        anchor = features.hidden.new_empty(count * batch, 0, dtype=features.sample_dtype)
        repeated = repeat_rows(
            (features.timestep_cond, features.class_embedding, features.added_embedding), count
        )
        timestep_cond, class_embedding, added_embedding = repeated
        embedding = self.get_time_embed(anchor, timesteps.repeat_interleave(batch))
        embedding = self.time_embedding(embedding, timestep_cond)
        embedding = self._condition(embedding, class_embedding, added_embedding)
        context = SharedContext(
            timesteps=count,
            encoder_hidden_states=features.encoder_hidden_states,
            attention_mask=features.attention_mask,
            encoder_attention_mask=features.encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            recompute_feed_forward=self.recompute_feed_forward,
        )

        skips = features.skips
        factor = 2**self.num_upsamplers
        exact = all(size % factor == 0 for size in skips[0].shape[2:])
        hidden = features.hidden
        for block in self.up_blocks:
            border = len(skips) - len(block.resnets)
            skips, block_skips = skips[:border], skips[border:]
            upsample_size = skips[-1].shape[2:] if skips and not exact else None
            hidden = decode_up_block(block, hidden, block_skips, embedding, context, upsample_size)
        return last(hidden)

    def _condition(
        self,
        embedding: torch.Tensor,
        class_embedding: torch.Tensor | None,
        added_embedding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Time, class and added embeddings of the same rows, joined as the parent joins them."""
        if class_embedding is not None:
            if self.config.class_embeddings_concat:
                embedding = torch.cat([embedding, class_embedding], dim=-1)
            else:
                embedding = embedding + class_embedding
        if added_embedding is not None:
            embedding = embedding + added_embedding
        return embedding if self.time_embed_act is None else self.time_embed_act(embedding)

    def _check_inputs(self, sample: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise InputError(
                f"latents must be [B, {channels}, H, W] for this UNet, got {tuple(sample.shape)}"
            )
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != sample.shape[0]:
            raise InputError(
                f"prompt_embeds must be [{sample.shape[0]}, L, D], one row for each of the "
                f"latents, got {tuple(prompt_embeds.shape)}"
            )
