"""Loading a compiled library of operators, or saying why it is not there."""

import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tiue_kernels import build


class LibraryError(RuntimeError):
    """A compiled library that cannot serve; the message goes on after its path."""


# Kinds of computers as libraries name them (the ELF header's e_machine).
MACHINES = {62: "x86_64", 183: "aarch64", 3: "i386", 40: "arm", 21: "ppc64le", 243: "riscv64"}


def load(path: Path, name: str, cure: str, take: Callable[[], object] | None = None) -> str | None:
    """Load a library beside the torch that is here.

    Args:
        path: of the library.
        name: what it is called in messages, e.g. "CUDA".
        cure: the command that builds it.
        take: what loads it; by default torch does, as a library of operators.

    Returns:
        None, or the reason why it is not loaded, and the cure. A library that is there but does
        not load is warned of.
    """
    if not path.exists():
        return f"the {name} library is not built: {cure}"
    cause = _why_not_of_this_computer(path) or _why_stale(path, name.lower())
    if cause is None:
        try:
            take() if take else torch.ops.load_library(path)
        except Exception as error:
            # A broken library must never keep the package from being imported.
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            loading = f"does not load beside torch {torch.__version__}: {said}"
            cause = said if isinstance(error, LibraryError) else loading
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


def why_no_driver(path: Path, driver: int) -> str | None:
    """Why the driver cannot run what the CUDA library was linked with, with the cure.

    A CUDA runtime runs on every driver of its major version or a newer one.

    Args:
        path: of the library; beside it lies what it was compiled with.
        driver: the CUDA version that the driver is for, 13000 for 13.0; 0 where there is none.

    Returns:
        The reason, or None.
    """
    sources = path.with_suffix(".sources")
    _, *toolkit = sources.read_text().split() if sources.exists() else ("",)
    if not toolkit or not driver or driver // 1000 >= int(toolkit[0].partition(".")[0]):
        return None
    newest = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"it was compiled with CUDA {toolkit[0]}, whose runtime needs a driver for CUDA "
        f"{toolkit[0].partition('.')[0]}.0 or newer, and this one is for {newest}: update the "
        f"driver, or set CUDA_HOME to a toolkit of CUDA {driver // 1000} and build it again"
    )


def _why_not_of_this_computer(path: Path) -> str | None:
    """A library for another kind of computer: the loader would only say that it finds none."""

    def machine_of(file: Path) -> int | None:
        try:
            with open(file, "rb") as opened:
                header = opened.read(20)
        except OSError:
            return None
        is_elf = len(header) == 20 and header[:4] == b"\x7fELF"
        return (
            int.from_bytes(header[18:], "big" if header[5] == 2 else "little") if is_elf else None
        )

    its, ours = machine_of(path), machine_of(Path(sys.executable))
    if its is None or ours is None or its == ours:
        return None
    return f"is for {MACHINES.get(its, f'machine {its}')}, and this is {platform.machine()}"


def _why_stale(path: Path, target: str) -> str | None:
    """A library of other sources than those beside it takes other arguments; wheels have none."""
    try:
        expected = build.fingerprint(target)
    except build.BuildError:
        return None
    sources = path.with_suffix(".sources")
    if sources.exists() and sources.read_text().split()[:1] == [expected]:
        return None
    return "was compiled from another version of csrc"
