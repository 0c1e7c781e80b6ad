"""Models as functions of prompts and seeds, with what a result must say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiue.errors import InputError

OPENMOJI, OPENMOJI_TEACHER = "openmoji", "openmoji-teacher"
SCENES, SCENES_TEACHER = "scenes", "scenes-teacher"

# Prompts and one seed for each, to as many pictures.
Draw = Callable[[list[str], list[int]], list[Image.Image]]


class Autoencoder:
    """A pipeline's VAE as what pictures pass through.

    Args:
        vae: AutoencoderTiny or AutoencoderKL, on its device.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] uint8 to as many reconstructions, uint8 on the CPU."""
        shown = (pictures.float() / 127.5 - 1).to(self.vae.device, self.vae.dtype)
        encoded = self.vae.encode(shown)
        kept = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        decoded = self.vae.decode(kept).sample.float().clamp(-1, 1)
        return decoded.add(1).mul(127.5).round().byte().cpu()

    def sha256(self) -> str:
        """Of its tensors."""
        return tensors_hash({"vae": self.vae})


@dataclass(frozen=True)
class Model:
    """A model that is ready to draw.

    Attributes:
        draw: Prompts and seeds to pictures; a seed means the same noise on every device.
        facts: What the pictures depend on; two runs with equal facts draw the same.
        autoencoder: What its pictures are decoded by, if there is such a thing.
    """

    draw: Draw
    facts: dict[str, Any]
    autoencoder: Autoencoder | None = None


def load_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_decoder_steps: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    student: Path | None = None,
) -> Model:
    """Load a model to evaluate.

    Args:
        name: Folder or hub id of a Stable Diffusion pipeline, `openmoji`, `openmoji-teacher`,
            `scenes` or `scenes-teacher`.
        device: To draw on.
        dtype: Of its weights.
        num_decoder_steps: K of the one pass.
        num_inference_steps: Steps of the plain loop over the whole UNet instead of the one pass;
            the embedded teachers know no other and take 25 by default.
        guidance_scale: Classifier-free guidance; by default 1 (none) for the one pass, 2.5 for
            the embedded teachers, 7.5 for other loops.
        size: Height and width in pixels; the model's own by default.
        student: A folder with `unet/` and `scheduler/`, drawn with instead of the model's own.

    Returns:
        The model.

    Raises:
        CheckpointError: It cannot be loaded.
        InputError: `student` with an embedded teacher.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tiue import TiUEPipeline, TiUEUNet, openmoji, scenes
    from tiue.embedded.config import GUIDANCE_SCALE, TEACHER_STEPS

    teachers = {
        OPENMOJI_TEACHER: openmoji.load_openmoji_teacher,
        SCENES_TEACHER: scenes.load_scenes_teacher,
    }
    students = {OPENMOJI: openmoji.load_openmoji, SCENES: scenes.load_scenes}
    if student is not None and name in teachers:
        raise InputError(f"--student goes with a model that draws in one pass, not with {name}")
    pipe: Any
    if name in teachers:
        pipe = teachers[name](torch_dtype=dtype)
        num_inference_steps = num_inference_steps or TEACHER_STEPS
        guidance_scale = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    elif name in students:
        pipe = students[name](torch_dtype=dtype, student=student)
    elif student is not None:
        pipe = TiUEPipeline.from_pretrained(
            name,
            unet=TiUEUNet.from_pretrained(student, subfolder="unet", dtype=dtype),
            scheduler=DDIMScheduler.from_pretrained(student, subfolder="scheduler"),
            dtype=dtype,
        )
    else:
        pipe = TiUEPipeline.from_pretrained(name, dtype=dtype)
    if num_inference_steps is not None and not isinstance(pipe, StableDiffusionPipeline):
        raise InputError(f"{name} has no loop to run {num_inference_steps} steps of")
    if num_inference_steps is not None:
        pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": 7.5 if guidance_scale is None else guidance_scale,
        }
    else:
        settings = {
            "num_decoder_steps": num_decoder_steps,
            "guidance_scale": 1.0 if guidance_scale is None else guidance_scale,
        }
    if size is not None:
        settings |= {"height": size, "width": size}
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    facts = {
        "model": Path(name).name if Path(name).is_dir() else name,
        "weights_sha256": weights_hash(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        **settings,
    }

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        # From the CPU whatever the device: a seed means the same noise everywhere.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, **settings).images

    return Model(draw, facts, Autoencoder(pipe.vae))


def weights_hash(pipe: Any) -> str:
    """The SHA-256 of the UNet's, text encoder's and VAE's tensors, names and bytes in order."""
    return tensors_hash({part: getattr(pipe, part) for part in ("unet", "text_encoder", "vae")})


def tensors_hash(parts: dict[str, Any]) -> str:
    """The SHA-256 of modules' tensors, by name."""
    digest = hashlib.sha256()
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
