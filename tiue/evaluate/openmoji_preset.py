"""The offline preset's parts: its feature network as every extractor, and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiue.embedded.autoencoder import to_model_range
from tiue.embedded.config import IMAGE_SIZE
from tiue.errors import DependencyError, InputError
from tiue.evaluate.openmoji_network import WEIGHTS, WIDTHS, encode_names, load_network
from tiue.files import sha256

if TYPE_CHECKING:
    from tiue.openmoji.data import Pictures


class OpenMojiExtractor:
    """The shipped network as extractor, pair encoder and LPIPS's maps.

    Args:
        device: To run on.
        path: Its weights.

    Raises:
        CheckpointError: They are missing.
    """

    width = WIDTHS[-1]

    def __init__(self, device: torch.device, path: Path = WEIGHTS) -> None:
        network, self.facts = load_network(path)
        self.network = network.to(device)
        self.device, self.path = device, path

    def _shown(self, pictures: Tensor) -> Tensor:
        if pictures.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise InputError(
                f"the openmoji features are of {IMAGE_SIZE} x {IMAGE_SIZE} pictures, got"
                f" {pictures.shape[-1]} x {pictures.shape[-2]}: set the resolution to {IMAGE_SIZE}"
            )
        return to_model_range(pictures).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.network(self._shown(pictures))

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return self.network.embed_pictures(self._shown(pictures))

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.network.embed_texts(encode_names(texts).to(self.device))

    @torch.no_grad()
    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [B, 3, 64, 64] uint8 to the four maps that LPIPS compares."""
        return self.network.maps(self._shown(pictures))

    def describe(self) -> dict[str, Any]:
        return {"kind": "openmoji", "sha256": sha256(self.path), **self.facts}


def reference_pictures(cache: Path) -> Pictures:
    """The 1,918 OpenMoji pictures that the embedded model was trained on, and their names.

    Args:
        cache: A safetensors file that they are rendered into the first time (~10 s).

    Returns:
        The pictures.

    Raises:
        DependencyError: The packages that hold and render them are not installed.
    """
    from tiue.openmoji.data import load_pictures

    try:
        return load_pictures(cache)
    except InputError as error:
        raise DependencyError(
            f"the openmoji preset renders OpenMoji's pictures ({error.__cause__}): install"
            " `pip install tiue[eval]`"
        ) from error
