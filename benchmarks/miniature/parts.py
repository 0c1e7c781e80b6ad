"""What the page has beside results: parts that a command each makes, of one teacher."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.miniature import training
from benchmarks.miniature.rows import RESULTS, ROOT
from tiue.errors import InputError
from tiue.files import write_json

IMAGES = ROOT / "docs" / "images"
COSTS, SIMILARITY, STRIP, CONTACT = "costs", "similarity", "strip", "contact"


def save_part(name: str, found: dict[str, Any]) -> None:
    """Write a part, with the hash of its teacher."""
    write_json(RESULTS / f"{name}.json", {"teacher_sha256": training.teacher_sha256(), **found})


def load_part(name: str) -> dict[str, Any] | None:
    """Read a part; None where it has not been run.

    Raises:
        InputError: It is of another teacher.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["teacher_sha256"] != training.teacher_sha256():
        raise InputError(
            f"{path} is of another teacher: `python -m benchmarks.miniature {name}` makes it anew"
        )
    return found
