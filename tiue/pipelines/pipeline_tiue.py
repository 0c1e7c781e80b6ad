"""Text to image in one pass with Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import (
    StableDiffusionPipelineOutput,
    StableDiffusionSafetyChecker,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from tiue.loading import families
from tiue.pipelines.loading import LoadableOnePass
from tiue.unet import TiUEUNet

TiUEPipelineOutput = StableDiffusionPipelineOutput


class TiUEPipeline(LoadableOnePass, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with the UNet's loop replaced by one pass.

    Li et al., CVPR 2025, arXiv 2505.21960. The weights may be any Stable Diffusion's; those that
    were distilled for the one pass make pictures with it. Arguments of a call, adapters, textual
    inversion, VAE slicing and offloading are those of `StableDiffusionPipeline`, as far as they
    have a meaning. No safety checker is loaded unless one is given.

    Args:
        vae: Image decoder.
        text_encoder: Text encoder; None where only `prompt_embeds` will be given.
        tokenizer: Its tokenizer.
        unet: A UNet; one that is no `TiUEUNet` is made into one that shares its parameters.
        scheduler: Any scheduler that `OnePassSchedule` takes.
        safety_checker: Optional, as in `StableDiffusionPipeline`.
        feature_extractor: Optional, for the safety checker and IP-Adapters.
        image_encoder: Optional, for IP-Adapters.
        requires_safety_checker: Whether diffusers warns when there is no safety checker.

    Raises:
        ArchitectureError: The parts do not fit together, or the one pass cannot be formed of the
            UNet.
    """

    family = families.STABLE_DIFFUSION

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: TiUEUNet | UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        if not isinstance(unet, TiUEUNet):
            unet = TiUEUNet.from_unet(unet)
        families.check_parts(unet, vae, self.family, text_encoder)
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )


class TiUEXLPipeline(LoadableOnePass, StableDiffusionXLPipeline):
    """Stable Diffusion XL with the UNet's loop replaced by one pass; otherwise as `TiUEPipeline`.

    Args:
        vae: Image decoder.
        text_encoder: First text encoder; both None where only embeddings will be given.
        text_encoder_2: Second text encoder, whose pooled output the UNet reads too.
        tokenizer: The first's tokenizer.
        tokenizer_2: The second's.
        unet: A UNet; one that is no `TiUEUNet` is made into one that shares its parameters.
        scheduler: Any scheduler that `OnePassSchedule` takes.
        image_encoder: Optional, for IP-Adapters.
        feature_extractor: Optional, for IP-Adapters.
        force_zeros_for_empty_prompt: As in `StableDiffusionXLPipeline`.
        add_watermarker: Likewise.

    Raises:
        ArchitectureError: The parts do not fit together, or the one pass cannot be formed of the
            UNet.
    """

    family = families.STABLE_DIFFUSION_XL

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: TiUEUNet | UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        if not isinstance(unet, TiUEUNet):
            unet = TiUEUNet.from_unet(unet)
        families.check_parts(unet, vae, self.family, text_encoder, text_encoder_2)
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
