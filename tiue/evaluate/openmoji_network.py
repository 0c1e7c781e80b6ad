"""The offline preset's feature network: a small CLIP of OpenMoji pictures and their names.

Inception and CLIP cannot be had without a network, and know little of 64 x 64 pictograms. This one
ships with the package (a few hundred kB), so that figures of two machines are of one yardstick.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiue.embedded import networks

WEIGHTS = Path(__file__).parent / "weights" / "openmoji-features.safetensors"
WIDTHS = (24, 48, 96, 96)
JOINT_WIDTH = 64
TEXT_WIDTH = 192


class OpenMojiFeatures(nn.Module):
    """Four halving convolutions over a picture; the last one's mean is its feature.

    Trained as CLIP is (Radford et al., 2021, arXiv 2103.00020): a picture's projection is to point
    the way of its name's, which is a linear map of the embedded model's frozen text encoder.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            )
            for before, width in zip(inputs, WIDTHS, strict=True)
        )
        self.image_projection = nn.Linear(WIDTHS[-1], JOINT_WIDTH, bias=False)
        self.text_projection = nn.Linear(TEXT_WIDTH, JOINT_WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Every stage's output: pictures [B, 3, 64, 64] in [-1, 1] to four maps [B, C, h, w]."""
        maps = []
        hidden = pictures
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] to features [B, 96]."""
        return self.maps(pictures)[-1].mean(dim=(2, 3))

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] to unit vectors [B, 64] that texts compare with."""
        return nn.functional.normalize(self.image_projection(self(pictures)), dim=-1)

    def embed_texts(self, pooled: Tensor) -> Tensor:
        """Pooled text encodings [B, 192] to unit vectors [B, 64]."""
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)


def load_network(path: Path = WEIGHTS) -> tuple[OpenMojiFeatures, dict[str, Any]]:
    """Load the shipped network.

    Args:
        path: What `python -m tiue.evaluate.openmoji_training` wrote.

    Returns:
        The network, frozen, float32, and what is known of it: training, accuracies.

    Raises:
        CheckpointError: The file is missing or of another network.
    """
    network, command = OpenMojiFeatures(), "python -m tiue.evaluate.openmoji_training"
    return network, networks.load_network(network, path, "the feature network", command)


@cache
def _text_encoder() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPTextModel

    from tiue.openmoji import WEIGHTS as MODEL

    folder = MODEL / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()


@torch.no_grad()
def encode_names(names: list[str]) -> Tensor:
    """Encode texts [N] by the embedded model's text encoder: its pooled output, [N, 192]."""
    tokenizer, encoder = _text_encoder()
    ids = tokenizer(
        names,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return torch.cat([encoder(part).pooler_output for part in ids.split(256)])
