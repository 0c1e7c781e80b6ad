"""`tiue generate --prompts`: a file of prompts to a folder, on any number of processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tiue.distill.processes import require_shared_work
from tiue.errors import InputError
from tiue.evaluate.generation import Job, check_facts, generate, write_facts
from tiue.evaluate.models import tensors_hash
from tiue.files import sha256, write_file
from tiue.terminal import check_seeds

MANIFEST = "manifest.jsonl"


def read_jobs(path: Path, seed: int, num_images: int) -> list[Job]:
    """The pictures of a file of prompts.

    Args:
        path: .jsonl with an object a line, `prompt` and, where it has one, `seed`; or .txt with a
            prompt a line. Empty lines count for nothing.
        seed: of the first prompt without one; the next has the next.
        num_images: pictures a prompt, of its seed and those after it.

    Returns:
        A job each, whose number is its place in the file.

    Raises:
        InputError: the file cannot be read, or a line is no prompt; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the prompts of {path}: {error}") from error
    jobs: list[Job] = []
    own = seed
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, first = _read_line(line, path, number)
        if first is None:
            first, own = own, own + num_images
        check_seeds(first, num_images)
        jobs += [
            Job(f"{len(jobs) + index:06d}.png", prompt, first + index)
            for index in range(num_images)
        ]
    if not jobs:
        raise InputError(f"{path} holds no prompt")
    return jobs


def _read_line(line: str, path: Path, number: int) -> tuple[str, int | None]:
    where = f"line {number} of {path}"
    if path.suffix != ".jsonl":
        return line.strip(), None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f'{where} is no object with a "prompt" that is a text')
    seed = row.get("seed")
    if not row["prompt"].strip():
        raise InputError(f"{where} has an empty prompt")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise InputError(f"{where} has a seed that is no whole number from 0 on: {seed!r}")
    return row["prompt"], seed


def own_device(device: torch.device) -> torch.device:
    """The device of this process among those that were started together.

    Raises:
        InputError: the processes know nothing of one another.
    """
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    require_shared_work(state.num_processes)
    found: torch.device = state.device
    return found if state.num_processes > 1 else device


def draw_many(
    pipe: Any,
    jobs: list[Job],
    folder: Path,
    batch_size: int,
    arguments: dict[str, Any],
    negative_prompt: str | None,
    lora_weights: list[float] | None = None,
) -> int | None:
    """Draw what a folder does not hold yet, this process its share, and write the manifest.

    Args:
        pipe: on its device.
        jobs: all of them.
        folder: receives the pictures and, when all are there, `manifest.jsonl`: prompt, seed, file
            and SHA-256 of each.
        batch_size: pictures at once.
        arguments: of the pipeline's calls.
        negative_prompt: of all.
        lora_weights: of the pipeline's LoRAs, in their order.

    Returns:
        How many this process drew; None on all but the first.

    Raises:
        InputError: the folder holds pictures of other prompts, settings or weights.
        OutputError: the folder cannot be written.
    """
    from accelerate import PartialState

    asked = json.dumps([[job.name, job.prompt, job.seed] for job in jobs])
    told = {name: value for name, value in arguments.items() if not name.endswith("image")}
    pictures = {
        name: hashlib.sha256(value.tobytes()).hexdigest()
        for name, value in arguments.items()
        if name.endswith("image") and value is not None
    }
    models = {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    facts = {
        "jobs_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "weights_sha256": tensors_hash(models),
        "lora_weights": lora_weights or [],
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_sha256": hashlib.sha256(scheduler.encode()).hexdigest(),
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "negative_prompt": negative_prompt,
        **told,
        **pictures,
    }
    check_facts(folder, facts)
    state = PartialState()
    if state.is_main_process:
        write_facts(folder, facts)

    def draw(prompts: list[str], seeds: list[int]) -> list[Any]:
        return draw_batch(pipe, prompts, seeds, arguments, negative_prompt)

    drawn, _ = generate(jobs, folder, draw, batch_size, "pictures")
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    rows = [
        {"prompt": j.prompt, "seed": j.seed, "file": j.name, "sha256": sha256(folder / j.name)}
        for j in jobs
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
    return drawn


def draw_batch(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    arguments: dict[str, Any],
    negative_prompt: str | None,
) -> list[Any]:
    """Pictures of prompts, each of its own seed.

    Args:
        pipe: on its device.
        prompts: one a picture.
        seeds: likewise.
        arguments: of the pipeline's call, the same for all.
        negative_prompt: likewise.
    """
    # Noise comes from the CPU whatever the device: a seed means the same everywhere.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = {
        # diffusers takes one picture for each generator.
        name: [value] * len(prompts) if name.endswith("image") else value
        for name, value in arguments.items()
    }
    if negative_prompt is not None:
        rows["negative_prompt"] = [negative_prompt] * len(prompts)
    images: list[Any] = pipe(prompts, generator=generators, **rows).images
    return images
