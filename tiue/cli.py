"""The command line: `tiue generate | serve | distill | evaluate | ...`."""

from __future__ import annotations

import importlib.metadata
import platform
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiue.devices import find_device
from tiue.distill.command import SectionedHelp, distill_command, embed_text_command
from tiue.errors import InputError
from tiue.evaluate.command import compare_command, evaluate_command
from tiue.generate.command import check_writable, generate_command
from tiue.serve.command import serve_command
from tiue.terminal import command_group, say

# torch, diffusers and transformers take seconds to import: the commands import them, so that
# --help and usage errors come at once.
if TYPE_CHECKING:
    import torch

    from tiue.pipelines import TiUEPipeline

_VERSIONS = ("tiue", "torch", "diffusers", "transformers", "safetensors", "peft", "triton")


app = command_group(
    "Text to image in one pass: the UNet's encoder runs once, its decoder for all timesteps"
    " at once."
)


app.command("generate", cls=SectionedHelp)(generate_command)
app.command("serve")(serve_command)
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
    check_writable(output.parent)
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


def _load(model: str | None, dtype: torch.dtype) -> TiUEPipeline:
    import tiue
    from tiue.generate.loading import be_quiet

    be_quiet()
    if model is None:
        return tiue.load_openmoji(torch_dtype=dtype)
    return tiue.TiUEPipeline.from_pretrained(model, dtype=dtype)


def main() -> None:
    """Run the command line."""
    app()
