"""Distilling the students of rows, and the rate that their pilots choose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.miniature.counts import TEACHER, equal_updates, update_count_of
from benchmarks.miniature.rows import (
    FAMILIES,
    PROMPTS,
    RATES,
    RESULTS,
    ROWS,
    SETTINGS,
    WORK,
    Row,
    pilot_name,
)
from tiue.distill import DistillConfig, distill
from tiue.errors import CheckpointError, InputError
from tiue.evaluate.result import load_result
from tiue.files import sha256, write_json

FACTS = "training.json"


def teacher_sha256() -> str:
    """Of the shipped teacher's UNet: students and results of another are not comparable."""
    return sha256(TEACHER / "unet" / "diffusion_pytorch_model.safetensors")


def rates_path() -> Path:
    """Where `choose_rates` leaves what `settings_of` reads."""
    return RESULTS / "rates.json"


def settings_of(row: Row, seed: int) -> dict[str, Any]:
    """A row's settings as fields of `DistillConfig`, its rate and number of updates resolved.

    Args:
        row: One with `training`.
        seed: Of its training.

    Returns:
        The settings; teacher, prompts and folders are left out.

    Raises:
        InputError: It needs no training, or its rate has not been chosen yet.
    """
    if row.training is None:
        raise InputError(f"{row.name} needs no training")
    settings = SETTINGS | row.training | {"steps": updates_of(row), "seed": seed}
    if row.rate:
        settings["learning_rate"] = _rate(row.rate)
    return settings


def update_cost(row: Row) -> int:
    """Multiply-adds of an update of a row's training."""
    return update_count_of(SETTINGS | (row.training or {}))


def updates_of(row: Row) -> int:
    """Updates of a row's training: its own number, or what equal compute makes."""
    if row.compute_of is None:
        updates: int = (SETTINGS | (row.training or {}))["steps"]
        return updates
    other = ROWS[row.compute_of]
    return equal_updates(updates_of(other), update_cost(other), update_cost(row))


def _rate(family: str) -> float:
    path = rates_path()
    if path.exists():
        chosen: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if chosen["teacher_sha256"] == teacher_sha256():
            return float(chosen["rates"][family])
    raise InputError(
        f"no rate of this teacher's {family} students has been chosen: run and evaluate its pilots"
        f" ({', '.join(pilot_name(family, rate) for rate in RATES)}), then"
        " `python -m benchmarks.miniature rates`"
    )


def choose_rates(seed: int = 0) -> dict[str, Any]:
    """Choose each family's rate: that of the pilot whose energy distance is least.

    Args:
        seed: That the pilots were run with.

    Returns:
        `rates` by family, and `energy` of every pilot, None for one that has no result; also
        written to `rates_path()`.

    Raises:
        InputError: A family has results of fewer than two pilots.
    """
    energy: dict[str, dict[str, float | None]] = {}
    rates = {}
    for family in FAMILIES:
        energy[family] = {rate: _energy(pilot_name(family, rate), seed) for rate in RATES}
        known = {rate: value for rate, value in energy[family].items() if value is not None}
        if len(known) < 2:
            raise InputError(
                f"{len(known)} of {family}'s pilots have a result; a choice needs two: `python -m"
                f" benchmarks.miniature train {' '.join(pilot_name(family, r) for r in RATES)}"
                f" --seeds {seed}`, then `evaluate` likewise"
            )
        rates[family] = min(known, key=lambda rate: known[rate])
    found = {"teacher_sha256": teacher_sha256(), "rates": rates, "energy": energy}
    write_json(rates_path(), found)
    return found


def _energy(name: str, seed: int) -> float | None:
    path = RESULTS / f"{name}-{seed}.json"
    if not path.exists():
        return None
    found = load_result(path)
    if found["model"]["teacher_sha256"] != teacher_sha256():
        raise InputError(f"{path} is of another teacher: remove it and evaluate again")
    value: float = found["figures"]["scene_energy"]
    return value


def student_folder(row: Row, seed: int) -> Path:
    """Where a row's student of a seed lies; a row that draws with another's has none of its own."""
    return WORK / "students" / f"{row.of or row.name}-{seed}"


def is_trained(row: Row, seed: int) -> bool:
    """Whether a row's weights are there."""
    return (row.training is None and row.of is None) or (
        (student_folder(row, seed) / FACTS).exists()
    )


def training_facts(row: Row, seed: int) -> dict[str, Any]:
    """What a row's student was trained with.

    Args:
        row: One that draws with a student.
        seed: Of its training.

    Returns:
        Its settings, and the hash of its teacher.

    Raises:
        CheckpointError: It has not been distilled yet; the message says how.
        InputError: It was distilled with other settings, or from another teacher.
    """
    folder, own = student_folder(row, seed), ROWS[row.of] if row.of else row
    if not is_trained(row, seed):
        raise CheckpointError(
            f"no student in {folder}: run `python -m benchmarks.miniature train {own.name} --seeds"
            f" {seed}`"
        )
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    wanted = settings_of(own, seed) | {"teacher_sha256": teacher_sha256()}
    differing = [name for name in sorted({*facts, *wanted}) if facts.get(name) != wanted.get(name)]
    if differing:
        told = "; ".join(f"{n}: {facts.get(n)!r}, not {wanted.get(n)!r}" for n in differing)
        raise InputError(f"the student in {folder} is of other settings ({told}): remove it")
    return facts


def distil(row: Row, seed: int) -> bool:
    """Distil a row's student from the shipped teacher, or go on with it.

    Args:
        row: One with `training`.
        seed: Of the training.

    Returns:
        Whether it is there; not if a signal stopped the run, which goes on at the next call.

    Raises:
        InputError: The row needs no training, or its folder holds other settings.
        TiUEError: As `tiue.distill.distill`.
    """
    from tiue.scenes.data import write_prompts

    settings = settings_of(row, seed)
    if is_trained(row, seed):
        training_facts(row, seed)
        return True
    folder = student_folder(row, seed)
    prompts = folder.parent / "prompts.txt"
    write_prompts(prompts, PROMPTS)
    distill(
        DistillConfig(
            teacher=str(TEACHER), prompts=str(prompts), output=folder, cpu=True, resume=True,
            checkpoint_every=50, keep_checkpoints=1, save_pipeline=False, trackers=(), **settings,
        )
    )  # fmt: skip
    if not (folder / "unet").is_dir():
        return False
    write_json(folder / FACTS, settings | {"teacher_sha256": teacher_sha256()})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True
