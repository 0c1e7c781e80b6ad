"""The output folder of a run: whose it is, who writes it now, and where it stopped last."""

import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from tiue.distill.settings import CONFIG, read_settings
from tiue.errors import InputError, OutputError

LOCK = ".lock"
# What a write that was killed leaves: of `whole_folder`, of `write_file`, of `Checkpoints.save`.
_LEFTOVERS = re.compile(
    r"\.(unet|transformer|lora|scheduler|pipeline|best)-.{8}|\.\d+\..+|\.step-\d+\.partial"
)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))


def claim_output(output: Path) -> FileLock:
    """Make a run's output folder, or see that it may be written, and keep others from it.

    Args:
        output: The folder.

    Returns:
        The lock, held; it ends with the process too.

    Raises:
        OutputError: If the folder cannot be written, holds something that is no run's, or is
            written by another process now.
    """
    lock = FileLock(output / LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
        _require_ours(output)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"Another process is writing to '{output}' now. Stop it or wait for its end, or choose "
            "another folder with --output."
        ) from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"Cannot write to '{output}' ({error}). Choose another folder."
        ) from error
    return lock


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        output: The run's output folder.
        resume: Whether to go on from the newest checkpoint.

    Returns:
        The newest checkpoint, or None for a fresh start.

    Raises:
        OutputError: If the folder holds another run that `resume` does not ask to continue.
    """
    found = list_checkpoints(output / "checkpoints")
    if found and not resume:
        raise OutputError(
            f"'{output}' already holds a run ({found[-1].name}). Go on with --resume, or choose "
            "another folder."
        )
    return found[-1] if found else None


def clear_leftovers(output: Path) -> None:
    """Remove what writes that were killed have left half done; needs the lock."""
    for path in [*output.iterdir(), *(output / "checkpoints").glob(".*")]:
        if _LEFTOVERS.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _require_ours(output: Path) -> None:
    """An output folder is empty, or holds the settings of a run."""
    if all(path.name == LOCK or _LEFTOVERS.fullmatch(path.name) for path in output.iterdir()):
        return
    try:
        ours = {"teacher", "output"} <= read_settings(output / CONFIG).keys()
    except InputError:
        ours = False
    if not ours:
        raise OutputError(
            f"'{output}' holds files that are no run's (there is no {CONFIG} of one), and a run "
            "would write over them. Choose an empty or a new folder."
        )
