"""Prompts, the only data that the distillation needs: read, put in order, and drawn for."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiue.checkpoints import looks_local
from tiue.errors import DependencyError, InputError

logger = logging.getLogger(__name__)

# JourneyDB keeps what a captioner saw at Task2, and what the artist typed at prompt.
_KNOWN_COLUMNS = ("Task2.Caption", "caption", "prompt", "text")


def read_prompts(source: str | Path, column: str | None = None) -> list[str]:
    """Read prompts from a file or a Hugging Face data set, in its order.

    Args:
        source: A UTF-8 text file (one prompt a line), a .jsonl file (objects, JourneyDB's
            annotations among them, or strings), a .parquet file, a folder that `datasets` loads,
            or a data set's hub id, with `:split` behind it for another split than train.
        column: Where the prompt stands in all but text files, `a.b` for b inside a; by default
            the first of Task2.Caption, caption, prompt and text that is there.

    Returns:
        The distinct prompts, stripped of outer blanks; empty ones are left out.

    Raises:
        InputError: If it is missing, damaged, half written, or holds no prompt.
        DependencyError: If the package that reads this kind is not installed.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path, str | None], Iterable[Any]]] = {
        ".txt": _text_lines, ".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None and path.is_file():
        reader = _text_lines
    values = reader(path, column) if reader else _data_set_rows(str(source), column)
    prompts = list(
        dict.fromkeys(stripped for value in values if (stripped := _text(value, source).strip()))
    )
    if not prompts:
        raise InputError(f"No prompt in '{source}'. Text files hold one prompt a line.")
    return prompts


def prompts_digest(prompts: list[str]) -> str:
    """Tell lists of prompts apart: SHA-256 of them all, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def _text(value: Any, source: str | Path) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"A prompt in '{source}' is {value!r}, not text. Choose prompt_column.")
    return value


def _text_lines(path: Path, _column: str | None) -> list[str]:
    text = _read(path)
    if "\0" in text:
        raise InputError(
            f"'{path}' holds NUL bytes: it is damaged or half written. Write it again, one prompt "
            "a line."
        )
    if text and not text.endswith(("\n", "\r")):
        logger.warning(
            "The last line of '%s' has no line end: the file may have been cut short there.", path
        )
    return text.splitlines()


def _json_rows(path: Path, column: str | None) -> Iterator[Any]:
    rows = []
    # JSON strings may hold other line separators than \n, so no splitlines.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(
                    f"Line {number} of '{path}' is no JSON ({error}): the file is damaged or half "
                    "written. Write it again, one object a line."
                ) from error
    if rows and all(isinstance(row, str) for row in rows):
        return iter(rows)
    objects = [row for row in rows if isinstance(row, dict)]
    if len(objects) < len(rows):
        raise InputError(f"'{path}' must hold one JSON object a line, or one string a line.")
    names = {name: None for row in objects for name in _column_names(row)}
    place = _choose_column(list(names), column, path) if objects else ()
    return (_at(row, place) for row in objects)


def _parquet_rows(path: Path, column: str | None) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DependencyError(f"'{path}' needs pyarrow: pip install 'tiue[train]'.") from error
    try:
        file = parquet.ParquetFile(path)
        place = _choose_column(_schema_columns(file.schema_arrow), column, path)
        rows = file.read(columns=[".".join(place)]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"Cannot read prompts from '{path}' ({error}). Is the file whole?"
        ) from error
    return (_at(row, place) for row in rows)


def _data_set_rows(source: str, column: str | None) -> Iterator[Any]:
    name, _, split = source.partition(":")
    if not Path(name).is_dir() and looks_local(name):
        raise InputError(
            f"There is no file '{source}'. Give a .txt file with one prompt a line, .jsonl, "
            ".parquet, or the hub id owner/name of a data set."
        )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"'{source}' needs datasets: pip install 'tiue[datasets]'."
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its readers raise whatever their formats do
        raise InputError(f"Cannot load the data set '{source}' ({error}).") from error
    place = _choose_column(_schema_columns(rows.features.arrow_schema), column, source)
    return (_at({place[0]: value}, place) for value in rows[place[0]])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read prompts from '{path}' ({error}). Give a UTF-8 file, one prompt a line."
        ) from error


def _column_names(row: dict[str, Any]) -> list[str]:
    inner = [
        f"{name}.{key}" for name, value in row.items() if isinstance(value, dict) for key in value
    ]
    return [*row, *inner]


def _schema_columns(schema: Any) -> list[str]:
    """Names of an Arrow schema's columns, and of the fields inside those that are structs."""
    import pyarrow

    inner = [
        f"{field.name}.{field.type.field(i).name}"
        for field in schema
        if pyarrow.types.is_struct(field.type)
        for i in range(field.type.num_fields)
    ]
    return [*schema.names, *inner]


def _choose_column(names: list[str], wanted: str | None, source: str | Path) -> tuple[str, ...]:
    for name in (wanted,) if wanted else _KNOWN_COLUMNS:
        if name in names:
            return (name,) if "." not in name else tuple(name.split("."))
    raise InputError(
        f"'{source}' has no column {wanted or ' or '.join(_KNOWN_COLUMNS)}; set prompt_column to "
        f"one of {', '.join(names)}."
    )


def _at(row: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        row = row.get(name) if isinstance(row, dict) else None
    return row


class PromptOrder:
    """An endless order of prompts, every epoch shuffled anew, in which any place can be looked up.

    The order depends on the seed alone and keeps no state, so a resumed run goes on in it and
    processes can each take their own part of it.

    Args:
        count: Number of prompts.
        seed: Seed of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}

    def __getitem__(self, places: range) -> Tensor:
        """Look up consecutive places.

        Args:
            places: Places in the endless order, counted from 0.

        Returns:
            The prompts' indices, [len(places)] int64.
        """
        epochs = {place // self.count for place in places}
        self._epochs = {epoch: self._permutation(epoch) for epoch in epochs}
        return torch.stack([self._epochs[p // self.count][p % self.count] for p in places])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch in self._epochs:
            return self._epochs[epoch]
        # A prime far from small seeds, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        return torch.randperm(self.count, generator=generator)


class SampleDraws:
    """What is drawn at random for a batch, each sample from a generator of its own.

    A sample draws the same whatever batch, micro-batch or process it falls into.

    Args:
        seed: Seed of the run.
        samples: The samples' places in the run's order.
        device: Where the numbers go; they are drawn on the CPU, so that every device gets the same.
    """

    def __init__(self, seed: int, samples: range, device: torch.device) -> None:
        words = [np.random.SeedSequence((seed, s)).generate_state(1, np.uint64)[0] for s in samples]
        self._generators = [torch.Generator().manual_seed(int(word)) for word in words]
        self._device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers of a shape for each sample: [B, *shape]."""
        return self._stack(torch.randn(shape, generator=g) for g in self._generators)

    def integers(self, least: int, greatest: int) -> Tensor:
        """Draw one integer of least..greatest, both included, for each sample: [B] int64."""
        return self._stack(
            torch.randint(least, greatest + 1, (), generator=g) for g in self._generators
        )

    def chances(self, probability: float) -> Tensor:
        """Draw for each sample whether something of a probability happens: [B] bool."""
        return self._stack(torch.rand((), generator=g) < probability for g in self._generators)

    def _stack(self, numbers: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(numbers)).to(self._device)
