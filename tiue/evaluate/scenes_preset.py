"""The scenes preset: prompts whose scenes are known exactly, and a judge that ships.

Every prompt is drawn several times. Beside the model stand what measures it at best: as many true
scenes of the same prompts, and these through the model's own autoencoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiue.errors import DependencyError, InputError
from tiue.evaluate import lpips
from tiue.evaluate.metrics import set_figures
from tiue.evaluate.models import Autoencoder
from tiue.evaluate.protocol import SET_METRICS, Protocol
from tiue.files import sha256, write_file
from tiue.scenes import judge, measures
from tiue.scenes.grammar import Request, draw_request
from tiue.scenes.judge import Finding, Found
from tiue.scenes.measures import Figure, finding_of
from tiue.scenes.scene import Scene, draw_scene, pixels, sprites

# Level and whether it is held out: prompt number i is of split i modulo 5.
SPLITS = (
    ("exact", False),
    ("exact", True),
    ("partial", False),
    ("partial", True),
    ("category", False),
)
EVERYTHING = "all"
TRUE_SETS = 4  # of true scenes, each as large as the model's, that figures are held against


def split_name(level: str, held_out: bool) -> str:
    """As tables name it."""
    return f"{level}, held out" if held_out else level


def draw_requests(count: int, seed: int) -> list[Request]:
    """Draw the requests of an evaluation, in turn of all splits."""
    generator = random.Random(seed)
    return [draw_request(generator, *SPLITS[i % len(SPLITS)]) for i in range(count)]


def true_scenes(requests: Sequence[Request], images: int, seed: int, number: int) -> list[Scene]:
    """Draw `images` scenes of each request, one after another: set `number` of them."""
    scenes = []
    for i, request in enumerate(requests):
        _, held_out = SPLITS[i % len(SPLITS)]
        generator = random.Random(f"{seed} {number} {i}")
        # What training holds out is no part of what other prompts mean.
        scenes += [draw_scene(request, generator, training=not held_out) for _ in range(images)]
    return scenes


@dataclass(frozen=True)
class Reading:
    """What the judge makes of the pictures of P prompts, M each.

    Attributes:
        findings: [P * M], what is there.
        features: [P * M, 640], of quarters of the pictures.
        diversity: [P] mean LPIPS over the pairs of a prompt's pictures.
    """

    findings: list[Finding]
    features: Tensor
    diversity: Tensor

    def groups(self) -> list[list[Finding]]:
        """The findings by prompt."""
        size = len(self.findings) // len(self.diversity)
        return [self.findings[i : i + size] for i in range(0, len(self.findings), size)]

    def points(self) -> Tensor:
        """The features by prompt, [P, M, 640]."""
        return self.features.unflatten(0, (len(self.diversity), -1))


class SceneTest:
    """Prompts, truth and judge of one protocol.

    Args:
        protocol: Its number of prompts, pictures of each and seeds.
        cache: Folder of what is known of the true pictures: made once, not once a model.
        device: For the judge.

    Raises:
        CheckpointError: The judge is missing.
        DependencyError: The packages that true pictures are composed with are.
        InputError: There are too few pictures of a prompt.
    """

    width = judge.FEATURE_WIDTH

    def __init__(self, protocol: Protocol, cache: Path, device: torch.device) -> None:
        if protocol.diversity_images < 2:
            raise InputError("the scenes preset needs 2 pictures of each prompt")
        self.protocol, self.cache = protocol, cache
        self.images = protocol.diversity_images
        self.requests = draw_requests(protocol.num_prompts or 0, protocol.prompt_seed)
        network, self.judge_facts = judge.load_judge()
        self.judge = network.to(device)
        try:
            sprites()
        except InputError as error:
            raise DependencyError(
                f"the scenes preset composes true pictures ({error.__cause__}): install"
                " `pip install tiue[eval]`"
            ) from error

    @property
    def prompts(self) -> list[str]:
        """One a picture."""
        return [str(request) for request in self.requests for _ in range(self.images)]

    @property
    def num_true(self) -> int:
        """True pictures that the model's are compared with."""
        return TRUE_SETS * self.images * len(self.requests)

    def describe(self) -> dict[str, Any]:
        """What a result says of the judge and of the world it judges."""
        return {
            "kind": "scenes",
            "sha256": sha256(judge.WEIGHTS),
            "threshold": judge.THRESHOLD,
            "scenes_sha256": hashlib.sha256(repr(self._sample).encode()).hexdigest(),
            **self.judge_facts,
        }

    @cached_property
    def _sample(self) -> list[Scene]:
        """One true scene of each prompt: other scenes of a seed are another world."""
        return true_scenes(self.requests, 1, self.protocol.prompt_seed, 0)

    @cached_property
    def _source(self) -> str:
        """What true pictures look like and how they are read, beside the judge's weights."""
        digest = hashlib.sha256(inspect.getsource(judge).encode())
        digest.update(pixels(self._sample).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """Show pictures [P * M, 3, 64, 64] uint8 to the judge, prompt by prompt."""
        findings: list[Finding] = []
        features, diversity = [], []
        pairs = torch.combinations(torch.arange(self.images))
        for group in pictures.split(self.images):
            look = judge.look_at(self.judge, group)
            findings += judge.decode(look)
            features.append(look.features.cpu())
            first, second = ([m[side] for m in look.maps] for side in pairs.T)
            diversity.append(lpips.distances(first, second, None).double().mean().cpu())
        return Reading(findings, torch.cat(features), torch.stack(diversity))

    def _true(self, number: int) -> tuple[list[Scene], Tensor]:
        scenes = true_scenes(self.requests, self.images, self.protocol.prompt_seed, number)
        return scenes, pixels(scenes)

    def reference(self, number: int) -> Reading:
        """True set `number`: what is known of its scenes, with the judge's features."""

        def make() -> Reading:
            scenes, pictures = self._true(number)
            return dataclasses.replace(self.read(pictures), findings=list(map(finding_of, scenes)))

        return self._cached(f"known {number}", make)

    def ceiling(self, autoencoder: Autoencoder | None = None) -> Reading:
        """A further true set as the judge sees it, the autoencoder between them if there is one."""

        def make() -> Reading:
            pictures = self._true(TRUE_SETS)[1]
            if autoencoder is not None:
                pictures = torch.cat([autoencoder(part) for part in pictures.split(32)])
            return self.read(pictures)

        return self._cached(f"judged {autoencoder.sha256() if autoencoder else ''}", make)

    def _cached(self, what: str, make: Callable[[], Reading]) -> Reading:
        described = self.describe()
        known = {
            "what": what,
            "judge": described["sha256"],
            "scenes": described["scenes_sha256"],
            "source": self._source,
            "images": str(self.images),
            "seed": str(self.protocol.prompt_seed),
        }
        name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        path = self.cache / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return Reading(
                    _parse(file.metadata()["findings"]),
                    file.get_tensor("features"),
                    file.get_tensor("diversity"),
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass  # not there yet, or broken: made
        reading = make()
        self.cache.mkdir(parents=True, exist_ok=True)
        tensors = {"features": reading.features, "diversity": reading.diversity}
        facts = known | {"findings": json.dumps([dataclasses.asdict(f) for f in reading.findings])}
        write_file(path, lambda beside: save_file(tensors, beside, facts))
        return reading

    def compute(
        self, pictures: Tensor, autoencoder: Autoencoder | None, wanted: list[str]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Compute all figures.

        Args:
            pictures: The model's, [P * M, 3, 64, 64] uint8, prompt by prompt.
            autoencoder: The model's, for its ceiling.
            wanted: Of FID, KID, precision, recall, density, coverage and LPIPS diversity.

        Returns:
            The model's figures over all prompts; and by split those of model and ceilings.
        """
        truths = [self.reference(number) for number in range(TRUE_SETS)]
        sides = {"model": self.read(pictures), "true pictures": self.ceiling()}
        if autoencoder is not None:
            sides["through the autoencoder"] = self.ceiling(autoencoder)
        chosen = {EVERYTHING: list(range(len(self.requests)))} | {
            split_name(*split): list(range(i, len(self.requests), len(SPLITS)))
            for i, split in enumerate(SPLITS)
        }
        true_points = torch.cat([truth.points() for truth in truths], dim=1)
        splits: dict[str, dict[str, Any]] = {}
        for side, reading in sides.items():
            splits[side] = {
                split: self._split(reading, truths, true_points, numbers)
                for split, numbers in chosen.items()
                if numbers
            }
        reference = judge.pooled(true_points.flatten(0, 1))
        names = [name for name in SET_METRICS if name in wanted]
        sets = {
            side: set_figures(judge.pooled(reading.features), reference, names, self.protocol)
            for side, reading in sides.items()
        }
        figures = sets.pop("model")
        if "lpips_diversity" in wanted:
            over = sides["model"].diversity
            figures["lpips_diversity"] = over.mean().item()
            figures["lpips_diversity_deviation"] = over.std(unbiased=False).item()
        for name, (value, error) in splits["model"][EVERYTHING]["figures"].items():
            figures[f"scene_{name}"] = value
            if error is not None:
                figures[f"scene_{name}_error"] = error
        return figures, {"splits": splits, "sets": sets, "images_per_prompt": self.images}

    def _split(
        self, reading: Reading, truths: list[Reading], true_points: Tensor, numbers: list[int]
    ) -> dict[str, Any]:
        def some(groups: list[Any]) -> list[Any]:
            return [groups[i] for i in numbers]

        requests, groups = some(self.requests), some(reading.groups())
        known = [some(truth.groups()) for truth in truths]
        figures: dict[str, Figure] = measures.accuracy(requests, groups)
        figures |= measures.variety(requests, groups, known)
        figures["energy"] = measures.energy(reading.points()[numbers], true_points[numbers])
        figures["diversity"] = measures.mean_and_error(reading.diversity[numbers].tolist())
        return {
            "prompts": len(numbers),
            # An error that is not known (one prompt) is null: JSON has no NaN.
            "figures": {
                name: [value, None if math.isnan(error) else error]
                for name, (value, error) in figures.items()
            },
        }


def _parse(text: str) -> list[Finding]:
    return [
        Finding(tuple(Found(**thing) for thing in finding["objects"]), finding["ground"])
        for finding in json.loads(text)
    ]


COLUMNS = {
    "right": "all right",
    "objects": "objects",
    "count": "count",
    "relation": "relation",
    "ground": "ground",
    "size": "size",
    "coverage": "coverage",
    "entropy": "entropy",
    "energy": "energy",
    "diversity": "LPIPS",
}
SHARES = ("right", "objects", "count", "relation", "ground", "size", "coverage", "entropy")


def scene_table(detail: dict[str, Any]) -> str:
    """Lay the figures by split out for a reader.

    Args:
        detail: Of `SceneTest.compute`.

    Returns:
        Lines: a block for the model and for each ceiling, a row a split.
    """
    lines = [f"{'':20} {'prompts':>7}" + "".join(f" {label:>9}" for label in COLUMNS.values())]
    for side, splits in detail["splits"].items():
        lines.append(side)
        for split, found in splits.items():
            cells = []
            for name in COLUMNS:
                value = found["figures"].get(name, [None])[0]
                shown = f"{value:.1%}" if name in SHARES and value is not None else value
                cells.append(f"{shown:.3f}" if isinstance(shown, float) else shown or "-")
            row = "".join(f" {cell:>9}" for cell in cells)
            lines.append(f"  {split:18} {found['prompts']:>7}{row}")
    return "\n".join(lines)
