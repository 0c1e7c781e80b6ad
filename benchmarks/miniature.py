"""The paper in miniature, on the embedded model: `python -m benchmarks.miniature COMMAND`.

`train ROW` distils a student (for rows that need one), `evaluate ROW` draws and measures it for
every seed, `costs` counts multiply-adds and takes times, `similarity` compares the UNet's features
across timesteps, `report` writes docs/miniature.md of whatever has been run. Each goes on where it
stopped; `all` does everything that needs no training.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from tiue.distill.settings import find_recipe, read_settings
from tiue.embedded.config import GUIDANCE_SCALE
from tiue.errors import CheckpointError, InputError
from tiue.evaluate.evaluation import Evaluation, Settings, evaluate
from tiue.evaluate.models import OPENMOJI, OPENMOJI_TEACHER, Model, load_model, weights_hash
from tiue.evaluate.protocol import METRICS, PRESETS
from tiue.evaluate.result import load_result, save_result
from tiue.files import write_json
from tiue.terminal import command_group

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "miniature"
WORK = ROOT / "runs" / "miniature"
SEEDS = (0, 1, 2)
BATCH = 50
PROTOCOL = PRESETS["openmoji"]
CPU = torch.device("cpu")
# Rows whose first pictures the page shows.
SHEETS = ("autoencoder", "teacher-25", "student-k4", "student-k1", "teacher-one-pass", "k1", "k4")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: One word, of its files and commands.
        label: For the reader.
        steps: Of the loop over the whole UNet; None for the one pass.
        num_decoder_steps: K of the one pass.
        training: What differs from `RECIPE`, for a student that is distilled here; None for
            weights that are there.
        folder: Of a student that was distilled before; None for the shipped one.
        how: The command that made it.
    """

    name: str
    label: str
    steps: int | None = None
    num_decoder_steps: int | None = None
    training: dict[str, Any] | None = field(default=None)
    folder: Path | None = None
    how: str = ""


# The shipped student's recipe at a length that a CPU trains in minutes.
RECIPE: dict[str, Any] = {
    name: value
    for name, value in read_settings(find_recipe("openmoji")).items()
    if name not in ("teacher", "cpu", "num_decoder_steps")
} | {"steps": 100, "seed": 0}


def _student(k: int, name: str, label: str, **changes: Any) -> Row:
    return Row(name, label, num_decoder_steps=k, training={"num_decoder_steps": k, **changes})


ROWS = {
    row.name: row
    for row in (
        Row("autoencoder", "the pictures themselves through the autoencoder"),
        *(Row(f"teacher-{n}", f"teacher, {n} steps", steps=n) for n in (4, 10, 25, 50)),
        Row("teacher-lcm-4", "teacher under LCM's sampler, 4 steps, not distilled", steps=4),
        *(
            Row(name, f"teacher in one pass, K = {k}, not distilled", num_decoder_steps=k)
            for name, k in (("teacher-one-pass", 4), ("teacher-one-pass-1", 1))
        ),
        Row("student-k4", "shipped student, K = 4", num_decoder_steps=4),
        Row(
            "student-k1",
            "model card's student, K = 1, as SwiftBrush",
            num_decoder_steps=1,
            folder=ROOT / "runs" / "openmoji" / "student-k1",
            how="python -m tiue.openmoji.train student -k 1",
        ),
        *(
            Row(f"student-drawn-{k}", f"shipped student, drawn with K = {k}", num_decoder_steps=k)
            for k in (1, 2, 8)
        ),
        *(
            _student(k, f"k{k}", f"distilled here, K = {k}" + (", as SwiftBrush" if k == 1 else ""))
            for k in (1, 2, 4, 8)
        ),
        *(
            _student(4, f"k4-kl-{w:g}", f"distilled here, K = 4, KL {w:g}", kl_weight=w)
            for w in (0.01, 0.1, 1.0)
        ),
        _student(4, "k4-guided", "distilled here, K = 4, teacher guided by 2", guidance_scale=2.0),
        _student(
            4,
            "k4-both-guided",
            "distilled here, K = 4, teacher and LoRA guided by 2",
            guidance_scale=2.0,
            lora_guidance_scale=2.0,
        ),
        _student(4, "k4-fast", "distilled here, K = 4, learning rate 3e-4", learning_rate=3e-4),
        _student(
            4,
            "k4-fast-guided",
            "distilled here, K = 4, learning rate 3e-4, teacher guided by 2",
            learning_rate=3e-4,
            guidance_scale=2.0,
        ),
    )
}  # fmt: skip


def student_folder(row: Row) -> Path:
    """Where a student that is distilled here lies."""
    return row.folder or WORK / "students" / row.name


def is_ready(row: Row) -> bool:
    """Whether a row's weights are there."""
    if row.training is None and row.folder is None:
        return True
    return (student_folder(row) / "unet").is_dir()


def distil(row: Row) -> Path:
    """Distil a row's student from the shipped teacher, or go on with it.

    Args:
        row: One with `training`.

    Returns:
        Its folder.

    Raises:
        InputError: The row's weights ship with the package.
    """
    from tiue.distill import DistillConfig, distill
    from tiue.evaluate.openmoji_preset import reference_pictures
    from tiue.openmoji import WEIGHTS
    from tiue.openmoji.data import write_prompts

    if row.training is None:
        raise InputError(f"{row.name} needs no training")
    folder = student_folder(row)
    if (folder / "unet").is_dir():
        return folder
    prompts = WORK / "prompts.txt"
    write_prompts(reference_pictures(WORK / "openmoji-pictures.safetensors"), prompts)
    settings = RECIPE | row.training
    distill(
        DistillConfig(
            teacher=str(WEIGHTS / "teacher"), prompts=prompts, output=folder, cpu=True, resume=True,
            checkpoint_every=50, keep_checkpoints=1, save_pipeline=False, **settings,
        )
    )  # fmt: skip
    write_json(folder / "settings.json", settings)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def load_row(row: Row) -> Model:
    """Load a row as what `tiue evaluate` draws with.

    Args:
        row: Of `ROWS`.

    Returns:
        The model.

    Raises:
        CheckpointError: Its student has not been distilled; the message says how.
    """
    if row.name == "autoencoder":
        return _reconstruction()
    if row.name == "teacher-lcm-4":
        return _lcm(row.steps or 4)
    if row.name.startswith("teacher-one-pass"):
        return _teacher_one_pass(row.num_decoder_steps or 4)
    if row.steps is not None:
        return load_model(OPENMOJI_TEACHER, CPU, torch.float32, num_inference_steps=row.steps)
    if not is_ready(row):
        how = row.how or f"python -m benchmarks.miniature train {row.name}"
        raise CheckpointError(f"no student in {student_folder(row)}: run `{how}`")
    folder = None
    if row.training is not None or row.folder is not None:
        folder = student_folder(row)
    model = load_model(OPENMOJI, CPU, torch.float32, row.num_decoder_steps or 4, student=folder)
    if folder is not None and row.training is not None:
        model.facts["training"] = json.loads((folder / "settings.json").read_text())
    return model


def _reconstruction() -> Model:
    from tiue.evaluate.openmoji_preset import reference_pictures
    from tiue.evaluate.openmoji_training import reconstructions

    pictures = reference_pictures(WORK / "openmoji-pictures.safetensors")
    shown = reconstructions(pictures).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    index = {prompt: number for number, prompt in enumerate(pictures.prompts)}

    def draw(prompts: list[str], _seeds: list[int]) -> list[Image.Image]:
        return [Image.fromarray(np.ascontiguousarray(shown[index[prompt]])) for prompt in prompts]

    return Model(draw, {"model": "autoencoder"})


def _lcm(steps: int) -> Model:
    """LCM's sampler (Luo et al., 2023, arXiv 2310.04378) over a teacher that was not distilled."""
    from diffusers import LCMScheduler

    from tiue.openmoji import load_openmoji_teacher

    pipe = load_openmoji_teacher()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, **settings).images

    facts = {"model": "openmoji-teacher", "scheduler": "LCMScheduler", **settings}
    return Model(draw, facts | {"weights_sha256": weights_hash(pipe)})


def _teacher_one_pass(k: int) -> Model:
    from tiue import TiUEPipeline
    from tiue.openmoji import load_openmoji_teacher

    pipe = TiUEPipeline.from_pipe(load_openmoji_teacher())
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, num_decoder_steps=k).images

    facts = {"model": "openmoji-teacher", "num_decoder_steps": k, "guidance_scale": 1.0}
    return Model(draw, facts | {"weights_sha256": weights_hash(pipe)})


def saturation(folder: Path) -> float:
    """Mean over a folder's pictures of max(R, G, B) - min(R, G, B), 0 to 1: their chroma."""
    values = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        values.append((pixels.max(2) - pixels.min(2)).mean())
    return float(np.mean(values))


def result_path(row: Row, seed: int) -> Path:
    """The committed result of a row and seed."""
    return RESULTS / f"{row.name}-{seed}.json"


def settings_of(row: Row, seed: int) -> Settings:
    """What `tiue evaluate` is told for a row and seed."""
    # The autoencoder gives one picture of a name: nothing to compare in pairs.
    metrics = [m for m in METRICS if m != "lpips_diversity" or row.name != "autoencoder"]
    output = WORK / "evaluations" / f"{row.name}-{seed}"
    return Settings(PROTOCOL, metrics, output, seed=seed, batch_size=BATCH)


def evaluate_row(row: Row, seed: int) -> None:
    """Draw and measure one row with one seed, unless its result is there.

    Args:
        row: Of `ROWS`.
        seed: Of the noise.
    """
    path = result_path(row, seed)
    if path.exists():
        return
    settings = settings_of(row, seed)
    found = evaluate(settings, load_row(row))
    if found is None:
        return
    found["figures"]["chroma"] = saturation(settings.output / "pictures")
    save_result(found, path)
    if seed == SEEDS[0] and row.name in SHEETS:
        sheet = ROOT / "docs" / "images" / f"miniature-{row.name}.png"
        shutil.copy(settings.output / "sheet.png", sheet)


def load_results() -> dict[str, list[dict[str, Any]]]:
    """What has been run: results by row, in the order of `ROWS`."""
    found = {
        name: [load_result(result_path(row, s)) for s in SEEDS if result_path(row, s).exists()]
        for name, row in ROWS.items()
    }
    return {name: results for name, results in found.items() if results}


app = command_group(__doc__)
Names = Annotated[list[str] | None, typer.Argument(help="Rows; by default all that can be.")]


def _rows(names: list[str] | None, default: list[Row]) -> list[Row]:
    unknown = [name for name in names or [] if name not in ROWS]
    if unknown:
        raise InputError(f"no row {', '.join(unknown)}: take some of {', '.join(ROWS)}")
    return [ROWS[name] for name in names] if names else default


@app.command()
def train(rows: Names = None) -> None:
    """Distil the students of rows that need one."""
    for row in _rows(rows, [row for row in ROWS.values() if row.training is not None]):
        typer.echo(f"{row.name}: {distil(row)}")


@app.command("evaluate")
def evaluate_command(
    rows: Names = None,
    seeds: Annotated[str, typer.Option(help="Of the noise, with commas.")] = "0,1,2",
) -> None:
    """Draw and measure rows, by default those whose weights are there."""
    ready = [row for row in ROWS.values() if is_ready(row)]
    for seed in map(int, seeds.split(",")):
        for row in _rows(rows, ready):
            evaluate_row(row, seed)
            typer.echo(f"{row.name} {seed}")


@app.command()
def draw(
    rows: Names = None,
    seeds: Annotated[str, typer.Option(help="Of the noise, with commas.")] = "0,1,2",
) -> None:
    """Draw rows without measuring them; `evaluate` then goes on from there."""
    for seed in map(int, seeds.split(",")):
        for row in _rows(rows, []):
            drawn = Evaluation(settings_of(row, seed), load_row(row)).generate()
            typer.echo(f"{row.name} {seed}: {drawn}")


@app.command()
def costs() -> None:
    """Count multiply-adds and take times."""
    from benchmarks.miniature_costs import measure

    save_result(measure(ROWS), RESULTS / "costs.json")


@app.command()
def similarity() -> None:
    """Compare the teacher's features across timesteps."""
    from benchmarks.miniature_similarity import measure

    save_result(measure(), RESULTS / "similarity.json")


@app.command()
def report() -> None:
    """Write docs/miniature.md and its plots."""
    from benchmarks.miniature_report import write

    write()


@app.command("all")
def everything() -> None:
    """Evaluate all rows whose weights are there, costs, similarity, report."""
    evaluate_command()
    costs()
    similarity()
    report()


if __name__ == "__main__":
    app()
