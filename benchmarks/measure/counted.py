"""Results that a count or a clock of the host gives, kept by commit; one file a measurement.

`benchmarks/results/counted/<measurement>.json` is of the commit that it names;
`<measurement>_before.json` is what it is held against.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "counted"
PACKAGES = ("tiue", "tiue_kernels", "csrc")


def write_result(path: str | Path, figures: dict[str, Any], of_commit: str | None = None) -> None:
    """Write a result whole, with the commit that it is of.

    Args:
        path: Of the file.
        figures: Anything that JSON takes, by name.
        of_commit: Where this is no checkout, what it is a copy of.
    """
    result = {"commit": of_commit or commit(), "torch": torch.__version__.partition("+")[0]}
    result |= figures
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_result(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """A result that `write_result` wrote, or None where there is none.

    Args:
        name: Of the file, without its ending.
        folder: Where it lies.
    """
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def commit() -> str:
    """The commit that last changed the packages here; with a note where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *PACKAGES]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    changed = git("status", "--porcelain")
    return git("log", "-1", "--format=%h") + (" with uncommitted changes" if changed else "")
