"""Register spills that are allowed, each with its reason, and what is wrong with the rest."""

from __future__ import annotations

from typing import NamedTuple


class Allowed(NamedTuple):
    """Bytes a thread that a kernel may spill, and why."""

    most: int
    why: str


def complaints(spills: dict[str, int], allowed: dict[str, Allowed]) -> list[str]:
    """What speaks against a build: kernels that spill too much, and entries without a kernel.

    Args:
        spills: every kernel that was compiled, to its bytes.
        allowed: those of them that may spill.
    """
    found = []
    for name, size in spills.items():
        if size > (allowed[name].most if name in allowed else 0):
            found.append(f"{name} spills {size} bytes")
    for name, entry in allowed.items():
        if not entry.why:
            found.append(f"{name} may spill for no reason")
        if not spills.get(name):
            found.append(f"{name} spills nothing or is gone: take its entry out")
    return found
