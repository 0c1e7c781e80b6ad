"""The command line: `tiue generate | distill | embed-text | evaluate | compare | export | info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiue.devices import Dtype, find_device, find_dtype
from tiue.distill.command import SectionedHelp, distill_command, embed_text_command
from tiue.errors import InputError, OutputError
from tiue.evaluate.command import compare_command, evaluate_command
from tiue.terminal import OneLineErrors, check_seeds, read_texts, say

# torch, diffusers and transformers take seconds to import: the commands import them, so that
# --help and usage errors come at once.
if TYPE_CHECKING:
    import torch

    from tiue.pipelines import TiUEPipeline

_STAGES = ("text encoder", "encoder", "decoder", "VAE")
_VERSIONS = ("tiue", "torch", "diffusers", "transformers", "safetensors", "peft", "triton")


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Text to image in one pass: the UNet's encoder runs once, its decoder for all timesteps"
    " at once.",
)


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPTS...", help='What to draw, each text in quotes: "red apple" "rocket".'
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures; made if missing.")
    ] = Path("out"),
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="The same seed and prompt give the same picture; 1, 2, ... give others."
        ),
    ] = 0,
    num_images: Annotated[
        int,
        typer.Option("--num-images", "-n", min=1, help="Pictures a prompt, from seeds S, S+1, ..."),
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hugging Face id of a Stable Diffusion 1.x or 2.x model, for instance"
            " senmaonk/loopfree-sd1.5. By default the small OpenMoji model in this package, which"
            " needs no network.",
        ),
    ] = None,
    num_decoder_steps: Annotated[
        int,
        typer.Option(
            "--num-decoder-steps",
            "-k",
            min=1,
            help="Timesteps that the decoder runs at, in one batch. Use what the model was"
            " distilled for (4); fewer is faster.",
        ),
    ] = 4,
    height: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default the model's own size.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default the model's own size.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float16 on a CUDA GPU and float32 elsewhere.")
    ] = Dtype.auto,
    guidance_scale: Annotated[
        float,
        typer.Option(help="Classifier-free guidance if above 1. A distilled model needs none."),
    ] = 1.0,
    skip_below: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Faster, and slightly different pictures: leave out timesteps whose weight is"
            " under this, for instance 0.05. Off by default.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures computed at once; fewer need less memory.")
    ] = 8,
) -> None:
    """Draw a picture of each prompt, and a contact sheet of all of them."""
    prompts = read_texts(prompts)
    check_seeds(seed, num_images)
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty; say what to draw")
    _check_writable(output)

    import torch

    from tiue.images import contact_sheet, save_image

    place = find_device(device)
    pipe = _load(model, find_dtype(dtype, place)).to(place)
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: on a terminal only
    jobs = [(prompt, seed + index) for prompt in prompts for index in range(num_images)]
    names = _file_names(jobs)
    pictures = []
    with pipe.record_timings() as timings:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            # Noise comes from the CPU whatever the device: a seed means the same everywhere.
            generators = [torch.Generator().manual_seed(own_seed) for _, own_seed in batch]
            images = pipe(
                [prompt for prompt, _ in batch],
                height=height,
                width=width,
                num_decoder_steps=num_decoder_steps,
                guidance_scale=guidance_scale,
                generator=generators,
                skip_below=skip_below,
            ).images
            for image, name in zip(images, names[start:], strict=False):
                save_image(image, output / name)
                say(output / name)
            pictures += images
    labels = [
        prompt if num_images == 1 else f"{prompt} (seed {own_seed})" for prompt, own_seed in jobs
    ]
    sheet = output / "contact_sheet.png"
    save_image(contact_sheet(pictures, labels, num_images if num_images > 1 else None), sheet)
    say(sheet)
    for stage in _STAGES:
        say(f"{stage:12} {timings[stage]:8.3f} s")
    say(f"{'total':12} {sum(timings.values()):8.3f} s for {len(pictures)} pictures")


app.command("distill", cls=SectionedHelp)(distill_command)
app.command("embed-text")(embed_text_command)
app.command("evaluate")(evaluate_command)
app.command("compare")(compare_command)


class ExportFormat(str, Enum):
    """What `tiue export` writes."""

    torch = "torch"
    openvino = "openvino"
    pipeline = "pipeline"


@app.command()
def export(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hugging Face id of a Stable Diffusion 1.x or 2.x model. By default the"
            " small OpenMoji model in this package. For --format pipeline the output folder of"
            " `tiue distill`, or one of its checkpoints."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="What to write: a .pt2 file, .xml for OpenVINO, or a folder."
        ),
    ] = Path("tiue.pt2"),
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="torch: a torch.export program, which needs torch alone. openvino: an OpenVINO"
            " model, .xml and .bin. pipeline: a complete pipeline folder of a distilled student."
        ),
    ] = ExportFormat.torch,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a call.")] = 1,
    height: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default the model's own size.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default the model's own size.")
    ] = None,
    num_decoder_steps: Annotated[
        int, typer.Option("--num-decoder-steps", "-k", min=1, help="As in `tiue generate`.")
    ] = 4,
    teacher: Annotated[
        str | None,
        typer.Option(help="For --format pipeline, where the run's own teacher is elsewhere now."),
    ] = None,
) -> None:
    """Write the one pass and the VAE as a program, or a distilled student as a whole pipeline.

    A program takes noise and prompt embeddings and gives pictures.
    """
    _check_writable(output.parent)
    if format is ExportFormat.pipeline:
        from tiue.distill.export import export_student

        if model is None:
            raise InputError("name the output folder of `tiue distill`, or one of its checkpoints")
        say(export_student(Path(model), output, teacher))
        return

    import torch

    from tiue.pipelines import program

    program.check_suffix(output, ".pt2" if format is ExportFormat.torch else ".xml")
    pipe = _load(model, torch.float32)
    exported = program.export_pipeline(pipe, batch, height, width, num_decoder_steps)
    if format is ExportFormat.openvino:
        program.save_openvino(exported, output)
    else:
        program.save_torch(exported, output)
    for name, shape in program.inputs_of(exported).items():
        say(f"input  {name:14} {shape}")
    say(output)


@app.command()
def info() -> None:
    """Print versions, the device, the embedded model and the kernels, for a bug report."""
    import torch

    from tiue.openmoji import WEIGHTS
    from tiue_kernels.info import report

    say(f"{'python':14} {platform.python_version()} on {platform.platform()}")
    for package in _VERSIONS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        say(f"{package:14} {version}")
    device = find_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    say(f"{'device':14} {device} {name}".rstrip())
    say(f"{'OpenMoji model':14} {'in this package' if WEIGHTS.is_dir() else 'missing'}")
    say(f"\n{report()}")


def _check_writable(folder: Path) -> None:
    """Make the folder and write to it once, before minutes are spent on what goes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror}); give another folder with --output"
        ) from error


def _load(model: str | None, dtype: torch.dtype) -> TiUEPipeline:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    import tiue

    # Their bars for a load of seconds, and remarks on packages that nothing here needs.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if model is None:
        return tiue.load_openmoji(torch_dtype=dtype)
    return tiue.TiUEPipeline.from_pretrained(model, dtype=dtype)


def _file_names(jobs: list[tuple[str, int]]) -> list[str]:
    """One name a picture; prompts that come down to the same text are told apart by a number."""
    from tiue.images import safe_file_name

    seen: Counter[str] = Counter()
    names = []
    for prompt, seed in jobs:
        stem = f"{safe_file_name(prompt)}_seed{seed}"
        seen[stem] += 1
        name = f"{stem}.png" if seen[stem] == 1 else f"{stem}_{seen[stem]}.png"
        names.append(os.fsdecode(name.encode()))  # UTF-8 under any locale
    return names


def main() -> None:
    """Run the command line."""
    app()
