"""Prompts, the only data that the distillation needs, read from files of every kind."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tiue.errors import DependencyError, InputError
from tiue.loading.checks import looks_local

logger = logging.getLogger(__name__)

# JourneyDB keeps what a captioner saw at Task2, and what the artist typed at prompt.
_KNOWN_COLUMNS = ("Task2.Caption", "caption", "prompt", "text")


def read_prompts(
    source: str | Path,
    column: str | None = None,
    report: Callable[[str], object] = logger.info,
) -> list[str]:
    """Read prompts from a file or a Hugging Face data set, in its order.

    Files are streamed: what stays in memory is the prompts.

    Args:
        source: A UTF-8 text file (one prompt a line), a .jsonl file (objects, JourneyDB's
            annotations among them, or strings), a .json file (the same, or an array of them), a
            .parquet file, a folder that `datasets` loads, a data set's hub id, with `:split`
            behind it for another split than train, or `openmoji` for the embedded model's.
        column: Where the prompt stands in all but text files, `a.b` for b inside a; by default
            the first of Task2.Caption, caption, prompt and text that is there.
        report: Told how many prompts were read, how many rows left out, and why.

    Returns:
        The distinct prompts, stripped of outer blanks; empty ones and those with half of a
        surrogate pair, which no encoding can hold, are left out.

    Raises:
        InputError: If it is missing, damaged, half written, or holds no prompt.
        DependencyError: If the package that reads this kind is not installed.
    """
    prompts: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    for value in _values(source, column):
        prompt = _text(value, source).strip()
        if not prompt:
            left_out["empty"] += 1
        elif prompt in prompts:
            left_out["repeated"] += 1
        elif not _is_unicode(prompt):
            left_out["not Unicode (half of a surrogate pair)"] += 1
        else:
            prompts[prompt] = None
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    counted = f"{len(prompts)} of {len(prompts) + left_out.total()} rows of '{source}'"
    if not prompts:
        raise InputError(
            f"No prompt in '{source}'"
            + (f" (left out: {reasons})" if reasons else "")
            + ". Text files hold one prompt a line."
        )
    report(f"Prompts: {counted}" + (f"; left out: {reasons}." if reasons else "."))
    return list(prompts)


def prompts_digest(prompts: list[str]) -> str:
    """Tell lists of prompts apart: SHA-256 of them all, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def _values(source: str | Path, column: str | None) -> Iterable[Any]:
    if str(source) == "openmoji":
        from tiue.openmoji.data import list_prompts

        return list_prompts()
    path = Path(source)
    readers: dict[str, Callable[[Path, str | None], Iterable[Any]]] = {
        ".txt": _text_lines, ".jsonl": _json_values, ".json": _json_values,
        ".parquet": _parquet_rows,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None and path.is_file():
        reader = _text_lines
    return reader(path, column) if reader else _data_set_rows(str(source), column)


def _text(value: Any, source: str | Path) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"A prompt in '{source}' is {value!r}, not text. Choose prompt_column.")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, to be read line by line: str.splitlines would break prompts at U+2028 too."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read prompts from '{path}' ({error}). Give a UTF-8 file, one prompt a line."
        ) from error


def _text_lines(path: Path, _column: str | None) -> Iterator[str]:
    line = "\n"
    with _opened(path) as file:
        for line in file:
            if "\0" in line:
                raise InputError(
                    f"'{path}' holds NUL bytes: it is damaged or half written. Write it again, one "
                    "prompt a line."
                )
            yield line
    if not line.endswith("\n"):
        logger.warning(
            "The last line of '%s' has no line end: the file may have been cut short there.", path
        )


def _json_values(path: Path, column: str | None) -> list[Any]:
    wanted = (column,) if column else _KNOWN_COLUMNS
    return _json_column(path, wanted, len(wanted))


def _json_column(path: Path, wanted: tuple[str, ...], best: int) -> list[Any]:
    """Strings, or what objects have at the first of the wanted columns that any of them has.

    Args:
        path: The file.
        wanted: Names of columns, the best first.
        best: Place of the best one that is known to be there; their number for none.
    """
    values: list[Any] = []
    kinds: set[type] = set()
    names: dict[str, None] = {}
    for row in _json_rows(path):
        kinds.add(type(row))
        if isinstance(row, dict):
            better = next((i for i in range(best) if _has(row, wanted[i])), best)
            if better < best < len(wanted):
                return _json_column(path, wanted, better)  # rows before may have it elsewhere
            best = better
            if best == len(wanted):
                names |= dict.fromkeys(_column_names(row))
                row = None
            else:
                row = _at(row, tuple(wanted[best].split(".")))
        values.append(row)
    if not kinds <= {dict} and not kinds <= {str}:
        raise InputError(
            f"'{path}' must hold one JSON object a line, or one string a line; or an array of them."
        )
    if kinds == {dict} and best == len(wanted):
        raise _no_column(list(names), wanted, path)
    return values


def _json_rows(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                yield from json.load(file)
            except ValueError as error:
                raise InputError(
                    f"The array in '{path}' is no JSON ({error}): the file is damaged or half "
                    "written. Write it again, as one array or one object a line."
                ) from error
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"Line {number} of '{path}' is no JSON ({error}): the file is damaged or "
                        "half written. Write it again, one object a line."
                    ) from error
                yield row


def _parquet_rows(path: Path, column: str | None) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DependencyError(f"'{path}' needs pyarrow: pip install 'tiue[train]'.") from error
    try:
        file = parquet.ParquetFile(path)
        place = _choose_column(_schema_columns(file.schema_arrow), column, path)
        for batch in file.iter_batches(columns=[".".join(place)]):
            yield from (_at(row, place) for row in batch.to_pylist())
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read prompts from '{path}' ({error}). Is the file whole?"
        ) from error


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


def _has(row: dict[str, Any], name: str) -> bool:
    for part in name.split("."):
        if not isinstance(row, dict) or part not in row:
            return False
        row = row[part]
    return True


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
    columns = (wanted,) if wanted else _KNOWN_COLUMNS
    for name in columns:
        if name in names:
            return tuple(name.split("."))
    raise _no_column(names, columns, source)


def _no_column(names: list[str], wanted: tuple[str, ...], source: str | Path) -> InputError:
    return InputError(
        f"'{source}' has no column {' or '.join(wanted)}; set prompt_column to one of "
        f"{', '.join(names)}."
    )


def _at(row: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        row = row.get(name) if isinstance(row, dict) else None
    return row
