"""The commands `tiue evaluate` and `tiue compare`; torch is imported when they run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tiue.devices import Dtype, find_device, find_dtype
from tiue.errors import InputError
from tiue.terminal import say


class Preset(str, Enum):
    """Named protocols."""

    coco2014_30k = "coco2014-30k"
    coco2017_5k = "coco2017-5k"
    openmoji = "openmoji"
    scenes = "scenes"


class Features(str, Enum):
    """Feature extractors."""

    inception = "inception"
    dinov2 = "dinov2"
    clip = "clip"
    openmoji = "openmoji"


def evaluate_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="What draws: folder or Hugging Face id of a Stable Diffusion model; openmoji or"
            " scenes (the students in this package), openmoji-teacher or scenes-teacher."
        ),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Instead: a folder of pictures that were drawn before.")
    ] = None,
    preset: Annotated[Preset, typer.Option(help="The protocol.")] = Preset.openmoji,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of real pictures, such as val2014; openmoji and scenes have theirs."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="One prompt a line, or COCO's captions_val2014.json; with --pictures in the order"
            " of the files' names. Scenes have their own."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder of result.json and the pictures; a run that was stopped goes on there.",
        ),
    ] = Path("out/evaluate"),
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Some of fid,kid,precision,recall,density,coverage,clip_score,"
            "lpips_diversity; all by default."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    num_decoder_steps: Annotated[
        int, typer.Option("--num-decoder-steps", "-k", min=1, help="K of the one pass.")
    ] = 4,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Draw by this many steps of the whole UNet instead."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="By default 1 for the one pass, 7.5 for steps (embedded teachers, scenes: 2.5)."
        ),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option(help="Folder with unet/ and scheduler/ to draw with instead of the model's."),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Another number of prompts than the preset's.")
    ] = None,
    features: Annotated[
        Features | None, typer.Option(help="Another feature extractor than the preset's.")
    ] = None,
    features_weights: Annotated[
        str | None,
        typer.Option(help="Inception: its file. DINOv2 and CLIP: a folder or hub id."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP of the CLIP score: a folder or hub id.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="AlexNet's file, alexnet-owt-7be5be79.pth.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 32,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that are no pictures.")
    ] = False,
    mixed_sizes: Annotated[
        bool, typer.Option("--mixed-sizes", help="Take --pictures of several sizes.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float16 on a CUDA GPU and float32 elsewhere.")
    ] = Dtype.auto,
) -> None:
    """Measure a model: FID, KID, precision, recall, density, coverage, CLIP score, LPIPS.

    Many processes share the drawing: accelerate launch -m tiue.evaluate ...
    """
    from tiue.evaluate.evaluation import Settings, evaluate
    from tiue.evaluate.protocol import METRICS, check_metrics, find_preset
    from tiue.evaluate.result import table

    protocol = find_preset(preset.value).changed(
        num_prompts=num_prompts, features=features.value if features else None, clip=clip
    )
    place = find_device(device)
    found = evaluate(
        Settings(
            protocol=protocol,
            metrics=check_metrics(metrics.split(",") if metrics else list(METRICS)),
            output=output,
            model=model,
            pictures=pictures,
            reference=reference,
            prompts=prompts,
            seed=seed,
            num_decoder_steps=num_decoder_steps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            student=student,
            batch_size=batch_size,
            features_weights=features_weights,
            lpips_weights=lpips_weights,
            skip_unreadable=skip_unreadable,
            mixed_sizes=mixed_sizes,
            device=place,
            dtype=find_dtype(dtype, place),
        )
    )
    if found is not None:
        say(f"{table(found)}\n\n{output / 'result.json'}")


def compare_command(
    first: Annotated[Path, typer.Argument(metavar="A.JSON", help="Result of `tiue evaluate`.")],
    second: Annotated[Path, typer.Argument(metavar="B.JSON", help="Another.")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also where the protocols differ.")
    ] = False,
) -> None:
    """Compare two results; refused where they were not made under one protocol."""
    from tiue.evaluate.result import compare, load_result

    if first.resolve() == second.resolve():
        raise InputError(f"{first} and {second} are one file; give two results")
    say(compare(load_result(first), load_result(second), anyway))
