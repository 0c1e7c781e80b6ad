"""What a figure depends on besides the model: one frozen dataclass, and the named presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tiue.errors import InputError

METRICS = (
    "fid",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip_score",
    "lpips_diversity",
)
# Those that compare two sets of pictures by their features.
SET_METRICS = METRICS[:6]
NEIGHBOUR_METRICS = METRICS[2:6]


@dataclass(frozen=True)
class Protocol:
    """How pictures are drawn, brought to one size and compared; printed with every figure.

    Attributes:
        name: Of the preset.
        summary: One sentence for the reader of the figures.
        num_prompts: Prompts drawn from the list without replacement, one picture each; None takes
            all, in order.
        prompt_seed: Of that draw.
        generated_size: Height and width to draw at, pixels; None is the model's own size.
        resolution: Both sides' pictures are cropped to the centre square and resized (Lanczos) to
            this many pixels.
        features: Of FID, KID, precision, recall, density and coverage: inception, dinov2, clip or
            openmoji; or scenes, whose judge measures more than these.
        clip: Of the CLIP score: a hub id or folder of a CLIP, or openmoji.
        lpips: Of the diversity: alex (AlexNet, LPIPS v0.1), openmoji or scenes.
        kid_subsets: Random subsets that KID is the mean over.
        kid_subset_size: Pictures in each.
        precision_k: Neighbours that make the radius of precision and recall (Kynkaanniemi et al.,
            2019, arXiv 1904.06991: 3).
        coverage_k: Likewise of density and coverage (Naeem et al., 2020, arXiv 2002.09797: 5).
        neighbour_samples: Pictures of each side at most for these four, drawn without replacement:
            their memory grows with the square.
        diversity_prompts: Prompts, the first of the drawn ones, that are drawn several times.
        diversity_images: Pictures of each of them, compared in pairs. The scenes preset draws all
            its prompts so often, and no others.
        metric_seed: Of KID's subsets and the neighbours' samples.
    """

    name: str
    summary: str
    num_prompts: int | None = None
    prompt_seed: int = 0
    generated_size: int | None = None
    resolution: int = 256
    features: str = "inception"
    clip: str = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    lpips: str = "alex"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    precision_k: int = 3
    coverage_k: int = 5
    neighbour_samples: int = 10_000
    diversity_prompts: int = 10
    diversity_images: int = 8
    metric_seed: int = 0

    def changed(self, **changes: Any) -> Protocol:
        """A protocol that differs in what is not None; its name then says `changed`.

        Args:
            **changes: Attributes and their values.

        Returns:
            The protocol, or this one where nothing differs.
        """
        changes = {
            name: value
            for name, value in changes.items()
            if value is not None and getattr(self, name) != value
        }
        if not changes:
            return self
        name = self.name.removesuffix(" (changed)")
        return dataclasses.replace(self, name=f"{name} (changed)", **changes)


PRESETS = {
    "coco2014-30k": Protocol(
        name="coco2014-30k",
        summary="Zero-shot COCO-2014: 30,000 pictures of 512 x 512 from captions of the validation"
        " set, one caption a picture; both sides cropped to the centre square and resized to 256"
        " (Lanczos); Inception; CLIP ViT-g/14.",
        num_prompts=30_000,
        generated_size=512,
    ),
    "coco2017-5k": Protocol(
        name="coco2017-5k",
        summary="Zero-shot COCO-2017: 5,000 pictures of 512 x 512 from captions of the validation"
        " set, one caption a picture; both sides cropped to the centre square and resized to 256"
        " (Lanczos); Inception; CLIP ViT-g/14.",
        num_prompts=5_000,
        generated_size=512,
    ),
    "openmoji": Protocol(
        name="openmoji",
        summary="Offline: 500 of the 1,918 OpenMoji names, one picture each, against all 1,918"
        " pictures that the embedded model was trained on (nothing was held out: the figures say"
        " how well it remembers); features of a small network that ships with the package.",
        num_prompts=500,
        resolution=64,
        features="openmoji",
        clip="openmoji",
        lpips="openmoji",
        kid_subset_size=250,
    ),
    "scenes": Protocol(
        name="scenes",
        summary="Offline: 125 prompts of the scenes' grammar, exact and partial ones (seen and held"
        " out) and categories in equal parts, 8 pictures each, as a small detector that ships sees"
        " them; beside them as many true scenes of the same prompts.",
        num_prompts=125,
        resolution=64,
        features="scenes",
        clip="scenes",
        lpips="scenes",
        kid_subset_size=250,
        diversity_prompts=125,
    ),
}


def find_preset(name: str) -> Protocol:
    """Look a preset up.

    Args:
        name: A key of `PRESETS`.

    Returns:
        Its protocol.

    Raises:
        InputError: There is none of the name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}: take one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_metrics(names: list[str]) -> list[str]:
    """Put metric names in their order.

    Args:
        names: Some of `METRICS`, in any order.

    Returns:
        The same, in the order of `METRICS`.

    Raises:
        InputError: One is no metric, or there is none.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise InputError(
            f"no metric {', '.join(unknown) or 'was named'}: take some of {','.join(METRICS)}"
        )
    return [name for name in METRICS if name in names]
