"""A pipeline as a program in a file: noise and prompt embeddings in, pictures out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import ExportedProgram

from tiue.compiled import Call, export
from tiue.compiled.openvino import convert, import_openvino
from tiue.errors import InputError, OutputError
from tiue.pipelines import inputs
from tiue.pipelines.pipeline_tiue import TiUEPipeline
from tiue.schedule import OnePassSchedule


def export_pipeline(
    pipe: TiUEPipeline,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_decoder_steps: int = 4,
    dynamic: bool = False,
) -> ExportedProgram:
    """Export one pass and VAE of a pipeline, without guidance.

    Args:
        pipe: On the CPU.
        batch: Pictures a call.
        height: Pixels; the model's own by default.
        width: Likewise.
        num_decoder_steps: K.
        dynamic: Whether the program takes other batches and sizes, of the sides that the UNet can
            halve as often as these.

    Returns:
        The program: noise [B, C, h, w] of standard deviation 1 and prompt embeddings [B, L, D]
        to pictures [B, 3, H, W] in 0..1, from torch's own operators.

    Raises:
        InputError: A size that the VAE's factor does not divide.
    """
    unet, vae = pipe.unet, pipe.vae
    channels = vae.config.latent_channels
    sizes = inputs.latent_shape(
        batch, unet.config.sample_size, channels, pipe.vae_scale_factor, height, width
    )
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, num_decoder_steps)
    tokens, width_of_text = pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size

    def pictures(noise: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        latents = unet.one_pass(noise * schedule.init_noise_sigma, schedule, prompt_embeds)
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    noise = torch.zeros(batch, channels, *sizes, dtype=unet.dtype)
    text = torch.zeros(batch, tokens, width_of_text, dtype=unet.dtype)
    return export(pictures, [unet, vae], Call.of((noise, text), {}), dynamic)


def inputs_of(program: ExportedProgram) -> dict[str, list[int]]:
    """Names and shapes of a program's inputs, in their order."""
    names = program.graph_signature.user_inputs
    values = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
    }
    return {str(name): list(values[name].shape) for name in names}


def save_torch(program: ExportedProgram, path: Path) -> None:
    """Write a program for torch; `torch.export.load(path).module()` runs it.

    Args:
        program: From `export_pipeline`.
        path: A `.pt2` file, written whole or not at all.

    Raises:
        InputError: Another suffix.
        OutputError: The file cannot be written.
    """
    _save(path, ".pt2", lambda partial: torch.export.save(program, partial))


def save_openvino(program: ExportedProgram, path: Path) -> None:
    """Write a program for OpenVINO, in float32; `openvino.Core().compile_model(path)` runs it.

    OpenVINO 2026.4.1 needs `{"SNIPPETS_MODE": "DISABLE"}` there for small models: it crashes.

    Args:
        program: From `export_pipeline`.
        path: An `.xml` file, beside which the `.bin` comes; both are written whole or not at all.

    Raises:
        DependencyError: OpenVINO is not installed.
        InputError: Another suffix.
        OutputError: The files cannot be written.
    """
    save_model = import_openvino().save_model
    model = convert(program)
    _save(path, ".xml", lambda partial: save_model(model, partial, compress_to_fp16=False))


def check_suffix(path: Path, suffix: str) -> None:
    """See that a file's name ends as its format wants.

    Raises:
        InputError: It does not.
    """
    if path.suffix != suffix:
        raise InputError(f"the name of this format ends in {suffix}, got {path.name}")


def _save(path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    check_suffix(path, suffix)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write(Path(folder) / path.name)
            for file in sorted(Path(folder).iterdir()):  # the .bin, then the .xml that names it
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
