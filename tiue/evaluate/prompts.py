"""Prompt lists: text, and the captions of COCO as they are published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from tiue.errors import InputError


def read_prompts(path: Path) -> list[str]:
    """Read prompts.

    Args:
        path: A text file with one prompt a line, or COCO's `captions_*.json`, of which each
            picture's first caption is taken, in the order of the pictures' numbers.

    Returns:
        The prompts.

    Raises:
        InputError: The file is missing, empty, no UTF-8, or JSON of another kind; an empty line
            between prompts, which would put pictures and prompts out of step.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {path}: {error}") from error
    prompts = _captions(text, path) if path.suffix == ".json" else text.rstrip().splitlines()
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} of {path} is empty")
    return [prompt.strip() for prompt in prompts]


def _captions(text: str, path: Path) -> list[str]:
    try:
        first: dict[int, tuple[int, str]] = {}
        for entry in json.loads(text)["annotations"]:
            known = first.get(entry["image_id"])
            if known is None or entry["id"] < known[0]:
                first[entry["image_id"]] = (entry["id"], entry["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not in the form of COCO's captions (annotations with image_id, id and"
            " caption); give that, or a text file with one prompt a line"
        ) from error
    return [" ".join(first[image][1].split()) for image in sorted(first)]


def draw_prompts(prompts: list[str], count: int | None, seed: int) -> list[str]:
    """Draw prompts without replacement.

    Args:
        prompts: The list.
        count: How many; None takes all, in order.
        seed: Of the draw.

    Returns:
        The prompts.

    Raises:
        InputError: There are fewer.
    """
    if count is None:
        return prompts
    if count > len(prompts):
        raise InputError(
            f"the protocol draws {count} prompts and the list holds {len(prompts)}: give a longer"
            " list, or --num-prompts"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[index] for index in order[:count].tolist()]


def prompts_hash(prompts: list[str]) -> str:
    """The SHA-256 of a prompt list: what two results compare their prompts by."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
