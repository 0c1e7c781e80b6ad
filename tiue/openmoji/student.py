"""The student: the teacher distilled into one pass by `tiue.distill`, from prompts alone."""

from __future__ import annotations

from pathlib import Path

from tiue.distill import DistillConfig, distill
from tiue.errors import CheckpointError
from tiue.openmoji.config import StudentConfig
from tiue.openmoji.data import Pictures, write_prompts


def student_folder(work: Path, num_decoder_steps: int) -> Path:
    """The folder of the student with K decoder timesteps inside the work folder."""
    return work / f"student-k{num_decoder_steps}"


def train_student(
    pictures: Pictures, work: Path, config: StudentConfig, resume: bool = False
) -> Path:
    """Distils the teacher of the work folder.

    Args:
        pictures: only their prompts are used.
        work: holds `teacher/pipeline`; receives `prompts.txt` and `student-k<K>/`.
        config: K, rates, steps, seed.
        resume: go on from the newest checkpoint.

    Returns:
        The student's folder: `unet/`, `scheduler/`, `checkpoints/`, `log.jsonl`.

    Raises:
        CheckpointError: if the teacher is not there yet.
    """
    teacher = work / "teacher" / "pipeline"
    if not teacher.is_dir():
        raise CheckpointError(
            f"no teacher in {teacher}: run `python -m tiue.openmoji.train teacher`"
        )
    write_prompts(pictures, work / "prompts.txt")
    return distill(
        DistillConfig(
            teacher=str(teacher),
            prompts=work / "prompts.txt",
            output=student_folder(work, config.num_decoder_steps),
            num_decoder_steps=config.num_decoder_steps,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            guidance_scale=config.guidance_scale,
            lora_guidance_scale=config.lora_guidance_scale,
            # The term holds predicted noise near a normal distribution; this UNet predicts v.
            kl_weight=0.0,
            min_timestep=config.min_timestep,
            ema_decay=config.ema_decay,
            seed=config.seed,
            cpu=True,
            resume=resume,
            save_pipeline=False,
        )
    )
