"""Text to image in one pass: text encoder, UNet encoder once, UNet decoder once, VAE."""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from tiue.checkpoints import pickle_message
from tiue.errors import CheckpointError, InputError, NonFiniteError, SchedulerError, TiUEError
from tiue.pipelines import checkpoint, inputs
from tiue.pipelines.drawing import CompiledDrawing, draw
from tiue.pipelines.stages import Stages
from tiue.schedule import OnePassSchedule
from tiue.unet import TiUEUNet
from tiue.weights import check_classes, load_models

_log = logging.getLogger(__name__)

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


@dataclass
class TiUEPipelineOutput(BaseOutput):
    """What a call of `TiUEPipeline` gives.

    Attributes:
        images: A list of PIL images; an array [B, H, W, 3] in 0..1 for "np", a tensor
            [B, 3, H, W] in 0..1 for "pt", latents [B, C, h, w] for "latent".
        nsfw_content_detected: One bool an image where a safety checker was given, else None.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None = None


class TiUEPipeline(Stages, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with the UNet's loop replaced by one pass.

    Li et al., CVPR 2025, arXiv 2505.21960. The weights may be any Stable Diffusion's; those that
    were distilled for the one pass make pictures with it. Adapters, textual inversion, VAE slicing
    and offloading are those of `StableDiffusionPipeline`. No safety checker is loaded unless one is
    given.

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
        checkpoint.check_parts(unet, vae, text_encoder)
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
        self._schedules: dict[str, OnePassSchedule] = {}
        self._drawing: CompiledDrawing | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> TiUEPipeline:
        """Load a Stable Diffusion 1.x or 2.x pipeline, distilled or not, from safetensors.

        A scheduler in the folder that has no one pass (PNDM, which Stable Diffusion ships with, or
        one that draws noise) is replaced by DDIM with the same noise levels, with a warning; that
        is the scheduler of the method. One that is handed in as `scheduler=` is left as it is.

        Args:
            pretrained_model_name_or_path: A folder in the diffusers layout, or a hub id.
            **kwargs: As in diffusers (`torch_dtype`, `variant`, `revision`, ...), components
                (`unet=TiUEUNet.from_pretrained(...)`) among them.

        Returns:
            The pipeline, on the CPU.

        Raises:
            CheckpointError: Missing, incomplete, pickled, or of another architecture.
            ArchitectureError: The one pass cannot be formed of the UNet.
        """
        model = os.fspath(pretrained_model_name_or_path)
        if not kwargs.setdefault("use_safetensors", True):
            raise InputError("use_safetensors=False: only safetensors are loaded; leave it out")
        try:
            hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            is_local = checkpoint.check_local(model, kwargs)
            index = cls.load_config(model, **hub)
            if not is_local:
                checkpoint.check_index(model, index, kwargs)
            check_classes(model, index, kwargs)
            kwargs.setdefault("safety_checker", None)
            folder = model if is_local else cls.download(model, **kwargs)
            kwargs |= load_models(Path(folder), index, kwargs)
            pipe = super().from_pretrained(model, **kwargs)
        except TiUEError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot load {model} as a Stable Diffusion pipeline: {error}"
            ) from error
        if "scheduler" not in kwargs:
            pipe.scheduler = _one_pass_scheduler(pipe.scheduler)
        return pipe

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> TiUEPipeline:
        """Load a Stable Diffusion checkpoint that is one .safetensors file.

        Args:
            pretrained_model_link_or_path: The file or its link.
            **kwargs: As in diffusers.

        Returns:
            The pipeline, on the CPU.

        Raises:
            CheckpointError: The file is a pickle.
        """
        model = os.fspath(pretrained_model_link_or_path)
        if not model.endswith(".safetensors"):
            raise CheckpointError(pickle_message(model))
        pipe = super().from_single_file(model, **kwargs)
        if "scheduler" not in kwargs:
            pipe.scheduler = _one_pass_scheduler(pipe.scheduler)
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> TiUEPipeline:
        """Make a pipeline of another one's components; nothing is copied.

        Args:
            pipeline: A Stable Diffusion 1.x or 2.x pipeline.
            torch_dtype: Type to bring the shared components to; by default they stay as they are
                (diffusers' own `from_pipe` makes them float32).
            **components: Components to take in the place of the pipeline's. A scheduler is left as
                it is; the pipeline's own is replaced by DDIM where it has no one pass, here only.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: The pipeline is of another architecture.
            ArchitectureError: The one pass cannot be formed of the UNet.
        """
        name = f"the pipeline {pipeline.name_or_path or ''}".strip()
        checkpoint.check_index(name, json.loads(pipeline.to_json_string()), components)
        pipe = cls(**pipeline.components | components)
        if "scheduler" not in components:
            pipe.scheduler = _one_pass_scheduler(pipe.scheduler)
        return pipe if torch_dtype is None else pipe.to(dtype=torch_dtype)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The parent's reading of a model_index.json; a student stands under its diffusers name."""
        result = super().load_config(*args, **kwargs)
        index = result[0] if isinstance(result, tuple) else result
        if index.get("unet", [None])[-1] == TiUEUNet.__name__:
            index["unet"] = ["diffusers", UNet2DConditionModel.__name__]
        return result

    def to_json_string(self) -> str:
        """The model_index.json of a saved folder, one that plain diffusers loads too.

        It names the diffusers classes that the weights belong to, and no folder of this machine.
        """
        index = json.loads(super().to_json_string())
        index |= {
            "_class_name": StableDiffusionPipeline.__name__,
            "unet": ["diffusers", UNet2DConditionModel.__name__],
        }
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def compile(self, backend: str | None = None, **options: Any) -> TiUEPipeline:
        """Run UNet and VAE as one compiled call from now on, with the same pictures.

        Weights, adapters, sizes and batches may change at any time. `record_timings` then counts
        encoder, decoder and VAE as one stage, "one pass".

        Args:
            backend: as `tiue.compiled.compile_call`: on a GPU None records CUDA graphs, on a CPU it
                changes nothing; "openvino" and "inductor" compile for a CPU.
            **options: likewise.

        Returns:
            The pipeline.

        Raises:
            DependencyError: OpenVINO is not installed.
        """
        self._drawing = CompiledDrawing(backend, options)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_decoder_steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        skip_below: float | None = None,
    ) -> TiUEPipelineOutput | tuple[Any, list[bool] | None]:
        """Make images of prompts.

        Arguments are those of `StableDiffusionPipeline` where they have a meaning.

        Args:
            prompt: One prompt or a list; one that is longer than the tokenizer takes is cut, with
                a warning.
            height: Pixels; by default the UNet's own size, or that of `latents`.
            width: Pixels; likewise.
            num_decoder_steps: K, the number of timesteps that the decoder runs at, in one batch.
            guidance_scale: Classifier-free guidance where above 1, for weights that were not
                distilled; it doubles the rows.
            negative_prompt: What guidance leads away from; one text for all prompts, or a list.
            num_images_per_prompt: Images a prompt; those of one prompt follow each other.
            generator: Source of the noise; a list gives each image its own.
            latents: Noise [B, C, h, w] of standard deviation 1 instead of drawing it; B counts
                every image.
            prompt_embeds: Text embeddings [prompts, L, D] in the place of `prompt`.
            negative_prompt_embeds: Likewise for `negative_prompt`.
            ip_adapter_image: Image prompt for a loaded IP-Adapter.
            ip_adapter_image_embeds: Its embeddings, as in `StableDiffusionPipeline`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Whether to return a `TiUEPipelineOutput` rather than a tuple.
            cross_attention_kwargs: Handed to the attention processors; "scale" weighs a LoRA.
            clip_skip: Layers of the text encoder to leave out at its end.
            skip_below: Lossy. Leave out the timesteps whose weight |E_k| is under this bound; with
                K = 4 the last weighs 0.0121 and takes a fourth of the decoder's rows.

        Returns:
            The images, and what a safety checker said of them.

        Raises:
            InputError: An argument is of the wrong value, shape or type; the message says which.
            SchedulerError: `scheduler` has no one pass.
            NonFiniteError: The images hold NaN or infinity ("pil" and "np", where they are read).
        """
        self._guidance_scale = guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        if output_type not in _OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {_OUTPUT_TYPES}, got {output_type!r}")
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        self.check_inputs(
            prompt,
            0,  # the sizes are checked below: the parent's check wants multiples of 8 of any VAE
            0,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
        )
        prompts, negative_prompts, num_prompts = inputs.prompt_lists(
            prompt, negative_prompt, prompt_embeds, self.unet.config
        )
        shape = inputs.latent_shape(
            num_prompts * num_images_per_prompt,
            self.unet.config,
            self.vae_scale_factor,
            height,
            width,
            latents,
        )
        schedule = self._schedule(num_decoder_steps)
        if skip_below is not None:
            schedule = schedule.skip_below(skip_below)
        if latents is None:
            latents = inputs.draw_noise(shape, generator, self._execution_device, self.unet.dtype)
        latents = latents.to(self._execution_device, self.unet.dtype) * schedule.init_noise_sigma

        stages = 2 if self._drawing else 3 if output_type == "latent" else 4
        with self.progress_bar(total=stages) as progress:
            with self._stage("text encoder", progress):
                text = self._encode_text(
                    prompts,
                    num_images_per_prompt,
                    negative_prompts,
                    prompt_embeds,
                    negative_prompt_embeds,
                )
                conditioning = self._conditioning(
                    shape[0], ip_adapter_image, ip_adapter_image_embeds
                )
            noise = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
            guidance = guidance_scale if self.do_classifier_free_guidance else None
            arguments = (noise, text, schedule, guidance, output_type != "latent", conditioning)
            if self._drawing is None:
                stage = functools.partial(self._stage, progress=progress)
                images = draw(self.unet, self.vae, *arguments, stage=stage)
            else:
                with self._stage("one pass", progress):
                    images = self._drawing(self.unet, self.vae, *arguments)
            has_nsfw = None
        if output_type in ("pil", "np") and not torch.isfinite(images).all():
            raise NonFiniteError(
                f"the images hold NaN or infinity (UNet in {self.unet.dtype}, VAE in"
                f" {self.vae.dtype}). In float16 the VAE is the usual cause:"
                " pipe.vae.to(torch.float32), or load everything with torch_dtype=torch.bfloat16"
                " or torch.float32. In float32, look for NaN in weights, latents or prompt_embeds"
            )
        if output_type != "latent":
            images, has_nsfw = self.run_safety_checker(images, images.device, self.unet.dtype)
        images = self.image_processor.postprocess(
            images,
            output_type=output_type,
            do_denormalize=[not flag for flag in has_nsfw or [False] * shape[0]],
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, has_nsfw
        return TiUEPipelineOutput(images, has_nsfw)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; nothing of a LoRA that does not fit stays behind.

        Raises:
            CheckpointError: It was made for a model of other sizes.
        """
        try:
            super().load_lora_weights(*args, **kwargs)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            mismatches = [line for line in lines if line.startswith("size mismatch")]
            if not mismatches:
                raise
            raise CheckpointError(
                "this LoRA was made for a model of other sizes (SD 1.x, SD 2.x and SDXL differ):"
                f" {mismatches[0]}"
            ) from error

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        """The parent's check of a call's arguments; what it finds is an `InputError`."""
        try:
            super().check_inputs(*args, **kwargs)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _encode_text(
        self,
        prompts: list[str] | None,
        num_images_per_prompt: int,
        negative_prompts: list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Text embeddings of every row; those that guidance leads away from come first."""
        needs_encoder = prompts is not None or (
            self.do_classifier_free_guidance and negative_prompt_embeds is None
        )
        if needs_encoder and self.text_encoder is None:
            raise InputError(
                "this pipeline has no text encoder: give prompt_embeds, and for guidance"
                " negative_prompt_embeds"
            )
        if self.clip_skip is not None and not hasattr(self.text_encoder, "text_model"):
            # transformers 5 took that module out of CLIPTextModel; diffusers 0.42 looks for the
            # final layer norm in it.
            self.text_encoder.__dict__["text_model"] = self.text_encoder
        kwargs = self.cross_attention_kwargs or {}
        positive, negative = self.encode_prompt(
            prompts,
            self._execution_device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompts,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=kwargs.get("scale"),
            clip_skip=self.clip_skip,
        )
        text = torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive
        return text.to(self.unet.dtype)

    def _conditioning(
        self,
        rows: int,
        ip_adapter_image: PipelineImageInput | None,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
    ) -> dict[str, Any]:
        """What the UNet is given beside latents and text."""
        conditioning: dict[str, Any] = {"cross_attention_kwargs": self.cross_attention_kwargs}
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image,
                ip_adapter_image_embeds,
                self._execution_device,
                rows,
                self.do_classifier_free_guidance,
            )
            conditioning["added_cond_kwargs"] = {"image_embeds": embeds}
        if self.unet.config.time_cond_proj_dim is not None:
            conditioning["timestep_cond"] = self.get_guidance_scale_embedding(
                torch.full((rows,), self.guidance_scale - 1.0),
                embedding_dim=self.unet.config.time_cond_proj_dim,
            ).to(self._execution_device, self.unet.dtype)
        return conditioning

    def _schedule(self, num_decoder_steps: int) -> OnePassSchedule:
        """S and E of the present scheduler; probing it takes 32 steps at K = 4, so keep them."""
        scheduler = self.scheduler
        key = f"{type(scheduler).__qualname__} {dict(scheduler.config)} {num_decoder_steps}"
        if key not in self._schedules:
            self._schedules[key] = OnePassSchedule.from_scheduler(scheduler, num_decoder_steps)
        return self._schedules[key]


def _one_pass_scheduler(scheduler: Any) -> Any:
    """The scheduler that came with some weights, or DDIM in its place where it has no one pass."""
    try:
        OnePassSchedule.from_scheduler(scheduler, 2)  # PNDM of one step would pass
    except SchedulerError as error:
        _log.warning("DDIM replaces the model's scheduler, which has no one pass: %s", error)
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    return scheduler
