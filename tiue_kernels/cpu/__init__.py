"""The compiled library of the CPU path: loading it, and why it is not there.

`libtiue_cpu.so` lies beside this file when a C++ compiler was there at installation. Without it
everything works, in plain PyTorch.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tiue_kernels import libraries
from tiue_kernels.cpu.library import Library
from tiue_kernels.libraries import LibraryError

logger = logging.getLogger(__name__)

PATH = Path(__file__).parent / "libtiue_cpu.so"
# Written by setup.py where the library could not be compiled.
NOT_BUILT = PATH.with_suffix(".not_built")
CURE = "TIUE_CPU=1 pip install . (needs g++ or clang++)"

_library: Library | None = None
_why_not: str | None = None
_said = False


def load(path: Path = PATH) -> None:
    """Take a library, or note why not: once at import, and again for another one.

    Args:
        path: of the library.
    """
    global _library, _why_not

    def take() -> None:
        global _library
        _library = Library(path)

    _library = None
    _why_not = libraries.load(path, "CPU", CURE, take)
    if not path.exists() and NOT_BUILT.exists():
        said = NOT_BUILT.read_text("utf-8").strip()
        _why_not = f"the CPU library was not built: {said}. Then: {CURE}"


if os.environ.get("TIUE_CPU") == "0":  # as at installation
    _why_not, _said = "the CPU library is left out: TIUE_CPU=0", True
else:
    load()


def library() -> Library:
    """The compiled library.

    Raises:
        LibraryError: It is not loaded.
    """
    if _library is None:
        raise LibraryError(str(why_not()))
    return _library


def loaded() -> bool:
    """Whether the compiled library is there."""
    return _why_not is None


def why_not() -> str | None:
    """Why the library is not loaded, with the cure; None when it is."""
    return _why_not


def has_products() -> bool:
    """Whether the library multiplies matrices here, and is faster at it than what torch calls."""
    return why_no_products() is None


def why_no_products() -> str | None:
    """Why it does not; None when it does."""
    if _why_not is not None:
        return _why_not
    if library().has_products:
        return None
    return "its products need AVX2"


def say_what_is_missed() -> None:
    """One line in the log, at the first convolution that the library would have run."""
    global _said
    if not _said and not loaded():
        _said = True
        logger.warning("Convolutions run in plain PyTorch, slower: %s. Said once.", why_not())
