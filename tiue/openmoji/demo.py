"""The embedded teacher distilled from scratch: `python -m tiue.openmoji.demo`, minutes on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiue.embedded.config import DECODER_STEPS, GUIDANCE_SCALE, TEACHER_STEPS
from tiue.openmoji.config import TEN_PROMPTS
from tiue.terminal import command_group

if TYPE_CHECKING:
    from PIL import Image

app = command_group()

_ROWS = ("one pass, before", "one pass, after", f"teacher, {TEACHER_STEPS} steps")


@app.callback(invoke_without_command=True)
def main(
    output: Annotated[Path, typer.Option(help="Folder for the run and the pictures.")] = Path(
        "out/distill"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Student updates.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Distil the embedded teacher into a one-pass student, and draw with both, side by side."""
    import torch

    from tiue.distill import distill, load_config
    from tiue.images import contact_sheet, save_image
    from tiue.openmoji import WEIGHTS, load_openmoji, load_openmoji_teacher
    from tiue.openmoji.data import load_pictures, write_prompts

    prompts = output / "prompts.txt"
    write_prompts(load_pictures(output / "pictures.safetensors"), prompts)
    run = output / "run"
    config = load_config(
        "openmoji", prompts=str(prompts), output=run, steps=steps, seed=seed, save_pipeline=False,
        checkpoint_every=steps,
    )  # fmt: skip
    started = time.monotonic()
    distill(config, report=typer.echo)
    typer.echo(f"Distilled in {time.monotonic() - started:.0f} s.")

    def noises() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(0) for _ in TEN_PROMPTS]

    def draw(student: Path) -> list[Image.Image]:
        pipe: Any = load_openmoji(student=student)
        pipe.set_progress_bar_config(disable=True)
        return pipe(list(TEN_PROMPTS), num_decoder_steps=DECODER_STEPS, generator=noises()).images

    teacher = load_openmoji_teacher()
    teacher.set_progress_bar_config(disable=True)
    taught = teacher(
        list(TEN_PROMPTS), num_inference_steps=TEACHER_STEPS, guidance_scale=GUIDANCE_SCALE,
        generator=noises(),
    ).images  # fmt: skip
    # One pass with the teacher's own weights: what the student starts as.
    images = [*draw(WEIGHTS / "teacher"), *draw(run), *taught]
    labels = [f"{prompt}: {row}" for row in _ROWS for prompt in TEN_PROMPTS]
    sheet = output / "before-and-after.png"
    save_image(contact_sheet(images, labels, len(TEN_PROMPTS)), sheet)
    typer.echo(sheet)


if __name__ == "__main__":
    app()
