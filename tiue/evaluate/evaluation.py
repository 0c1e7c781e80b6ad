"""One evaluation from settings to result: draw or read, extract, compute."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tiue.errors import InputError, OutputError
from tiue.evaluate import generation, lpips, metrics, pictures, prompts, result
from tiue.evaluate.features import extract, load_extractor, load_pair_encoder
from tiue.evaluate.models import Model, load_model
from tiue.evaluate.protocol import NEIGHBOUR_METRICS, SET_METRICS, Protocol
from tiue.images import contact_sheet, save_image

if TYPE_CHECKING:
    from tiue.evaluate.scenes_preset import SceneTest

SHEET_PICTURES = 20


@dataclass(frozen=True)
class Settings:
    """An evaluation's inputs.

    Attributes:
        protocol: How to draw and compare.
        metrics: Some of `METRICS`.
        output: Folder of the result and of the pictures that are drawn.
        model: As `load_model`'s name; or else
        pictures: a folder of pictures that were drawn before.
        reference: Folder of the pictures to compare with; openmoji and scenes have their own.
        prompts: File of prompts: what the model draws, or what the pictures were drawn of.
        seed: Of the model's noise.
        num_decoder_steps: As `load_model`, and so on to `student`.
        batch_size: Pictures at once.
        features_weights: File, folder or hub id of the extractor's weights.
        lpips_weights: File of AlexNet's.
        skip_unreadable: Leave out files that are no pictures, and count them.
        mixed_sizes: Take a model's pictures of several sizes.
        device: To run on.
        dtype: Of the model.
        progress: Whether to draw progress bars.
    """

    protocol: Protocol
    metrics: list[str]
    output: Path
    model: str | None = None
    pictures: Path | None = None
    reference: Path | None = None
    prompts: Path | None = None
    seed: int = 0
    num_decoder_steps: int = 4
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    student: Path | None = None
    batch_size: int = 32
    features_weights: str | None = None
    lpips_weights: Path | None = None
    skip_unreadable: bool = False
    mixed_sizes: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    progress: bool = True


@dataclass(frozen=True)
class _Side:
    """Pictures that are there: how many, how to read them, and what a result says of them."""

    count: int
    batches: Callable[[], Any]
    facts: dict[str, Any]
    skipped: int = 0


class Evaluation:
    """One run; everything that can be refused is refused before the first picture is drawn.

    Args:
        settings: Its inputs.
        model: Draws in the place of `settings.model`, for models that no folder holds.

    Raises:
        CheckpointError: A model or weights are missing; the message says which file to put where.
        DependencyError: A package of the `eval` extra is missing.
        InputError: The inputs do not fit together or are too few.
    """

    def __init__(self, settings: Settings, model: Model | None = None) -> None:
        self.settings = settings
        self.protocol = settings.protocol
        self.not_computed: dict[str, str] = {}
        sources = [settings.pictures, settings.model or model]
        if sum(source is not None for source in sources) != 1:
            raise InputError("give either --model or --pictures")
        self._check_libraries()
        self.scenes = self._scenes() if self.protocol.features == "scenes" else None
        self.reference = self._reference() if self._wants(*SET_METRICS) else None
        self.prompts = self._prompts()
        self.given = self._given() if settings.pictures else None
        self._drop_what_has_no_input()
        self._load_extractors()
        self._check_counts()
        self.model = model or self._load_model()
        self.facts = self._generation_facts()
        if self.model is not None:
            generation.check_facts(settings.output, self.facts)

    def _wants(self, *names: str) -> bool:
        return any(n in self.settings.metrics and n not in self.not_computed for n in names)

    def _check_libraries(self) -> None:
        if self._wants("fid", "kid", "lpips_diversity"):
            metrics.check_library("torchmetrics", "torchmetrics")
        if self._wants(*NEIGHBOUR_METRICS):
            metrics.check_library("prdc", "prdc")

    def _scenes(self) -> SceneTest:
        settings = self.settings
        for option, value in (("reference", settings.reference), ("prompts", settings.prompts)):
            if value is not None:
                raise InputError(f"the scenes preset has its own {option}: leave --{option} out")
        from tiue.evaluate.scenes_preset import SceneTest

        return SceneTest(self.protocol, settings.output.parent / "scenes-truth", settings.device)

    def _openmoji(self) -> Any:
        from tiue.evaluate.openmoji_preset import reference_pictures

        return reference_pictures(self.settings.output.parent / "openmoji-pictures.safetensors")

    def _reference(self) -> _Side:
        settings, size = self.settings, self.protocol.resolution
        if self.scenes is not None:
            facts = {"pictures": "true scenes of the same prompts"}
            return _Side(self.scenes.num_true, lambda: (), facts)
        if settings.reference is None and self.protocol.features == "openmoji":
            images = self._openmoji().images
            facts = {"pictures": "OpenMoji, all that the embedded model was trained on"}
            return _Side(len(images), lambda: images.split(settings.batch_size), facts)
        if settings.reference is None:
            raise InputError(
                f"the preset {self.protocol.name} compares with real pictures: give their folder"
                " with --reference"
            )
        return self._folder(settings.reference, one_size=False, size=size)

    def _folder(self, path: Path, one_size: bool, size: int) -> _Side:
        found = pictures.scan_folder(path, self.settings.skip_unreadable, one_size)
        smaller = sum(count for side, count in found.sizes.items() if min(side) < size)
        facts = {"folder": path.name, "enlarged": smaller}
        batch = self.settings.batch_size
        return _Side(
            len(found.paths),
            lambda: pictures.read_batches(found.paths, size, batch),
            facts,
            len(found.skipped),
        )

    def _given(self) -> _Side:
        settings = self.settings
        assert settings.pictures is not None
        side = self._folder(settings.pictures, not settings.mixed_sizes, self.protocol.resolution)
        if self.prompts is not None and len(self.prompts) != side.count:
            raise InputError(
                f"{side.count} pictures in {settings.pictures} and {len(self.prompts)} prompts do"
                " not pair: give one prompt a picture, in the order of the files' names"
            )
        return side

    def _prompts(self) -> list[str] | None:
        settings = self.settings
        if self.scenes is not None:
            return self.scenes.prompts
        if settings.pictures is not None:
            return prompts.read_prompts(settings.prompts) if settings.prompts else None
        if settings.prompts is not None:
            names = prompts.read_prompts(settings.prompts)
        elif self.protocol.features == "openmoji":
            names = self._openmoji().prompts
        else:
            raise InputError("give the prompts to draw with --prompts")
        return prompts.draw_prompts(names, self.protocol.num_prompts, self.protocol.prompt_seed)

    def _drop_what_has_no_input(self) -> None:
        """Metrics that these inputs cannot give: named with the reason, never guessed."""
        if self.scenes is not None:
            self.not_computed["clip_score"] = "the judge says what was drawn"
        elif self.prompts is None:
            self.not_computed["clip_score"] = "no prompts were given"
        if self.given is not None and self.scenes is None:
            self.not_computed["lpips_diversity"] = (
                "it draws several pictures a prompt, which needs --model"
            )
        if not self._wants(*self.settings.metrics):
            raise InputError(
                "nothing can be computed: "
                + "; ".join(f"{name}: {why}" for name, why in self.not_computed.items())
            )

    def _load_extractors(self) -> None:
        settings, protocol = self.settings, self.protocol
        self.extractor = self.pair_encoder = None
        self.maps: lpips.Maps | None = None
        self.map_weights: list[Tensor] | None = None
        self.extractors: dict[str, Any] = {}
        if self.scenes is not None:
            self.extractors["features"] = self.scenes.describe()
            return
        if self._wants(*SET_METRICS):
            self.extractor = load_extractor(
                protocol.features, settings.features_weights, settings.device
            )
            self.extractors["features"] = self.extractor.describe()
        if self._wants("clip_score"):
            self.pair_encoder = load_pair_encoder(protocol.clip, settings.device)
            self.extractors["clip"] = self.pair_encoder.describe()
        if self._wants("lpips_diversity"):
            if protocol.lpips == "openmoji":
                from tiue.evaluate.openmoji_preset import OpenMojiExtractor

                own = OpenMojiExtractor(settings.device)
                self.maps, self.extractors["lpips"] = own.maps, own.describe()
            else:
                self.maps, self.map_weights = lpips.load_alexnet(
                    settings.lpips_weights, settings.device
                )
                self.extractors["lpips"] = {"kind": "alex", "version": "0.1"}

    @property
    def num_generated(self) -> int:
        """Pictures of the model's that are compared."""
        return self.given.count if self.given else len(self.prompts or [])

    def _check_counts(self) -> None:
        measured = self.scenes or self.extractor
        if measured is not None and self.reference is not None:
            metrics.check_samples(
                self.settings.metrics,
                self.protocol,
                measured.width,
                self.num_generated,
                self.reference.count,
            )

    def _load_model(self) -> Model | None:
        settings = self.settings
        if settings.model is None:
            return None
        guidance_scale = settings.guidance_scale
        if self.scenes is not None and settings.num_inference_steps and guidance_scale is None:
            from tiue.embedded.config import GUIDANCE_SCALE

            guidance_scale = GUIDANCE_SCALE
        return load_model(
            settings.model,
            settings.device,
            settings.dtype,
            settings.num_decoder_steps,
            settings.num_inference_steps,
            guidance_scale,
            self.protocol.generated_size,
            settings.student,
        )

    def _generation_facts(self) -> dict[str, Any]:
        if self.model is None:
            return {}
        return {
            **self.model.facts,
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "prompts_sha256": prompts.prompts_hash(self.prompts or []),
            "device": self.settings.device.type,
            "torch": torch.__version__,
        }

    def generate(self) -> dict[str, float]:
        """Draw what is missing of this rank's share, and wait for the other ranks.

        Returns:
            Pictures drawn now, and the seconds that took.

        Raises:
            OutputError: The output folder cannot be written.
        """
        from accelerate import PartialState

        if self.model is None or self.prompts is None:
            return {}
        settings, protocol = self.settings, self.protocol
        generation.write_facts(settings.output, self.facts)
        jobs = {"pictures": generation.picture_jobs(self.prompts, settings.seed)}
        if self._wants("lpips_diversity") and self.scenes is None:
            chosen = self.prompts[: protocol.diversity_prompts]
            jobs["diversity"] = generation.diversity_jobs(
                chosen, protocol.diversity_images, settings.seed
            )
        drawn, seconds = 0, 0.0
        for name, part in jobs.items():
            count, took = generation.generate(
                part,
                settings.output / name,
                self.model.draw,
                settings.batch_size,
                name,
                settings.progress,
            )
            drawn, seconds = drawn + count, seconds + took
        PartialState().wait_for_everyone()
        return {"drawn": drawn, "seconds": round(seconds, 1)}

    def compute(self) -> result.Result:
        """Extract features and compute the figures of the pictures that are there.

        Returns:
            The result; nothing in it was not computed.

        Raises:
            InputError: A picture is missing or broken.
            NonFiniteError: A feature is not finite.
        """
        started = time.perf_counter()
        settings, protocol = self.settings, self.protocol
        side = self.given or self._folder(
            settings.output / "pictures", one_size=True, size=protocol.resolution
        )
        if side.count != self.num_generated:
            raise InputError(
                f"{settings.output / 'pictures'} holds {side.count} pictures and"
                f" {self.num_generated} were drawn: remove what is not of this evaluation"
            )
        figures: dict[str, float] = {}
        if self.scenes is not None:
            figures, detail = self.scenes.compute(
                torch.cat(list(side.batches())),
                self.model.autoencoder if self.model else None,
                settings.metrics,
            )
            found = self._result(side, figures, time.perf_counter() - started)
            return found | {"scenes": detail}
        if self.extractor is not None and self.reference is not None:
            features = self._extract(self.extractor, side, "features")
            known = self._extract(self.extractor, self.reference, "reference")
            figures |= metrics.set_figures(features, known, settings.metrics, protocol)
        if self.pair_encoder is not None and self.prompts is not None:
            encoder, size = self.pair_encoder, settings.batch_size
            shown = self._extract(encoder.embed_pictures, side, "clip")
            texts = [
                encoder.embed_texts(self.prompts[start : start + size]).cpu()
                for start in range(0, len(self.prompts), size)
            ]
            figures["clip_score"], figures["clip_score_deviation"] = metrics.clip_score(
                shown, torch.cat(texts)
            )
        if self.maps is not None:
            figures["lpips_diversity"], figures["lpips_diversity_deviation"] = self._diversity()
        return self._result(side, figures, time.perf_counter() - started)

    def _extract(self, extractor: Any, side: _Side, label: str) -> Tensor:
        return extract(extractor, side.batches(), side.count, label, self.settings.progress)

    def _diversity(self) -> tuple[float, float]:
        assert self.maps is not None
        found = pictures.scan_folder(self.settings.output / "diversity")
        chosen = (self.prompts or [])[: self.protocol.diversity_prompts]
        if len(found.paths) != len(chosen) * self.protocol.diversity_images:
            raise InputError(
                f"{self.settings.output / 'diversity'} holds {len(found.paths)} pictures of"
                f" {len(chosen)} prompts: remove what is not of this evaluation"
            )
        groups = pictures.read_batches(
            found.paths, self.protocol.resolution, self.protocol.diversity_images
        )
        return lpips.lpips_diversity(list(groups), self.maps, self.map_weights)

    def _result(self, side: _Side, figures: dict[str, float], seconds: float) -> result.Result:
        reference = self.reference
        return {
            "format": result.FORMAT,
            "protocol": dataclasses.asdict(self.protocol),
            "model": self.model.facts if self.model else side.facts,
            "figures": figures,
            "not_computed": {n: w for n, w in self.not_computed.items()
                             if n in self.settings.metrics},
            "counts": {
                "generated": side.count,
                "reference": reference.count if reference else 0,
                "skipped": side.skipped + (reference.skipped if reference else 0),
            },
            "reference": reference.facts if reference else {},
            "prompts_sha256": prompts.prompts_hash(self.prompts) if self.prompts else None,
            "extractors": self.extractors,
            "seeds": {
                "noise": self.settings.seed,
                "prompts": self.protocol.prompt_seed,
                "metrics": self.protocol.metric_seed,
            },
            "seconds": {"metrics": round(seconds, 1)},
            "device": self.settings.device.type,
            "versions": result.versions(),
        }  # fmt: skip


def evaluate(settings: Settings, model: Model | None = None) -> result.Result | None:
    """Run an evaluation, or go on with one that was stopped.

    Args:
        settings: Its inputs.
        model: Draws in the place of `settings.model`.

    Returns:
        The result, also written to `result.json` in the output folder, beside `sheet.png`; None on
        every rank but the first.

    Raises:
        TiUEError: As `Evaluation`.
    """
    from accelerate import PartialState

    state = PartialState(cpu=settings.device.type == "cpu")
    run = Evaluation(settings, model)
    drawing = run.generate()
    if not state.is_main_process:
        return None
    found = run.compute()
    if drawing:
        found["seconds"]["generation"] = drawing["seconds"]
        found["counts"] = {**found["counts"]}
        found["drawn_now"] = drawing["drawn"]
        _save_sheet(settings.output, run.prompts or [])
    result.save_result(found, settings.output / "result.json")
    return found


def _save_sheet(output: Path, labels: list[str]) -> None:
    paths = sorted((output / "pictures").glob("*.png"))[:SHEET_PICTURES]
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error}") from error
    save_image(contact_sheet(images, labels[: len(images)], columns=5), output / "sheet.png")
