"""Loading a compiled library of operators, or saying why it is not there."""

import warnings
from pathlib import Path

import torch

from tiue_kernels import build


def load(path: Path, name: str, cure: str) -> str | None:
    """Load a library beside the torch that is here.

    Args:
        path: of the library.
        name: what it is called in messages, e.g. "CUDA".
        cure: the command that builds it.

    Returns:
        None, or the reason why it is not loaded, and the cure. A library that is there but does
        not load is warned of.
    """
    if not path.exists():
        return f"the {name} library is not built: {cure}"
    cause = _why_stale(path, name.lower())
    if cause is None:
        try:
            torch.ops.load_library(path)
        except Exception as error:
            # A broken library must never keep the package from being imported.
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            cause = f"does not load beside torch {torch.__version__}: {said}"
    if cause is None:
        return None
    command, _, _ = cure.partition(" (")
    rebuild = command.replace("install", "install --force-reinstall --no-deps", 1)
    reason = (
        f"{path} {cause}. Rebuild it with {rebuild} or delete it; everything else goes on "
        "without it"
    )
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return reason


def _why_stale(path: Path, target: str) -> str | None:
    """A library of other sources than those beside it takes other arguments; wheels have none."""
    try:
        expected = build.fingerprint(target)
    except build.BuildError:
        return None
    sources = path.with_suffix(".sources")
    if sources.exists() and sources.read_text() == expected:
        return None
    return "was compiled from another version of csrc"
