"""Makes the embedded model: `python -m tiue.openmoji.train STAGE`, one stage after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiue.openmoji.config import DECODER_STEPS, AutoencoderConfig, DecoderConfig, TeacherConfig
from tiue.openmoji.data import load_pictures, write_prompts
from tiue.terminal import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    help="Make the OpenMoji model: autoencoder, decoder, teacher, student, export, in this order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

DEFAULT_WORK = Path("runs/openmoji")
Work = Annotated[Path, typer.Option(help="Where pictures, checkpoints and results go.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]


def pictures_file(work: Path) -> Path:
    """The cache of rendered pictures inside the work folder."""
    return work / "pictures.safetensors"


@app.command()
def autoencoder(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = AutoencoderConfig.steps,
    seed: Seed = AutoencoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder of the pictures."""
    from tiue.openmoji.autoencoder import train_autoencoder

    config = AutoencoderConfig(steps=steps, seed=seed)
    train_autoencoder(load_pictures(pictures_file(work)), work / "autoencoder", config, resume)


@app.command()
def decoder(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = DecoderConfig.steps,
    seed: Seed = DecoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder's decoder on, latents fixed; may run beside the teacher."""
    from tiue.openmoji.autoencoder import train_decoder

    config = DecoderConfig(steps=steps, seed=seed)
    pictures = load_pictures(pictures_file(work))
    train_decoder(pictures, work / "autoencoder", work / "decoder", config, resume)


@app.command()
def teacher(
    work: Work = DEFAULT_WORK,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = TeacherConfig.steps,
    seed: Seed = TeacherConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the teacher's UNet and text encoder on the autoencoder's latents.

    On several cores: torchrun --nproc-per-node 2 -m tiue.openmoji.train teacher
    """
    from torch import distributed

    from tiue.openmoji.teacher import train_teacher

    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")

    config = TeacherConfig(steps=steps, seed=seed)
    pictures = load_pictures(pictures_file(work))
    train_teacher(pictures, work / "autoencoder", work / "teacher", config, resume)


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
    """Distil the teacher into a one-pass student, by the recipe `openmoji` of `tiue distill`.

    The teacher is the work folder's, or the shipped one where that has none.
    """
    from tiue.openmoji.student import train_student

    pictures = load_pictures(pictures_file(work))
    given = {} if steps is None else {"steps": steps}
    train_student(pictures, work, num_decoder_steps, resume, seed=seed, **given)


@app.command()
def prompts(path: Path, work: Work = DEFAULT_WORK) -> None:
    """Write the training prompts to a text file, one a line."""
    write_prompts(load_pictures(pictures_file(work)), path)


@app.command()
def export(
    work: Work = DEFAULT_WORK,
    output: Annotated[
        Path | None, typer.Option(help="By default the weights folder of this package.")
    ] = None,
) -> None:
    """Write teacher and student, those that are trained, as float16 diffusers folders."""
    from tiue.openmoji import WEIGHTS
    from tiue.openmoji.export import export_weights

    export_weights(work, output or WEIGHTS)


if __name__ == "__main__":
    app()
