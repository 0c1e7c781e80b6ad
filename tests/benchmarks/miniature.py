"""Planted results, rates and students, for the tests of the experiment."""

import json
import shutil

from benchmarks.miniature import training
from benchmarks.miniature.counts import TEACHER
from benchmarks.miniature.rows import PROTOCOL, ROWS

SHARED = {
    "format": 1,
    "protocol": {"name": PROTOCOL.name},
    "extractors": {},
    "counts": {},
    "prompts_sha256": "",
    "reference": {},
}


def split(**figures):
    """Figures of a split, as the scenes preset gives them."""
    return {"prompts": 5, "figures": {name: [value, None] for name, value in figures.items()}}


def plant(places, name, seed=0, splits=None, **figures):
    """A result of a row: figures over all prompts, and those of `splits`."""
    path = places / "results" / f"{name}-{seed}.json"
    path.parent.mkdir(exist_ok=True)
    model = {"teacher_sha256": training.teacher_sha256()}
    if ROWS[name].training is not None:
        model["training"] = {"steps": 240, "learning_rate": 1e-4}
    found = SHARED | {
        "model": model,
        "figures": {f"scene_{figure}": value for figure, value in figures.items()},
        "scenes": {"splits": {"model": {"all": split(**figures)} | (splits or {})}},
    }
    path.write_text(json.dumps(found))
    return path


def plant_rates(places, k1="1e-5", k4="1e-4"):
    """Rates that were chosen."""
    places.joinpath("results").mkdir(exist_ok=True)
    found = {"teacher_sha256": training.teacher_sha256(), "rates": {"k1": k1, "k4": k4},
             "energy": {"k1": {k1: 0.5}, "k4": {k4: 0.25}}}  # fmt: skip
    training.rates_path().write_text(json.dumps(found))


def plant_facts(row, seed, **changes):
    """The facts of a student that was trained as its row says, but for `changes`."""
    folder = training.student_folder(ROWS[row], seed)
    folder.mkdir(parents=True, exist_ok=True)
    facts = training.settings_of(ROWS[row], seed) | {"teacher_sha256": training.teacher_sha256()}
    (folder / training.FACTS).write_text(json.dumps(facts | changes))
    return folder


def plant_student(row, seed=0):
    """A student that has the teacher's own weights."""
    folder = plant_facts(row, seed)
    for part in ("unet", "scheduler"):
        shutil.copytree(TEACHER / part, folder / part)
    config = folder / "scheduler" / "scheduler_config.json"
    spacing = ROWS[row].training.get("timestep_spacing")
    if spacing:
        settings = json.loads(config.read_text()) | {"timestep_spacing": spacing}
        config.write_text(json.dumps(settings))
    return folder
