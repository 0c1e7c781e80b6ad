"""Writes the trained model into the package: whole diffusers folders, float16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tiue.embedded.autoencoder import load_autoencoder
from tiue.embedded.config import DECODER_STEPS
from tiue.errors import CheckpointError


def student_folder(work: Path, num_decoder_steps: int) -> Path:
    """The folder of the student with K decoder timesteps inside the work folder."""
    return work / f"student-k{num_decoder_steps}"


def export_weights(work: Path, output: Path, needs_decoder: bool = True) -> None:
    """Writes those of `teacher/` and `student/` that are trained; each appears whole or not at all.

    Args:
        work: the work folder of the training commands.
        output: receives `teacher/`, a Stable Diffusion pipeline, and `student/`, a UNet and its
            scheduler (text encoder, tokenizer and autoencoder are the teacher's).
        needs_decoder: whether a teacher is exported with a decoder that was trained on alone only;
            else with the autoencoder's own where there is none.

    Raises:
        CheckpointError: if neither is trained yet, or a teacher has no decoder.
    """
    teacher, student = work / "teacher" / "pipeline", student_folder(work, DECODER_STEPS)
    has_student = (student / "unet").is_dir()
    if teacher.is_dir():
        decoder = work / "decoder"
        if not decoder.is_dir() and not needs_decoder:
            decoder = work / "autoencoder"
        _export_teacher(teacher, decoder, output / "teacher")
    elif not has_student:
        raise CheckpointError(
            f"no teacher in {teacher} and no student in {student}: run `python -m "
            "tiue.openmoji.train teacher` or `... student`"
        )
    if has_student:
        _export_student(student, output / "student")


def _export_teacher(source: Path, decoder: Path, place: Path) -> None:
    # The teacher's training saw latents only; the decoder was trained on meanwhile.
    vae = load_autoencoder(decoder).half()
    pipeline = StableDiffusionPipeline.from_pretrained(source, vae=vae, dtype=torch.float16)
    with _Replacing(place) as folder:
        pipeline.save_pretrained(folder)
        facts = source.parent / "training.json"
        if facts.exists():
            shutil.copy(facts, folder / "training.json")
        _forget_origin(folder)


def _export_student(source: Path, place: Path) -> None:
    with _Replacing(place) as folder:
        unet = UNet2DConditionModel.from_pretrained(source / "unet", dtype=torch.float16)
        unet.save_pretrained(folder / "unet")
        DDIMScheduler.from_pretrained(source / "scheduler").save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "TiUEPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["tiue", "TiUEUNet"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        _forget_origin(folder)


def _forget_origin(folder: Path) -> None:
    """Takes the folders of the training machine out of every configuration."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Replacing:
    """A folder written beside its place and renamed into it once it is whole."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.partial = place.with_name(f".{place.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.place, ignore_errors=True)
            self.partial.rename(self.place)
        else:
            shutil.rmtree(self.partial)
