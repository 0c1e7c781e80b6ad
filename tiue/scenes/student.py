"""The student: the teacher distilled into one pass by `tiue.distill`, from prompts alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiue.distill import distill, load_config
from tiue.files import write_file
from tiue.openmoji.student import student_folder
from tiue.scenes.grammar import draw_request

PROMPTS = 20_000


def write_prompts(path: Path, count: int = PROMPTS, seed: int = 0) -> None:
    """Writes prompts of the grammar to a text file, one a line, nothing held out among them."""
    generator = random.Random(seed)
    lines = [str(draw_request(generator)) for _ in range(count)]
    write_file(path, lambda beside: beside.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def train_student(
    work: Path, num_decoder_steps: int, resume: bool = False, **settings: Any
) -> Path:
    """Distils the teacher of the work folder, or else the shipped one, by the recipe `scenes`.

    Args:
        work: may hold `teacher/pipeline`; receives `prompts.txt` and `student-k<K>/`.
        num_decoder_steps: K.
        resume: go on from the newest checkpoint.
        **settings: other fields of `DistillConfig`, over the recipe's.

    Returns:
        The student's folder: `unet/`, `scheduler/`, `checkpoints/`, `log.jsonl`.
    """
    teacher = work / "teacher" / "pipeline"
    if teacher.is_dir():
        settings["teacher"] = str(teacher)
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(work / "prompts.txt")
    return distill(
        load_config(
            "scenes",
            prompts=str(work / "prompts.txt"),
            num_decoder_steps=num_decoder_steps,
            resume=resume,
            save_pipeline=False,
            **{"output": student_folder(work, num_decoder_steps), **settings},
        )
    )
