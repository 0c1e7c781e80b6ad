"""Makes the embedded model: `python -m tiue.openmoji.train STAGE`, one stage after another."""

from __future__ import annotations

from pathlib import Path

from tiue.embedded.commands import DecoderSteps, RecipeSteps, Resume, Seed, Steps, Weights, Work
from tiue.embedded.config import DECODER_STEPS, AutoencoderConfig, DecoderConfig
from tiue.openmoji.config import TeacherConfig
from tiue.openmoji.data import load_pictures, write_prompts
from tiue.terminal import command_group

app = command_group(
    "Make the OpenMoji model: autoencoder, decoder, teacher, student, export, in this order."
)

DEFAULT_WORK = Path("runs/openmoji")


def pictures_file(work: Path) -> Path:
    """The cache of rendered pictures inside the work folder."""
    return work / "pictures.safetensors"


@app.command()
def autoencoder(
    work: Work = DEFAULT_WORK,
    steps: Steps = AutoencoderConfig.steps,
    seed: Seed = AutoencoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder of the pictures."""
    from tiue.embedded.autoencoder import train_autoencoder

    config = AutoencoderConfig(steps=steps, seed=seed)
    train_autoencoder(load_pictures(pictures_file(work)), work / "autoencoder", config, resume)


@app.command()
def decoder(
    work: Work = DEFAULT_WORK,
    steps: Steps = DecoderConfig.steps,
    seed: Seed = DecoderConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the autoencoder's decoder on, latents fixed; may run beside the teacher."""
    from tiue.embedded.autoencoder import train_decoder

    config = DecoderConfig(steps=steps, seed=seed)
    pictures = load_pictures(pictures_file(work))
    train_decoder(pictures, work / "autoencoder", work / "decoder", config, resume)


@app.command()
def teacher(
    work: Work = DEFAULT_WORK,
    steps: Steps = TeacherConfig.steps,
    seed: Seed = TeacherConfig.seed,
    resume: Resume = False,
) -> None:
    """Train the teacher's UNet and text encoder on the autoencoder's latents.

    On several cores: torchrun --nproc-per-node 2 -m tiue.openmoji.train teacher
    """
    from tiue.embedded.loop import join_processes
    from tiue.openmoji.teacher import train_teacher

    join_processes()
    config = TeacherConfig(steps=steps, seed=seed)
    pictures = load_pictures(pictures_file(work))
    train_teacher(pictures, work / "autoencoder", work / "teacher", config, resume)


@app.command()
def student(
    work: Work = DEFAULT_WORK,
    num_decoder_steps: DecoderSteps = DECODER_STEPS,
    steps: RecipeSteps = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Distil the teacher into a one-pass student, by the recipe `openmoji` of `tiue distill`.

    The teacher is the work folder's, or the shipped one where that has none.
    """
    from tiue.embedded.student import train_student

    prompts(work / "prompts.txt", work)
    train_student("openmoji", work, num_decoder_steps, resume, steps, seed=seed)


@app.command()
def prompts(path: Path, work: Work = DEFAULT_WORK) -> None:
    """Write the training prompts to a text file, one a line."""
    write_prompts(load_pictures(pictures_file(work)), path)


@app.command()
def export(work: Work = DEFAULT_WORK, output: Weights = None) -> None:
    """Write teacher and student, those that are trained, as float16 diffusers folders."""
    from tiue.embedded.export import export_weights
    from tiue.openmoji import WEIGHTS

    export_weights(work, output or WEIGHTS)


if __name__ == "__main__":
    app()
