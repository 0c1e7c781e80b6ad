"""Contact sheets, file names made of prompts, and picture files that are whole or absent."""

from __future__ import annotations

import contextlib
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tiue.errors import InputError, OutputError

_MARGIN = 12
_FONT_SIZE = 15
_LABEL_LINES = 2
# Narrower pictures are enlarged by a whole factor: a label of two words needs about this width.
_LEAST_CELL_WIDTH = 128
# File systems allow 255 bytes a name; the rest is left to a seed, a number and a suffix.
_NAME_BYTES = 120


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Lay pictures out in rows on a white sheet, each with its label below.

    Args:
        images: Pictures of any sizes; those narrower than 128 pixels are enlarged by a whole
            factor, without smoothing.
        labels: One text a picture; wrapped to two lines, then cut.
        columns: Pictures a row; by default as many as make the sheet about square.

    Returns:
        The sheet, RGB.

    Raises:
        InputError: No pictures, another number of labels than pictures, or `columns` under 1.
    """
    if not images or len(images) != len(labels):
        raise InputError(
            "a contact sheet needs at least one picture and one label for each,"
            f" got {len(images)} pictures and {len(labels)} labels"
        )
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))

    factor = max(1, math.ceil(_LEAST_CELL_WIDTH / max(image.width for image in images)))
    width = factor * max(image.width for image in images)
    height = factor * max(image.height for image in images)
    font = ImageFont.load_default(size=_FONT_SIZE)
    line_height = math.ceil(_FONT_SIZE * 1.3)
    row_height = height + _LABEL_LINES * line_height + _MARGIN
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB", (_MARGIN + columns * (width + _MARGIN), _MARGIN + rows * row_height), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = _MARGIN + index % columns * (width + _MARGIN)
        y = _MARGIN + index // columns * row_height
        picture = image.convert("RGB").resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        for number, line in enumerate(_wrap(label, font, width)):
            centre = x + width / 2
            top = y + height + 2 + number * line_height
            draw.text((centre, top), line, fill="black", font=font, anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break `text` into at most two lines of `width` pixels; the rest becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if not lines[-1] or font.getlength(candidate) <= width:
            lines[-1] = candidate
        else:
            lines.append(word)
    if len(lines) > _LABEL_LINES:
        lines = [*lines[: _LABEL_LINES - 1], lines[_LABEL_LINES - 1] + "..."]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    while len(line) > 4 and font.getlength(line) > width:
        line = line.removesuffix("...")[:-1] + "..."
    return line


def on_white(image: Image.Image) -> Image.Image:
    """Make a picture RGB, a transparent one laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def safe_file_name(prompt: str) -> str:
    """Make the stem of a file name of a prompt: no path signs, no spaces, at most 120 bytes.

    Letters and digits of any script stay, in lower case; every run of anything else becomes one
    hyphen. Different prompts may give the same name.

    Args:
        prompt: Any text, also an empty one or one made of path characters.

    Returns:
        A stem that is never empty; `image` where nothing of the prompt is left.
    """
    text = unicodedata.normalize("NFC", prompt).lower()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    stem = "-".join(words).encode()[:_NAME_BYTES].decode(errors="ignore").rstrip("-")
    return stem or "image"


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture so that `path` holds all of it or what it held before.

    Args:
        image: The picture.
        path: The file; its suffix (`.png`, `.webp`, ...) chooses the format.

    Raises:
        InputError: The suffix names no picture format.
        OutputError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"cannot tell a picture format from {path.name!r}; end it in .png")
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        image.save(partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
