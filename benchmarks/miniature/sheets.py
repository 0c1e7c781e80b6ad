"""The page's pictures: what each timestep adds, and one prompt drawn eight times."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.miniature import drawing
from benchmarks.miniature.parts import IMAGES
from benchmarks.miniature.rows import ROWS, SEEDS
from benchmarks.miniature.training import student_folder, training_facts
from tiue import OnePassSchedule
from tiue.embedded.config import GUIDANCE_SCALE
from tiue.images import save_image
from tiue.scenes import load_scenes

STRIP_IMAGE, CONTACT_IMAGE = "miniature-strip.png", "scenes-contact.png"
# A level each: exact, partial, category.
CONTACT_PROMPTS = (
    "a large apple left of a small rocket on a blue ground",
    "an octopus and a clock",
    "two fruits",
)
STRIP_PROMPT = CONTACT_PROMPTS[0]
CONTACT_ROWS = {"teacher-25": "teacher, 25 steps", "k1": "student, K = 1", "k4": "student, K = 4"}
PICTURES = 8

_MARGIN, _LINE, _SCALE = 10, 22, 2

# A heading over a block of rows, each with its name and pictures.
Block = tuple[str, list[tuple[str, list[Image.Image]]]]


def lay_out(blocks: list[Block], columns: list[str]) -> Image.Image:
    """Lay blocks of rows of pictures out, each row named at its left.

    Args:
        blocks: Headings, and their rows.
        columns: Names of the columns, over every block; none where it is empty.

    Returns:
        The sheet, RGB; pictures enlarged twice.
    """
    font = ImageFont.load_default(size=15)
    side = blocks[0][1][0][1][0].width * _SCALE
    count = max(len(pictures) for _, rows in blocks for _, pictures in rows)
    names = max(font.getlength(name) for _, rows in blocks for name, _ in rows)
    left = 2 * _MARGIN + round(names)
    head = _LINE * (2 if columns else 1)
    height = sum(head + len(rows) * (side + 4) + _MARGIN for _, rows in blocks)
    sheet = Image.new("RGB", (left + count * (side + 4) + _MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = 0
    for heading, rows in blocks:
        draw.text((_MARGIN, y + 3), heading, fill="black", font=font)
        for number, column in enumerate(columns):
            x = left + number * (side + 4) + side / 2
            draw.text((x, y + head - _LINE + 3), column, fill="black", font=font, anchor="ma")
        y += head
        for name, pictures in rows:
            draw.text((_MARGIN, y + side / 2), name, fill="black", font=font, anchor="lm")
            for number, picture in enumerate(pictures):
                enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + number * (side + 4), y))
            y += side + 4
        y += _MARGIN
    return sheet


def partial_sums(latents: Tensor, predicted: Tensor, schedule: OnePassSchedule) -> list[Tensor]:
    """S z, then the sum after each k, the last of which is the pass's own latents.

    Args:
        latents: z, [B, C, H, W].
        predicted: eps_k, [K, B, C, H, W].
        schedule: S and E.

    Returns:
        1 + K latents [B, C, H, W].
    """
    sums = [schedule.latent_coefficient * latents]
    for coefficient, own in zip(schedule.noise_coefficients.tolist(), predicted, strict=True):
        sums.append(sums[-1] + coefficient * own)
    return sums


def draw_strip() -> dict[str, Any]:
    """Draw what each timestep adds, by the K = 4 student and by the undistilled teacher.

    Returns:
        Timesteps, E, and how large each term E_k eps_k is: its root mean square, by side.

    Raises:
        CheckpointError: The student has not been distilled.
    """
    row, seed = ROWS["k4"], SEEDS[0]
    training_facts(row, seed)
    sides = {
        "student, K = 4": (load_scenes(student=student_folder(row, seed)), 1.0),
        "teacher, not distilled": (drawing.undistilled_pipeline(4), GUIDANCE_SCALE),
    }
    rows, sizes = [], {}
    for name, (pipe, scale) in sides.items():
        schedule = OnePassSchedule.from_scheduler(pipe.scheduler, 4)
        begun = drawing.begin(pipe, [STRIP_PROMPT], [0])
        predicted = drawing.predictions(pipe, begun, schedule, scale)
        sums = partial_sums(begun.noise, predicted, schedule)
        rows.append((name, drawing.to_pictures(pipe, torch.cat(sums))))
        terms = schedule.noise_coefficients.view(-1, 1, 1, 1, 1) * predicted
        sizes[name] = terms.square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()
    columns = ["S z", *(f"+ t = {t}" for t in schedule.timesteps.tolist())]
    save_image(lay_out([(STRIP_PROMPT, rows)], columns), IMAGES / STRIP_IMAGE)
    return {
        "timesteps": schedule.timesteps.tolist(),
        "noise_coefficients": schedule.noise_coefficients.tolist(),
        "latent_coefficient": schedule.latent_coefficient,
        "rms": sizes,
    }


def draw_contact() -> dict[str, Any]:
    """Draw each of three prompts eight times by teacher, K = 1 and K = 4, from the same noise.

    Returns:
        The prompts, and what drew.

    Raises:
        CheckpointError: A student has not been distilled.
    """
    seeds = list(range(PICTURES))
    models = {name: drawing.load_row(ROWS[name], SEEDS[0]) for name in CONTACT_ROWS}
    blocks: list[Block] = [
        (
            prompt,
            [
                (label, models[name].draw([prompt] * PICTURES, seeds))
                for name, label in CONTACT_ROWS.items()
            ],
        )
        for prompt in CONTACT_PROMPTS
    ]
    save_image(lay_out(blocks, []), IMAGES / CONTACT_IMAGE)
    return {
        "prompts": list(CONTACT_PROMPTS),
        "models": {name: model.facts for name, model in models.items()},
    }
