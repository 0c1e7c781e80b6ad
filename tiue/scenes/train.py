"""Makes the scenes model: `python -m tiue.scenes.train STAGE`, one stage after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiue.embedded.commands import DecoderSteps, RecipeSteps, Resume, Seed, Steps, Weights, Work
from tiue.embedded.config import DECODER_STEPS, DecoderConfig
from tiue.scenes.config import AutoencoderConfig, TeacherConfig, TextConfig
from tiue.terminal import command_group

app = command_group(
    "Make the scenes model: autoencoder, decoder, text, teacher, student, export, in this order."
)

DEFAULT_WORK = Path("runs/scenes")


@app.command()
def autoencoder(
    work: Work = DEFAULT_WORK,
    steps: Steps = AutoencoderConfig.steps,
    seed: Seed = AutoencoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the OpenMoji model's autoencoder on, for scenes."""
    from tiue.embedded.autoencoder import train_autoencoder
    from tiue.openmoji import load_openmoji
    from tiue.scenes.data import load_pool

    config = AutoencoderConfig(steps=steps, seed=seed)
    pool = load_pool(work / "autoencoder.safetensors", config.pool, seed + 1)
    model = load_openmoji().vae.requires_grad_(True)
    train_autoencoder(pool, work / "autoencoder", config, resume, model)


@app.command()
def decoder(
    work: Work = DEFAULT_WORK,
    steps: Steps = DecoderConfig.steps,
    seed: Seed = DecoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder's decoder on, latents fixed; may run beside the teacher."""
    from tiue.embedded.autoencoder import train_decoder
    from tiue.scenes.data import load_pool

    pool = load_pool(work / "autoencoder.safetensors", AutoencoderConfig.pool, 1)
    config = DecoderConfig(steps=steps, seed=seed)
    train_decoder(pool, work / "autoencoder", work / "decoder", config, resume)


@app.command()
def text(
    work: Work = DEFAULT_WORK,
    steps: Steps = TextConfig.steps,
    seed: Seed = TextConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the text encoder to say what may be where, for the teacher, which keeps it as it is."""
    from tiue.scenes.text import train_text_encoder

    config = TextConfig(steps=steps, seed=seed)
    train_text_encoder(work / "text", TeacherConfig(), config, resume)


@app.command()
def teacher(
    work: Work = DEFAULT_WORK,
    steps: Steps = TeacherConfig.steps,
    seed: Seed = TeacherConfig.seed,
    resume: Resume = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: faster where a CPU has it.")
    ] = TeacherConfig.bf16,
) -> None:
    """Train the teacher's UNet on the autoencoder's latents.

    With --resume and no checkpoint in the work folder, the shipped teacher is trained on.

    On several cores: torchrun --nproc-per-node 2 -m tiue.scenes.train teacher
    """
    from tiue.embedded.loop import join_processes
    from tiue.scenes import WEIGHTS
    from tiue.scenes.data import load_pool
    from tiue.scenes.teacher import train_teacher

    join_processes()
    config = TeacherConfig(steps=steps, seed=seed, bf16=bf16)
    pool = load_pool(work / "teacher.safetensors", config.pool, seed)
    shipped = WEIGHTS / "teacher"
    start = shipped if resume and (shipped / "training.json").exists() else None
    autoencoder = work / "autoencoder"
    if start is not None and not (autoencoder / "vae").is_dir():
        autoencoder = start  # whose latents the shipped teacher knows
    train_teacher(pool, autoencoder, work / "teacher", config, resume, start)


@app.command()
def average(work: Work = DEFAULT_WORK) -> None:
    """Write the pipeline of a teacher whose training goes on, for `export`."""
    from tiue.scenes.teacher import save_averaged

    steps = save_averaged(work / "autoencoder", work / "teacher", TeacherConfig())
    typer.echo(f"{work / 'teacher' / 'pipeline'}: {steps} updates")


@app.command()
def student(
    work: Work = DEFAULT_WORK,
    num_decoder_steps: DecoderSteps = DECODER_STEPS,
    steps: RecipeSteps = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Distil the teacher into a one-pass student, by the recipe `scenes` of `tiue distill`.

    The teacher is the work folder's, or the shipped one where that has none.
    """
    from tiue.embedded.student import train_student
    from tiue.scenes.data import write_prompts

    write_prompts(work / "prompts.txt")
    train_student("scenes", work, num_decoder_steps, resume, steps, seed=seed)


@app.command()
def export(work: Work = DEFAULT_WORK, output: Weights = None) -> None:
    """Write teacher and student, those that are trained, as float16 diffusers folders."""
    from tiue.embedded.export import export_weights
    from tiue.scenes import WEIGHTS

    export_weights(work, output or WEIGHTS, needs_decoder=False)


@app.command()
def judge(
    work: Work = DEFAULT_WORK,
    steps: Steps = 1000,
    seed: Seed = 0,
    resume: Resume = False,
    output: Annotated[
        Path | None, typer.Option(help="File of the weights; by default the package's own.")
    ] = None,
) -> None:
    """Train the judge that measures the other models, and print what it gets right."""
    import json

    from tiue.scenes.judge import WEIGHTS
    from tiue.scenes.judge_training import JudgeConfig, train_judge

    config = JudgeConfig(steps=steps, seed=seed)
    facts = train_judge(work / "autoencoder", work / "judge", config, resume, output or WEIGHTS)
    typer.echo(json.dumps(facts, indent=2))


if __name__ == "__main__":
    app()
