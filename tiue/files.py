"""Files and folders that are written whole or not at all, and stay so when the power goes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tiue.errors import OutputError

_CHUNK = 1 << 24
# A full disk is each of the three, by who writes: Python, torch, safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder beside its place and rename it into place once it is complete and on disk.

    Args:
        folder: The folder's place; one that is already there is replaced.

    Yields:
        The temporary folder to write into.

    Raises:
        OutputError: If it cannot be written; nothing is left behind then.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A name that no reader takes for a finished folder, on the same file system.
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        written = temporary / "written"
        written.mkdir()
        yield written
        sync_tree(written)
        replaced = temporary / "replaced"
        if folder.exists():
            folder.rename(replaced)
        try:
            written.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
        sync_folder(folder.parent)
    except WRITE_ERRORS as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it there once it is on disk.

    Args:
        path: The file's place.
        write: Called with the path to write to.

    Raises:
        OutputError: If it cannot be written; what was there stays.
    """
    # The suffix stays last: some writers choose the format by it.
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        _sync(beside)
        beside.replace(path)
        sync_folder(path.parent)
    except WRITE_ERRORS as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write text, whole or not at all."""
    text = "".join(f"{line}\n" for line in lines)
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_lines(path, [json.dumps(content, indent=2)])


def append_line(path: Path, content: Any) -> None:
    """Add one line of JSON to a file.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder inside a folder, and itself, are on disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk, where the system can tell."""
    with suppress(OSError):  # not every system opens folders
        _sync(folder)


def cannot_write(path: Path, error: Exception) -> OutputError:
    """Make the error of a place that could not be written."""
    return OutputError(
        f"Cannot write '{path}' ({error}). Choose a folder that can be written and has room; what "
        "was complete before is still there."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
