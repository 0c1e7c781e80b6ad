"""Drawing the pictures of an evaluation: on every rank its share, and going on where it stopped.

Pictures are drawn in batches whose borders depend on nothing but the list, and a batch is drawn
whole or not at all. So its arithmetic is the same however often the run was stopped and whatever
the number of ranks, and with it every pixel.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tiue.errors import InputError, OutputError
from tiue.evaluate.models import Draw
from tiue.files import write_json
from tiue.images import save_image

FACTS = "generation.json"
# A prime beyond every list: no two evaluation seeds share a picture's noise.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Job:
    """One picture to draw.

    Attributes:
        name: Of its file.
        prompt: What is asked for.
        seed: Of its noise.
    """

    name: str
    prompt: str
    seed: int


def picture_jobs(prompts: list[str], seed: int) -> list[Job]:
    """One picture of each prompt."""
    first = seed * SEED_STRIDE
    return [Job(f"{i:06d}.png", prompt, first + i) for i, prompt in enumerate(prompts)]


def diversity_jobs(prompts: list[str], images: int, seed: int) -> list[Job]:
    """Several pictures of each prompt, from other seeds than those of `picture_jobs`."""
    last = (seed + 1) * SEED_STRIDE - 1
    return [
        Job(f"{p:03d}-{i:03d}.png", prompt, last - p * images - i)
        for p, prompt in enumerate(prompts)
        for i in range(images)
    ]


def check_facts(folder: Path, facts: dict[str, Any]) -> None:
    """See that a folder's pictures, if it has any, are of this evaluation.

    Args:
        folder: Of `generation.json`.
        facts: What this evaluation's pictures depend on.

    Raises:
        InputError: They are of another; the message names what differs.
    """
    path = folder / FACTS
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(n for n in {*facts, *known} if facts.get(n) != known.get(n))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot read {path} ({error}): give another folder with --output"
        ) from error
    if differing:
        raise InputError(
            f"{folder} holds the pictures of another evaluation (it differs in"
            f" {', '.join(differing)}): give another folder with --output, or remove it"
        )


def generate(
    jobs: list[Job], folder: Path, draw: Draw, batch_size: int, label: str, progress: bool = True
) -> tuple[int, float]:
    """Draw what is not there yet.

    Args:
        jobs: All pictures.
        folder: Receives them, each file whole or absent.
        draw: The model.
        batch_size: Pictures at once.
        label: Of the progress bar.
        progress: Whether to draw one, on the first rank, where there is a terminal.

    Returns:
        How many pictures this rank drew, and the seconds that took.

    Raises:
        OutputError: The folder cannot be written.
    """
    from accelerate import PartialState

    state = PartialState()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    # A batch is whole or it is drawn again: part of it alone would be other arithmetic.
    left = [b for b in mine if not all((folder / job.name).exists() for job in b)]
    total = sum(map(len, mine))
    drawn = sum(map(len, left))
    started = time.perf_counter()
    hidden = True if state.process_index > 0 or not progress else None
    with tqdm(
        total=total, initial=total - drawn, desc=label, unit="picture", disable=hidden
    ) as bar:
        for batch in left:
            images = draw([job.prompt for job in batch], [job.seed for job in batch])
            for job, image in zip(batch, images, strict=True):
                save_image(image, folder / job.name)
            bar.update(len(batch))
    return drawn, time.perf_counter() - started


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Leave in a folder what its pictures depend on, for `check_facts`.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FACTS, facts)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
