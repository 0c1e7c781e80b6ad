"""Folders of pictures: read whole, cropped and resized as the protocol says, or refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tiue.errors import InputError
from tiue.images import on_white

NAMED = 5  # names that a message lists before it counts the rest


@dataclass(frozen=True)
class Folder:
    """A folder whose pictures can all be read.

    Attributes:
        paths: The pictures, by name.
        sizes: How many there are of each (width, height).
        skipped: Names of files that are no pictures and were left out, because that was asked for.
    """

    paths: list[Path]
    sizes: dict[tuple[int, int], int]
    skipped: list[str]


def scan_folder(folder: Path, skip_unreadable: bool = False, one_size: bool = False) -> Folder:
    """Read every file of a folder once; hidden files and folders in it are not looked at.

    Args:
        folder: The folder.
        skip_unreadable: Leave out what is no whole picture instead of refusing the folder.
        one_size: Refuse pictures of different sizes.

    Returns:
        What there is.

    Raises:
        InputError: The folder is missing or empty, a file is no whole picture, or the sizes differ;
            the message names the files.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    paths, broken = [], []
    sizes: Counter[tuple[int, int]] = Counter()
    first: dict[tuple[int, int], str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            with Image.open(path) as image:
                image.load()  # a file that is cut off opens all the same
                size = image.size
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError,
                Image.DecompressionBombError):  # fmt: skip
            broken.append(path.name)
            continue
        paths.append(path)
        sizes[size] += 1
        first.setdefault(size, path.name)
    if broken and not skip_unreadable:
        raise InputError(
            f"{folder} holds {len(broken)} files that are no whole pictures: {_some(broken)}."
            " Remove them, or leave them out and have them counted with --skip-unreadable."
        )
    if not paths:
        raise InputError(f"{folder} holds no pictures")
    if one_size and len(sizes) > 1:
        examples = [f"{name} is {w} x {h}" for (w, h), name in first.items()]
        raise InputError(
            f"{folder} holds pictures of {len(sizes)} sizes: {_some(examples)}. A model's pictures"
            " are of one size; give --mixed-sizes if these are to be cropped and resized all the"
            " same."
        )
    return Folder(paths, dict(sizes), broken)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def square(image: Image.Image, size: int) -> np.ndarray:
    """Crop to the centre square and resize (Lanczos, antialiased) to [3, size, size] uint8.

    A transparent picture is laid on white.
    """
    image = on_white(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(image).transpose(2, 0, 1)


def read_batches(paths: list[Path], size: int, batch_size: int) -> Iterator[Tensor]:
    """Read pictures in their order.

    Args:
        paths: Of whole pictures.
        size: As in `square`.
        batch_size: Pictures a batch.

    Yields:
        [B, 3, size, size] uint8.
    """
    for start in range(0, len(paths), batch_size):
        arrays = []
        for path in paths[start : start + batch_size]:
            with Image.open(path) as image:
                arrays.append(square(image, size))
        yield torch.from_numpy(np.stack(arrays))
