"""Makes the scenes model: `python -m tiue.scenes.train STAGE`, one stage after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiue.openmoji.config import DecoderConfig
from tiue.scenes.config import DECODER_STEPS, AutoencoderConfig, TeacherConfig
from tiue.terminal import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    help="Make the scenes model: autoencoder, decoder, teacher, student, export, in this order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

DEFAULT_WORK = Path("runs/scenes")
Work = Annotated[Path, typer.Option(help="Where pictures, checkpoints and results go.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]


@app.command()
def autoencoder(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = AutoencoderConfig.steps,
    seed: Seed = AutoencoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the OpenMoji model's autoencoder on, for scenes."""
    from tiue.openmoji import load_openmoji
    from tiue.openmoji.autoencoder import train_autoencoder
    from tiue.scenes.data import load_pool

    config = AutoencoderConfig(steps=steps, seed=seed)
    pool = load_pool(work / "autoencoder.safetensors", config.pool, seed + 1)
    model = load_openmoji().vae.requires_grad_(True)
    train_autoencoder(pool, work / "autoencoder", config, resume, model)


@app.command()
def decoder(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = DecoderConfig.steps,
    seed: Seed = DecoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder's decoder on, latents fixed; may run beside the teacher."""
    from tiue.openmoji.autoencoder import train_decoder
    from tiue.scenes.data import load_pool

    pool = load_pool(work / "autoencoder.safetensors", AutoencoderConfig.pool, 1)
    config = DecoderConfig(steps=steps, seed=seed)
    train_decoder(pool, work / "autoencoder", work / "decoder", config, resume)


@app.command()
def teacher(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = TeacherConfig.steps,
    seed: Seed = TeacherConfig.seed,
    resume: Resume = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: faster where a CPU has it.")
    ] = TeacherConfig.bf16,
) -> None:
    """Train the teacher's UNet and text encoder on the autoencoder's latents.

    With --resume and no checkpoint in the work folder, the shipped teacher is trained on.

    On several cores: torchrun --nproc-per-node 2 -m tiue.scenes.train teacher
    """
    from torch import distributed

    from tiue.scenes import WEIGHTS
    from tiue.scenes.data import load_pool
    from tiue.scenes.teacher import train_teacher

    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")

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
    num_decoder_steps: Annotated[
        int, typer.Option("--num-decoder-steps", "-k", min=1, help="Decoder timesteps K.")
    ] = DECODER_STEPS,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates; by default the recipe's.")
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Distil the teacher into a one-pass student, by the recipe `scenes` of `tiue distill`.

    The teacher is the work folder's, or the shipped one where that has none.
    """
    from tiue.scenes.student import train_student

    given = {} if steps is None else {"steps": steps}
    train_student(work, num_decoder_steps, resume, seed=seed, **given)


@app.command()
def export(
    work: Work = DEFAULT_WORK,
    output: Annotated[
        Path | None, typer.Option(help="By default the weights folder of this package.")
    ] = None,
) -> None:
    """Write teacher and student, those that are trained, as float16 diffusers folders."""
    from tiue.openmoji.export import export_weights
    from tiue.scenes import WEIGHTS

    export_weights(work, output or WEIGHTS, needs_decoder=False)


@app.command()
def judge(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 1000,
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
