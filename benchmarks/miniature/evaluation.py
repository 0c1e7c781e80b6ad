"""Measuring rows with `tiue evaluate`, and the results that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.miniature.drawing import load_row
from benchmarks.miniature.rows import PROTOCOL, RESULTS, ROWS, SEEDS, WORK, Row
from benchmarks.miniature.training import teacher_sha256
from tiue.errors import InputError
from tiue.evaluate.evaluation import Settings, evaluate
from tiue.evaluate.protocol import METRICS
from tiue.evaluate.result import differences, load_result, save_result

BATCH = 50
Results = dict[str, list[dict[str, Any]]]


def result_path(row: Row, seed: int) -> Path:
    """The committed result of a row and seed."""
    return RESULTS / f"{row.name}-{seed}.json"


def ceilings_path() -> Path:
    """The committed figures of true pictures, and of those through the autoencoder."""
    return RESULTS / "ceilings.json"


def evaluate_row(row: Row, seed: int) -> None:
    """Draw and measure one row with one seed, or go on with it, unless its result is there.

    Args:
        row: Of `ROWS`, one that can be run.
        seed: Of its training and of the noise.

    Raises:
        InputError: The result that is there is of another teacher or protocol.
        TiUEError: As `load_row`, and as `tiue.evaluate.evaluation.Evaluation`.
    """
    path = result_path(row, seed)
    if path.exists():
        read_result(path)
        return
    output = WORK / "evaluations" / path.stem
    settings = Settings(PROTOCOL, list(METRICS), output, seed=seed, batch_size=BATCH)
    found = evaluate(settings, load_row(row, seed))
    assert found is not None  # one process
    # The ceilings are the same for every row: once, not seventy times.
    scenes = found["scenes"]
    ceilings = {
        part: {side: scenes[part].pop(side) for side in list(scenes[part]) if side != "model"}
        for part in ("splits", "sets")
    }
    shared = ("format", "protocol", "extractors", "counts", "prompts_sha256", "reference")
    facts = {name: found[name] for name in shared}
    known = {"teacher_sha256": teacher_sha256()}
    save_result(facts | {"figures": {}, "model": known, "scenes": ceilings}, ceilings_path())
    save_result(found, path)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result of the shipped teacher.

    Raises:
        InputError: It is none, or of another teacher or protocol.
    """
    found = load_result(path)
    if found["model"].get("teacher_sha256") != teacher_sha256():
        raise InputError(f"{path} is of another teacher: remove it and evaluate again")
    if found["protocol"]["name"] != PROTOCOL.name:
        raise InputError(f"{path} is of the protocol {found['protocol']['name']}: evaluate again")
    return found


def load_results() -> Results:
    """What has been run: results by row, in the order of `ROWS`, a seed each.

    Raises:
        InputError: One is of another teacher, protocol, judge or world than the others.
    """
    found: Results = {}
    first: tuple[Path, dict[str, Any]] | None = None
    for name, row in ROWS.items():
        for path in (result_path(row, seed) for seed in SEEDS):
            if not path.exists():
                continue
            result = read_result(path)
            first = first or (path, result)
            if differing := differences(first[1], result):
                raise InputError(
                    f"{first[0].name} and {path.name} are not comparable, they differ in"
                    f" {'; '.join(differing)}: remove one and evaluate again"
                )
            found.setdefault(name, []).append(result)
    return found
