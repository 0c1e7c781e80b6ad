"""Loading a compiled library of operators, or saying why it is not there."""

import warnings
from pathlib import Path

import torch


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
    try:
        torch.ops.load_library(path)
    except Exception as error:
        # A broken library must never keep the package from being imported.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        command, _, _ = cure.partition(" (")
        rebuild = command.replace("install", "install --force-reinstall --no-deps", 1)
        reason = (
            f"{path} does not load beside torch {torch.__version__}: {cause}. Rebuild it with "
            f"{rebuild} or delete it; everything else goes on without it"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    return None
