"""The judge: a small detector that says what is in a scene, and ships with the package.

It stands for a person who is asked what a picture shows. Its errors are known, since true scenes
are: `tiue.scenes.judge_training` measures them and writes them beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiue.embedded.autoencoder import to_model_range
from tiue.embedded.config import IMAGE_SIZE
from tiue.embedded.networks import load_network
from tiue.errors import InputError
from tiue.scenes.config import GROUNDS, OBJECTS, SIZES

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
STRIDE = 4  # pixels a cell
# Of the heat above which a peak is an object.
THRESHOLD = 0.3
# Cells either way in which one peak alone counts: true centres are five cells apart or more.
REACH = 2
STEM, FINE, COARSE = 32, 64, 96
POOL = 2  # features are means over quarters of the picture, so that they know where things are
SIZE_NAMES, GROUND_NAMES = tuple(SIZES), tuple(GROUNDS)


@dataclass(frozen=True)
class Found:
    """An object that is in a picture.

    Attributes:
        name: of `OBJECTS`.
        size: "small" or "large".
        x: of its centre, pixels from the left.
        y: pixels from the top.
    """

    name: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Finding:
    """What is in a picture.

    Attributes:
        objects: in any order, surest first where a judge found them.
        ground: name of the ground's colour.
    """

    objects: tuple[Found, ...]
    ground: str


@dataclass(frozen=True)
class Look:
    """What the network gives of B pictures.

    Attributes:
        heat: [B, 40, 16, 16] logits of an object's centre, by object.
        large: [B, 16, 16] logit of the object here being large.
        offset: [B, 2, 16, 16] the centre's distance (x, y) from the middle of its cell, in cells.
        ground: [B, 8] logits.
        maps: outputs of the four stages, [B, C, h, w] each.
    """

    heat: Tensor
    large: Tensor
    offset: Tensor
    ground: Tensor
    maps: list[Tensor]

    @property
    def features(self) -> Tensor:
        """[B, 4 * 160]: the two last stages' means over each quarter of the picture."""
        return torch.cat(
            [nn.functional.adaptive_avg_pool2d(m, POOL).flatten(1) for m in self.maps[-2:]], dim=1
        )


def pooled(features: Tensor) -> Tensor:
    """`Look.features` [N, 4 * 160] to their means over the whole picture [N, 160]."""
    return features.unflatten(1, (-1, POOL * POOL)).mean(2)


FEATURE_WIDTH = FINE + COARSE


class _Convolution(nn.Sequential):
    # Batch statistics: a group's would take the ground's brightness away.
    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _Convolution(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.silu(hidden + self.body(hidden))


class Judge(nn.Module):
    """An hourglass of two levels with CenterNet's heads (Zhou et al., 2019, arXiv 1904.07850)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, STEM, 2)
        self.enter = _Convolution(STEM, FINE, 2)
        self.coarse = nn.Sequential(_Convolution(FINE, COARSE, 2), _Residual(COARSE))
        self.back = nn.Conv2d(COARSE, FINE, 1)
        self.fine = _Residual(FINE)
        self.heat = nn.Conv2d(FINE, len(OBJECTS), 1)
        self.details = nn.Conv2d(FINE, 3, 1)
        self.ground = nn.Linear(FEATURE_WIDTH, len(GROUNDS))
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # few cells hold a centre

    def forward(self, pictures: Tensor) -> Look:
        """Pictures [B, 3, 64, 64] in [-1, 1]."""
        stem = self.stem(pictures)
        entered = self.enter(stem)
        coarse = self.coarse(entered)
        back = nn.functional.interpolate(self.back(coarse), scale_factor=2.0, mode="nearest")
        fine = self.fine(entered + back)
        details = self.details(fine)
        means = torch.cat([coarse.mean(dim=(2, 3)), fine.mean(dim=(2, 3))], dim=1)
        return Look(
            heat=self.heat(fine),
            large=details[:, 0],
            offset=details[:, 1:],
            ground=self.ground(means),
            maps=[stem, entered, coarse, fine],
        )


def decode(look: Look, threshold: float = THRESHOLD) -> list[Finding]:
    """Read the maps: what is the surest of all objects at its place and in its neighbourhood.

    Args:
        look: of B pictures.
        threshold: of the heat.

    Returns:
        B findings, each with its objects surest first.
    """
    best, kind = look.heat.float().sigmoid().max(dim=1)  # [B, 16, 16]
    around = nn.functional.max_pool2d(best[:, None], 2 * REACH + 1, 1, REACH)[:, 0]
    peaks = (best == around) & (best > threshold)
    found: list[list[tuple[float, Found]]] = [[] for _ in best]
    for b, row, column in peaks.nonzero().tolist():
        dx, dy = look.offset[b, :, row, column].tolist()
        thing = Found(
            OBJECTS[int(kind[b, row, column])],
            SIZE_NAMES[int(look.large[b, row, column] > 0)],
            (column + 0.5 + dx) * STRIDE,
            (row + 0.5 + dy) * STRIDE,
        )
        found[b].append((best[b, row, column].item(), thing))
    return [
        Finding(
            tuple(thing for _, thing in sorted(things, key=lambda pair: -pair[0])),
            GROUND_NAMES[int(ground)],
        )
        for things, ground in zip(found, look.ground.argmax(1), strict=True)
    ]


@torch.no_grad()
def look_at(judge: Judge, pictures: Tensor) -> Look:
    """Run the network.

    Args:
        judge: in evaluation mode.
        pictures: [B, 3, 64, 64] uint8.

    Returns:
        What it gives.

    Raises:
        InputError: the pictures are of another size.
    """
    if pictures.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(
            f"the judge looks at pictures of {IMAGE_SIZE} x {IMAGE_SIZE}, got"
            f" {pictures.shape[-1]} x {pictures.shape[-2]}"
        )
    return judge(to_model_range(pictures).to(next(judge.parameters()).device))


def load_judge(path: Path = WEIGHTS) -> tuple[Judge, dict[str, Any]]:
    """Load the judge.

    Args:
        path: what `python -m tiue.scenes.train judge` wrote; by default the shipped one.

    Returns:
        The network, frozen, float32, and what is known of it: training, accuracies.

    Raises:
        CheckpointError: the file is missing or of another network.
    """
    judge = Judge()
    return judge, load_network(judge, path, "the judge", "python -m tiue.scenes.train judge")
