"""How often the embedded model draws what was asked: contact sheets, retrieval, the model card."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tiue.embedded.commands import Work
from tiue.embedded.config import GUIDANCE_SCALE, TEACHER_STEPS
from tiue.errors import CheckpointError, InputError
from tiue.files import write_file, write_json
from tiue.openmoji import WEIGHTS, load_openmoji, load_openmoji_teacher
from tiue.openmoji.config import TEN_PROMPTS
from tiue.openmoji.data import Pictures, load_pictures
from tiue.openmoji.train import DEFAULT_WORK, pictures_file
from tiue.terminal import command_group

FEATURES = "RGB, averaged to 32 x 32, Euclidean distance"
CARD = Path(__file__).parent / "MODEL_CARD.md"
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BATCH = 50

app = command_group("Look at and measure the OpenMoji model.")

# Prompts and one seed for each, to pictures [B, 3, 64, 64] in uint8.
Draw = Callable[[list[str], list[int]], torch.Tensor]


class Model(str, Enum):
    """What can be looked at: the two shipped models, and a student distilled for K = 1."""

    teacher = "teacher"
    student = "student"
    one_step = "one-step"


SETTINGS: dict[Model, dict[str, Any]] = {
    Model.teacher: {"num_inference_steps": TEACHER_STEPS, "guidance_scale": GUIDANCE_SCALE},
    Model.student: {"num_decoder_steps": 4},
    Model.one_step: {"num_decoder_steps": 1},
}


def load_model(model: Model, work: Path, weights: Path = WEIGHTS) -> Draw:
    """Loads a model as a function that draws prompts.

    Args:
        model: which; `one-step` is read from `work`, since the package does not ship it.
        work: the work folder of the training commands.
        weights: the folder that holds `teacher/` and `student/`.

    Returns:
        A function of prompts and seeds that gives uint8 pictures [B, 3, 64, 64].

    Raises:
        CheckpointError: if the model was not trained yet.
    """
    if model is Model.teacher:
        pipeline: Any = load_openmoji_teacher(weights=weights)
    elif model is Model.student:
        pipeline = load_openmoji(weights=weights)
    else:
        pipeline = load_openmoji(weights=weights, student=_one_step_folder(work))
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        images = pipeline(
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **SETTINGS[model],
        ).images
        return torch.from_numpy(images).mul(255).round().byte().permute(0, 3, 1, 2)

    return draw


def _one_step_folder(work: Path) -> Path:
    folder = work / "student-k1"
    if not (folder / "unet").is_dir():
        raise CheckpointError(
            f"no one-step student in {folder}: run `python -m tiue.openmoji.train student -k 1`"
        )
    return folder


def features(images: torch.Tensor) -> torch.Tensor:
    """Turns uint8 pictures [N, 3, 64, 64] into points of the space that distances are taken in."""
    return nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)


def ranks(images: torch.Tensor, targets: torch.Tensor, pictures: Pictures) -> torch.Tensor:
    """Counts, for every image, the training pictures nearer to it than the prompted one.

    Args:
        images: [B, 3, 64, 64] uint8.
        targets: [B] index of the prompted picture.
        pictures: the training pictures.

    Returns:
        [B] int64; 0 where the prompted picture, or one equal to it, is nearest.
    """
    distances = torch.cdist(
        features(images), features(pictures.images), compute_mode="donot_use_mm_for_euclid_dist"
    )
    own = distances.gather(1, targets[:, None])
    return (distances < own - 1e-6).sum(1)


def retrieval_figures(
    draw: Draw, reconstruct: Draw, pictures: Pictures, count: int, seed: int
) -> dict[str, Any]:
    """Draws `count` prompts and the ten of the contact sheet, and looks for them again.

    Args:
        draw: the model.
        reconstruct: the autoencoder in its place, as the ceiling.
        pictures: the training pictures, all of which are candidates.
        count: prompts, drawn without replacement.
        seed: chooses the prompts; picture number i is drawn with seed i.

    Returns:
        Rates of the prompted picture being nearest (top1) and among the nearest five (top5).

    Raises:
        InputError: if `count` is not from 1 to the number of pictures.
    """
    if not 1 <= count <= len(pictures):
        raise InputError(f"count must be from 1 to {len(pictures)}, got {count}")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    ten = torch.tensor([pictures.prompts.index(prompt) for prompt in TEN_PROMPTS])

    def found(source: Draw, targets: torch.Tensor) -> torch.Tensor:
        results = []
        for first in range(0, len(targets), BATCH):
            part = targets[first : first + BATCH]
            prompts = [pictures.prompts[index] for index in part.tolist()]
            seeds = list(range(first, first + len(part)))
            results.append(ranks(source(prompts, seeds), part, pictures))
        return torch.cat(results)

    def rates(result: torch.Tensor) -> dict[str, float]:
        return {
            "top1": (result == 0).double().mean().item(),
            "top5": (result < 5).double().mean().item(),
        }

    chosen = order[:count]
    begin = time.monotonic()
    result = found(draw, chosen)
    seconds = time.monotonic() - begin
    return {
        "prompts": count,
        "candidates": len(pictures),
        "seed": seed,
        "features": FEATURES,
        **rates(result),
        "autoencoder": rates(found(reconstruct, chosen)),
        "ten": dict(zip(TEN_PROMPTS, found(draw, ten).tolist(), strict=True)),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def load_reconstruction(pictures: Pictures, weights: Path = WEIGHTS) -> Draw:
    """Loads the autoencoder as a function that passes the prompted pictures through it."""
    from diffusers import AutoencoderTiny

    from tiue.embedded.autoencoder import to_model_range

    vae = AutoencoderTiny.from_pretrained(weights / "teacher", subfolder="vae").float().eval()

    @torch.no_grad()
    def reconstruct(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        index = [pictures.prompts.index(prompt) for prompt in prompts]
        output = vae(to_model_range(pictures.images[index])).sample
        return output.clamp(-1, 1).add(1).mul(127.5).round().byte()

    return reconstruct


@app.command()
def sheet(
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="By default docs/images/openmoji-MODEL.png.")
    ] = None,
    work: Work = DEFAULT_WORK,
) -> None:
    """Save a contact sheet of the ten prompts, seeds 0 to 9, each pixel drawn as 2 x 2."""
    from PIL import Image

    from tiue.images import contact_sheet, save_image

    images = load_model(model, work)(list(TEN_PROMPTS), list(range(len(TEN_PROMPTS))))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    output = output or Path(f"docs/images/openmoji-{model.value}.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_image(contact_sheet(pictures, TEN_PROMPTS, columns=5), output)


@app.command()
def retrieval(
    model: Model,
    count: Annotated[int, typer.Option(min=1, help="Prompts to draw.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the prompts.")] = 0,
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    work: Work = DEFAULT_WORK,
) -> None:
    """Measure how often the training picture nearest to a drawing is the prompted one."""
    pictures = load_pictures(pictures_file(work))
    reconstruct = load_reconstruction(pictures)
    figures = {
        "model": model.value,
        **SETTINGS[model],
        **retrieval_figures(load_model(model, work), reconstruct, pictures, count, seed),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{model.value}.json", figures)
    typer.echo(json.dumps(figures, indent=2))


@app.command()
def card(
    path: Annotated[Path, typer.Option(help="The model card.")] = CARD,
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Write the figures of the results folder into the model card."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{figures_table(results)}\n{END}{after}"
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def figures_table(results: Path) -> str:
    """Makes the card's table of the results in a folder; what is not there is "not measured"."""
    lines = [
        "| model | prompted picture nearest | among the nearest 5 | of the ten prompts, nearest |",
        "| --- | --- | --- | --- |",
    ]
    ceiling = None
    for model, label in (
        (Model.teacher, f"teacher, {TEACHER_STEPS} steps, guidance {GUIDANCE_SCALE:g}"),
        (Model.student, "student, one pass, K = 4"),
        (Model.one_step, "student, one pass, K = 1 (not in the package)"),
    ):
        source = results / f"{model.value}.json"
        if not source.exists():
            lines.append(f"| {label} | not measured | not measured | not measured |")
            continue
        figures = json.loads(source.read_text(encoding="utf-8"))
        ten = sum(rank == 0 for rank in figures["ten"].values())
        lines.append(f"| {label} | {figures['top1']:.1%} | {figures['top5']:.1%} | {ten} |")
        ceiling = figures
    if ceiling is not None:
        rates = ceiling["autoencoder"]
        label = "the pictures themselves through the autoencoder (ceiling)"
        lines.append(f"| {label} | {rates['top1']:.1%} | {rates['top5']:.1%} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
