"""Feature extractors: what turns pictures into the points that the metrics compare."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tiue.errors import CheckpointError, InputError, NonFiniteError
from tiue.evaluate.weight_files import find_weights
from tiue.files import sha256
from tiue.loading.checks import looks_local

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION
)
DINOV2 = "facebook/dinov2-large"
# The mean and deviation of ImageNet's pictures, which DINOv2 was trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Extractor(Protocol):
    """Turns pictures into features.

    Attributes:
        width: Size of a feature.
    """

    width: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] uint8 to features [B, width]."""

    def describe(self) -> dict[str, Any]:
        """What a result says of it: kind, and the weights' name and hash."""


class PairEncoder(Protocol):
    """Turns pictures and texts into vectors that are compared by their cosine."""

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] uint8 to vectors [B, D]."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts to vectors [B, D]."""

    def describe(self) -> dict[str, Any]:
        """What a result says of it."""


class Inception:
    """FID's Inception v3, as its authors' TensorFlow graph computes it (2,048 features).

    The TorchScript file that StyleGAN2-ADA published and clean-fid uses; it resizes to 299 itself.

    Args:
        path: The file; None looks where torch.hub keeps its checkpoints.
        device: To run on.

    Raises:
        CheckpointError: It is missing or cannot be read; the message says which file to put where.
    """

    width = 2048

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path = find_weights("Inception", INCEPTION, INCEPTION_URL, path)
        self.device = device
        try:
            self.network = torch.jit.load(str(self.path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"cannot read {self.path} ({error}); fetch it again") from error

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        features = self.network(pictures.to(self.device), return_features=True)
        if features.shape != (len(pictures), self.width):
            raise CheckpointError(
                f"{self.path} gives features of shape {list(features.shape)}, not those of FID's"
                f" Inception; fetch {INCEPTION_URL}"
            )
        return features

    def describe(self) -> dict[str, Any]:
        return {"kind": "inception", "file": self.path.name, "sha256": sha256(self.path)}


class Dinov2:
    """DINOv2's class token; ViT-L/14 by default (Stein et al., 2023, arXiv 2306.04675).

    Args:
        source: Folder or hub id.
        device: To run on.

    Raises:
        CheckpointError: It cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import Dinov2Model

        self.source, self.device = source, device
        self.network = load_transformers(Dinov2Model, source).eval().to(device)
        self.width = self.network.config.hidden_size
        self.size = 224

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        resized = resize(pictures, self.size).to(self.device).float() / 255
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return self.network(pixel_values=(resized - mean) / std).pooler_output.float()

    def describe(self) -> dict[str, Any]:
        return {"kind": "dinov2", "source": source_name(self.source), "size": self.size}


class Clip:
    """A CLIP of transformers: an extractor by its picture half, a pair encoder by both.

    Args:
        source: Folder or hub id.
        device: To run on.

    Raises:
        CheckpointError: It cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.source, self.device = source, device
        self.network = load_transformers(CLIPModel, source).eval().to(device)
        self.tokenizer = load_transformers(AutoTokenizer, source)
        # The processor that needs no torchvision.
        self.processor = load_transformers(AutoImageProcessor, source, backend="pil")
        self.width = self.network.config.projection_dim

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        pixels = self.processor(images=list(pictures.cpu()), return_tensors="pt")["pixel_values"]
        return self.network.get_image_features(pixels.to(self.device)).pooler_output.float()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        longest = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        return self.network.get_text_features(**tokens).pooler_output.float()

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.embed_pictures(pictures)

    def describe(self) -> dict[str, Any]:
        return {"kind": "clip", "source": source_name(self.source)}


def source_name(source: str) -> str:
    """A hub id as it is, and of a folder its last name: a result names no path of a machine."""
    return Path(source).name if Path(source).is_dir() else source


def load_transformers(kind: Any, source: str, **options: Any) -> Any:
    """Load a part of transformers, from safetensors.

    Args:
        kind: A class with `from_pretrained`.
        source: Folder or hub id.
        **options: Of `from_pretrained`.

    Returns:
        The part.

    Raises:
        CheckpointError: It is missing or of another kind; the message says what to put where.
    """
    if not Path(source).is_dir() and looks_local(source):
        raise CheckpointError(
            f"there is no folder {source}: give a folder that save_pretrained wrote, or a hub id"
            " owner/model"
        )
    if hasattr(kind, "config_class"):
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"cannot load {source} ({str(error).splitlines()[0]}). Without a network, copy the"
            " repository of that name (config.json, model.safetensors, tokenizer and"
            " preprocessor_config.json) into a folder and name the folder: --features-weights or"
            " --clip."
        ) from error


def resize(pictures: Tensor, size: int) -> Tensor:
    """Resize square pictures [B, 3, H, W] uint8 to `size` pixels, bicubic, as PIL does."""
    if pictures.shape[-1] == size:
        return pictures
    resized = [
        np.asarray(
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def load_extractor(kind: str, source: str | None, device: torch.device) -> Extractor:
    """Make a feature extractor.

    Args:
        kind: inception, dinov2, clip or openmoji.
        source: A file for inception; a folder or hub id for dinov2 and clip; None for their own.
        device: To run on.

    Returns:
        The extractor.

    Raises:
        CheckpointError: Its weights are missing; the message says which file to put where.
        InputError: There is no such kind.
    """
    from tiue.evaluate.protocol import Protocol as EvaluationProtocol

    if kind == "inception":
        return Inception(Path(source) if source else None, device)
    if kind == "dinov2":
        return Dinov2(source or DINOV2, device)
    if kind == "clip":
        return Clip(source or EvaluationProtocol.clip, device)
    if kind == "openmoji":
        from tiue.evaluate.openmoji_preset import OpenMojiExtractor

        return OpenMojiExtractor(device)
    raise InputError(f"no features {kind!r}: take inception, dinov2, clip or openmoji")


def load_pair_encoder(source: str, device: torch.device) -> PairEncoder:
    """Make what the CLIP score is of.

    Args:
        source: A hub id or folder of a CLIP, or openmoji.
        device: To run on.

    Returns:
        The encoder.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    if source == "openmoji":
        from tiue.evaluate.openmoji_preset import OpenMojiExtractor

        return OpenMojiExtractor(device)
    return Clip(source, device)


def extract(
    extractor: Any, batches: Iterable[Tensor], total: int, label: str, progress: bool = True
) -> Tensor:
    """Run an extractor over pictures.

    Args:
        extractor: Pictures [B, 3, H, W] uint8 to features [B, D].
        batches: The pictures.
        total: How many, for the progress bar.
        label: Of the bar.
        progress: Whether to draw one, where there is a terminal.

    Returns:
        Features [N, D] float32, on the CPU.

    Raises:
        NonFiniteError: A feature is not finite.
    """
    parts = []
    with tqdm(total=total, desc=label, unit="picture", disable=None if progress else True) as bar:
        for batch in batches:
            features = extractor(batch).float().cpu()
            if not features.isfinite().all():
                raise NonFiniteError(f"NaN or infinity among the features ({label})")
            parts.append(features)
            bar.update(len(batch))
    return torch.cat(parts)
