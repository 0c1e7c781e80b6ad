"""LPIPS between pictures of one prompt: how much a model varies what it draws.

The packages that offer LPIPS want torchvision for the layout of AlexNet alone, and a torchvision
of another build than torch's keeps transformers from being imported. So AlexNet's convolutions are
laid out here, and its weights and LPIPS's own are the published ones.
"""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tiue.errors import InputError
from tiue.evaluate.weight_files import find_weights, read_weights

ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"

# Pictures [B, 3, H, W] uint8 to the maps [B, C, h, w] that are compared.
Maps = Callable[[Tensor], list[Tensor]]


class AlexNetMaps(nn.Module):
    """AlexNet's five convolutions (Krizhevsky, 2014, arXiv 1404.5997), each map after its ReLU."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Keys as in the published file: features.0, .3, .6, .8, .10.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        # ImageNet's mean and deviation, for pictures in [-1, 1]: LPIPS v0.1's constants.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] uint8 to five maps; 35 pixels at least each way."""
        hidden = (pictures.to(self.shift) / 127.5 - 1 - self.shift) / self.scale
        maps = []
        for layer in self.features:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                maps.append(hidden)
        return maps


def load_alexnet(path: Path | None, device: torch.device) -> tuple[AlexNetMaps, list[Tensor]]:
    """Load LPIPS v0.1 with AlexNet.

    Args:
        path: The published `alexnet-owt-7be5be79.pth`; None looks where torch.hub keeps it.
        device: To run on.

    Returns:
        The network and the weight of each channel of its maps, [C] each.

    Raises:
        CheckpointError: The file is not there, or of another network; the message says which file
            to put where.
    """
    network = AlexNetMaps()
    state = read_weights(find_weights("AlexNet for LPIPS", ALEXNET, ALEXNET_URL, path), network)
    kept = {name: value for name, value in state.items() if name.startswith("features.")}
    network.load_state_dict(kept, strict=False)
    return network.eval().requires_grad_(False).to(device), [w.to(device) for w in linear_weights()]


def linear_weights() -> list[Tensor]:
    """LPIPS v0.1's published weights of AlexNet's channels, [C] each; torchmetrics ships them."""
    folder = importlib.resources.files("torchmetrics") / "functional/image/lpips_models"
    with importlib.resources.as_file(folder / "alex.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(5)]


def distances(first: list[Tensor], second: list[Tensor], weights: list[Tensor] | None) -> Tensor:
    """LPIPS of pairs.

    Args:
        first: Maps of B pictures, [B, C, h, w] each.
        second: Maps of the B others.
        weights: Of each map's channels, [C]; None takes 1, which the paper calls the uncalibrated
            network.

    Returns:
        [B] distances.

    Source: Zhang et al., 2018, arXiv 1801.03924, equation 1.
    """
    total = torch.zeros(len(first[0]), device=first[0].device)
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        # The published code adds 1e-8 to the squared norm: a map of zeros has no direction.
        one, other = (m * (m.square().sum(1, keepdim=True) + 1e-8).rsqrt() for m in (one, other))
        apart = (one - other).square()
        weighted = apart if weights is None else apart * weights[index].view(1, -1, 1, 1)
        total = total + weighted.sum(1).mean(dim=(1, 2))
    return total


@torch.no_grad()
def lpips_diversity(
    groups: list[Tensor], maps: Maps, weights: list[Tensor] | None
) -> tuple[float, float]:
    """Mean LPIPS over all pairs of pictures of one prompt, then over the prompts.

    Args:
        groups: The pictures of each prompt, [M, 3, H, W] uint8, at least two.
        maps: The network.
        weights: As in `distances`.

    Returns:
        Mean and deviation over the prompts; 0 where a prompt always gives the same picture.

    Raises:
        InputError: A prompt has fewer than two pictures.
    """
    if not groups or min(len(group) for group in groups) < 2:
        least = min((len(group) for group in groups), default=0)
        raise InputError(f"lpips_diversity needs 2 pictures of each prompt, got {least}")
    means = []
    for group in groups:
        found = maps(group)
        pairs = torch.tensor(list(itertools.combinations(range(len(group)), 2)))
        first, second = ([m[side] for m in found] for side in pairs.T)
        means.append(distances(first, second, weights).double().mean())
    over = torch.stack(means).cpu()
    return over.mean().item(), over.std(unbiased=False).item()
