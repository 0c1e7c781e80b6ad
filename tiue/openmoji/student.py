"""The student: the teacher distilled into one pass by `tiue.distill`, from prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiue.distill import distill, load_config
from tiue.openmoji.data import Pictures, write_prompts


def student_folder(work: Path, num_decoder_steps: int) -> Path:
    """The folder of the student with K decoder timesteps inside the work folder."""
    return work / f"student-k{num_decoder_steps}"


def train_student(
    pictures: Pictures, work: Path, num_decoder_steps: int, resume: bool = False, **settings: Any
) -> Path:
    """Distils the teacher of the work folder, or else the shipped one, by the recipe `openmoji`.

    Args:
        pictures: only their prompts are used.
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
    write_prompts(pictures, work / "prompts.txt")
    return distill(
        load_config(
            "openmoji",
            prompts=str(work / "prompts.txt"),
            output=student_folder(work, num_decoder_steps),
            num_decoder_steps=num_decoder_steps,
            resume=resume,
            save_pipeline=False,
            **settings,
        )
    )
