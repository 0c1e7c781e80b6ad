"""Real pictures for the GAN loss, as latents: encoded from a folder, or read from one file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiue.errors import InputError
from tiue.files import sha256
from tiue.images import on_white

TENSOR = "latents"
_BATCH = 8


class Pictures:
    """Latents of pictures, in host memory.

    Args:
        latents: [N, C, H, W], scaled as the UNet takes them.
        digest: Tells the pictures from others.
        device: Where they go when they are asked for.
    """

    def __init__(self, latents: Tensor, digest: str, device: torch.device) -> None:
        self.latents, self.digest, self._device = latents, digest, device

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The latents at `indices` [B], [B, C, H, W] float32 on the device."""
        return self.latents[indices.cpu()].to(self._device, torch.float32, non_blocking=True)


def load_pictures(
    source: Path,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    load_vae: Callable[[], AutoencoderKL | AutoencoderTiny | None],
    device: torch.device,
) -> Pictures:
    """Read pictures and encode them, or read their latents.

    Args:
        source: A folder, with pictures at any depth, or a .safetensors file with `latents`
            [N, C, H, W].
        shape: C, H, W of a latent.
        size: Height and width in pixels that pictures are cropped and resized to.
        load_vae: Gives the encoder, where pictures are to be encoded.
        device: Where latents go.

    Returns:
        The latents; of a folder in float16, the mean of what the encoder gives.

    Raises:
        InputError: If there are none, one is damaged, or latents do not fit.
    """
    if source.suffix == ".safetensors":
        return Pictures(_read_latents(source, shape), sha256(source), device)
    paths = _list_pictures(source)
    vae = load_vae()
    if vae is None:
        raise InputError(
            f"gan_pictures is the folder '{source}', and the teacher has no VAE to encode them: "
            "give a .safetensors file of their latents."
        )
    latents, digest = [], hashlib.sha256(f"{shape} {size}".encode())
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        for path in batch:
            digest.update(sha256(path).encode())
        pixels = torch.from_numpy(np.stack([_read_picture(path, size) for path in batch]))
        latents.append(encode(vae, pixels.to(device)).to("cpu", torch.float16))
    found = torch.cat(latents)
    _check(found, shape, source)
    return Pictures(found, digest.hexdigest(), device)


@torch.no_grad()
def encode(vae: AutoencoderKL | AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Encode pictures as the UNet takes them.

    Args:
        vae: The encoder.
        pixels: [B, 3, H, W] uint8.

    Returns:
        [B, C, h, w], the mean of what the encoder gives.
    """
    encoded = vae.encode(pixels.to(vae.dtype) / 127.5 - 1)
    mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (mean - shift) * vae.config.scaling_factor


def _read_latents(source: Path, shape: tuple[int, int, int]) -> Tensor:
    try:
        tensors = load_file(source)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot read the latents in '{source}' ({error}).") from error
    if TENSOR not in tensors:
        raise InputError(
            f"'{source}' has no tensor '{TENSOR}', [N, C, H, W]; it has: {', '.join(tensors)}."
        )
    _check(tensors[TENSOR], shape, source)
    return tensors[TENSOR]


def _list_pictures(source: Path) -> list[Path]:
    if not source.is_dir():
        raise InputError(
            f"gan_pictures is '{source}', and there is no such folder. Give a folder of pictures, "
            "or a .safetensors file of their latents."
        )
    known = Image.registered_extensions()
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not paths:
        raise InputError(f"The folder '{source}' of gan_pictures holds no picture.")
    return paths


def _read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture cropped about its centre and resized: [3, H, W] uint8."""
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(on_white(image), size[::-1], Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise InputError(
            f"'{path}' of gan_pictures is no whole picture ({error}). Remove or replace it."
        ) from error
    return np.array(fitted).transpose(2, 0, 1)


def _check(latents: Tensor, shape: tuple[int, int, int], source: Path) -> None:
    if latents.ndim != 4 or not len(latents) or tuple(latents.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise InputError(
            f"The latents of '{source}' are {tuple(latents.shape)}; this run's are [N, {wanted}]."
        )
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise InputError(f"The latents of '{source}' must be finite floating-point numbers.")
