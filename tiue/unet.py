"""TiUEUNet: a Stable Diffusion UNet whose encoder runs once and whose decoder runs K timesteps."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from tiue.blocks import SharedContext
from tiue.checkpoints import check_architecture, check_unet_config, check_unet_folder
from tiue.compiled import compile_call
from tiue.decoder import decode_up_block
from tiue.encoder import encode_down_block, encode_mid_block
from tiue.errors import ArchitectureError, CheckpointError, InputError
from tiue.schedule import OnePassSchedule
from tiue.weights import load_whole
from tiue_kernels import functional
from tiue_kernels.layers import is_plain, repeat_rows
from tiue_kernels.low_rank import weights_of

T = TypeVar("T", bound="TiUEUNet")

_HUB_ARGUMENTS = {
    "subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"
}  # fmt: skip


@dataclass(frozen=True)
class EncoderFeatures:
    """What the encoder hands to the decoder, all of B rows, shared by every timestep.

    Attributes:
        hidden: [B, C, h, w], after the mid block.
        skips: the down blocks' outputs, in the encoder's order, ControlNet residuals added.
        encoder_hidden_states: the text as cross-attention reads it, [B, L, D] (a tuple with
            IP-Adapter).
        attention_mask: [B, 1, keys] bias of self-attention, or None.
        encoder_attention_mask: [B, 1, L] bias of cross-attention, or None.
        cross_attention_kwargs: what attention processors are given, and the LoRA `scale`.
        timestep_cond: [B, D], beside the timestep (guidance embedding), or None.
        class_embedding: [B, E], or None.
        added_embedding: [B, E], SDXL's size and pooled text, or None.
        sample_dtype: of the latents.
    """

    hidden: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    encoder_hidden_states: Any
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any] | None
    timestep_cond: torch.Tensor | None
    class_embedding: torch.Tensor | None
    added_embedding: torch.Tensor | None
    sample_dtype: torch.dtype


class TiUEUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` that runs its encoder once and its decoder for K timesteps.

    Same configuration, same state dict, same `forward` as its parent. The one pass is that of
    TiUE (Li et al., CVPR 2025, arXiv 2505.21960), with the exact savings of docs/method.md.

    Attributes:
        recompute_feed_forward: set it to compute the first product of the decoder's feed-forwards
            again in backward, rather than keep it: a third of what the decoder keeps (SD 1.5).
    """

    recompute_feed_forward = False

    @classmethod
    def from_pretrained(
        cls: type[T], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> T:
        """Load the weights of any Stable Diffusion UNet; only safetensors are read.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            **kwargs: as diffusers' `from_pretrained` (`subfolder`, `torch_dtype`, ...).

        Returns:
            The student, in eval mode.

        Raises:
            CheckpointError: nothing there, a pickle, or another architecture.
            ArchitectureError: a UNet without cross-attention.
        """
        name, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder")
        check_unet_folder(name, subfolder)
        hub = {k: kwargs[k] for k in _HUB_ARGUMENTS & kwargs.keys()}
        kwargs["use_safetensors"] = True
        try:
            check_unet_config(name, cls.load_config(name, **hub))
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"no UNet could be loaded from {name}: {error}") from error
        unet = load_whole(super().from_pretrained, name, "unet", **kwargs)
        check_architecture(unet)
        return unet

    @classmethod
    def from_unet(cls: type[T], unet: UNet2DConditionModel) -> T:
        """Make a student of a UNet: it shares every module and parameter, nothing is copied.

        Args:
            unet: any Stable Diffusion UNet, adapters and all.

        Returns:
            The student, on the same device and in the same mode.

        Raises:
            ArchitectureError: a UNet without cross-attention, or no `UNet2DConditionModel`.
        """
        if not isinstance(unet, UNet2DConditionModel):
            raise ArchitectureError(
                f"TiUEUNet is made of a diffusers UNet2DConditionModel, not {type(unet).__name__}"
            )
        check_architecture(unet)
        student = cls.__new__(cls)
        # The registries are copied so that a module set on one is not set on the other.
        for name, value in vars(unet).items():
            registry = type(value) in (dict, OrderedDict, set)
            student.__dict__[name] = value.copy() if registry else value
        return student

    def to_json_string(self) -> str:
        """The configuration as plain diffusers loads it, and without the folder it came from."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = UNet2DConditionModel.__name__
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

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
            _mask_to_bias(attention_mask, sample.dtype),
            added_cond_kwargs,
            controlnet,
            list(down_intrablock_additional_residuals or ()),
            _mask_to_bias(encoder_attention_mask, sample.dtype),
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
        timesteps = _as_timesteps(timesteps, features.hidden.device)
        norm, conv = self.conv_norm_out, self.conv_out

        def last(hidden: torch.Tensor) -> torch.Tensor:
            if norm is None:
                return conv(hidden)
            return functional.norm_silu_conv(norm, self.conv_act, conv, hidden)

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
        norm, weights = self.conv_norm_out, weights_of(self.conv_out, nn.Conv2d)
        if not self._has_plain_output or weights is None:
            return schedule.combine(latents, self.decode(features, schedule.timesteps))

        def last(hidden: torch.Tensor) -> torch.Tensor:
            hidden = functional.timestep_sum_group_norm_silu(
                *(hidden, schedule.noise_coefficients, norm.num_groups),
                *(norm.weight, norm.bias, norm.eps),
            )
            scaled, conv = weights_of(self.conv_out, nn.Conv2d), weights.layer
            # A product of tensors, at least float32: a number would be read from the device, which
            # the host would wait for.
            dtype = torch.promote_types(conv.bias.dtype, torch.float32)
            total = schedule.noise_coefficients.to(hidden.device, dtype).sum()
            bias = (conv.bias * total).to(conv.bias.dtype)
            return F.conv2d(hidden, scaled.merged(), bias, conv.stride, conv.padding)

        timesteps = _as_timesteps(schedule.timesteps, features.hidden.device)
        kwargs = features.cross_attention_kwargs
        noise = self._decode(features, timesteps, last, cross_attention_kwargs=kwargs)
        return (schedule.latent_coefficient * latents + noise).to(latents.dtype)

    def predict_noise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor | Sequence[float],
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """The K model outputs of the one pass: encoder at the first timestep, decoder at all.

        Args:
            latents: [B, C, H, W], scaled as the scheduler wants the model's input
                (`OnePassSchedule.scale_model_input`).
            timesteps: [K].
            prompt_embeds: [B, L, D].
            **conditioning: as `encode`: `added_cond_kwargs`, `class_labels`, `timestep_cond`,
                `attention_mask`, `encoder_attention_mask`, `cross_attention_kwargs`, and the
                ControlNet and T2I-Adapter residuals.

        Returns:
            [K, B, C, H, W], differentiable.

        Raises:
            InputError: channels or rows that do not fit, or no timestep.
        """
        timesteps = _as_timesteps(timesteps, latents.device)
        features = self.encode(latents, timesteps[0], prompt_embeds, **conditioning)
        return self.decode(features, timesteps)

    def one_pass(
        self,
        latents: torch.Tensor,
        schedule: OnePassSchedule,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """The whole pass at inference: scale, encode, decode, combine before `conv_out`.

        Args:
            latents: [B, C, H, W], noise of standard deviation `schedule.init_noise_sigma`.
            schedule: timesteps, S and E.
            prompt_embeds: [B, L, D].
            **conditioning: as `predict_noise`.

        Returns:
            [B, C, H, W], the denoised latents.

        Raises:
            InputError: channels or rows that do not fit.
        """
        if not torch.compiler.is_compiling():
            schedule = schedule.on(latents.device)
        model_input = schedule.scale_model_input(latents)
        # Not a decorator: torch.compile would take its arguments for fixed in shape.
        with torch.no_grad():
            features = self.encode(
                model_input, schedule.encoder_timestep, prompt_embeds, **conditioning
            )
            return self.decode_combined(features, latents, schedule)

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


def _as_timesteps(timesteps: torch.Tensor | Sequence[float], device: torch.device) -> torch.Tensor:
    timesteps = torch.as_tensor(timesteps, device=device)
    if timesteps.ndim != 1 or not len(timesteps):
        raise InputError(
            f"timesteps must be [K] with K of at least 1, got shape {tuple(timesteps.shape)}"
        )
    return timesteps


def _mask_to_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, keys] of 1 = keep to a [B, 1, keys] bias, with diffusers' -10000 for discard."""
    if mask is None:
        return None
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
