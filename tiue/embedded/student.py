"""The student: the teacher distilled into one pass by `tiue.distill`, from prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiue.distill import distill, load_config
from tiue.embedded.export import student_folder


def train_student(
    recipe: str,
    work: Path,
    num_decoder_steps: int,
    resume: bool = False,
    steps: int | None = None,
    **settings: Any,
) -> Path:
    """Distils the teacher of the work folder, or else the shipped one.

    Args:
        recipe: that of `tiue distill`, named as the model.
        work: holds `prompts.txt`, may hold `teacher/pipeline`; receives `student-k<K>/`.
        num_decoder_steps: K.
        resume: go on from the newest checkpoint.
        steps: updates; by default the recipe's.
        **settings: other fields of `DistillConfig`, over the recipe's.

    Returns:
        The student's folder: `unet/`, `scheduler/`, `checkpoints/`, `log.jsonl`.
    """
    teacher = work / "teacher" / "pipeline"
    if teacher.is_dir():
        settings["teacher"] = str(teacher)
    if steps is not None:
        settings["steps"] = steps
    return distill(
        load_config(
            recipe,
            prompts=str(work / "prompts.txt"),
            num_decoder_steps=num_decoder_steps,
            resume=resume,
            save_pipeline=False,
            **{"output": student_folder(work, num_decoder_steps), **settings},
        )
    )
