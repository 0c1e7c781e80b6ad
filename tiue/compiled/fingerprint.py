"""Whether modules are still what they were when a call of them was recorded."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, bytes, type(None))


class Fingerprint:
    """The structure, the options and the adapters of modules, and where their weights lie.

    A recorded call reads weights where they lie, so values written in place (an optimiser,
    `load_state_dict`, a fused LoRA) need no new recording. Anything else does: another layer,
    hook, attention processor, adapter or scale, a weight that has moved, training mode. So every
    attribute of every module is compared by identity, containers entry by entry, and the place and
    layout of every parameter and buffer. 1 ms for the UNet of SD 1.5 (one CPU core).

    Args:
        modules: whose recorded calls are to be trusted.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._filled: list[tuple[Any, list[Any]]] = []
        self._empty: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        seen: set[int] = set()
        for root in modules:
            for module in root.modules():
                self._watch(vars(module), seen)
                # An attention processor need be no module, and has options of its own.
                self._watch(getattr(vars(module).get("processor"), "__dict__", {}), seen)
        self._places = self._present_places()

    def _watch(self, container: Any, seen: set[int]) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        entries = _entries(container)
        if entries:
            self._filled.append((container, entries))
        else:
            self._empty.append(container)
        for entry in entries:
            if isinstance(entry, (dict, list, set)):
                self._watch(entry, seen)
            elif isinstance(entry, torch.Tensor) and id(entry) not in seen:
                seen.add(id(entry))
                self._tensors.append(entry)

    def holds(self) -> bool:
        """Whether nothing has changed that a recorded call does not see by itself."""
        if any(self._empty):
            return False
        for container, known in self._filled:
            present = _entries(container)
            if len(present) != len(known):
                return False
            if not all(map(is_, present, known)) and not all(map(_same, present, known)):
                return False
        return self._present_places() == self._places

    def _present_places(self) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]


def contents(modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """What the weights hold: equal lists, equal weights.

    For what copies weights. A version counts every ordinary write in place; writes to `.data`,
    which versions do not count, change the exclusive or of all bits (one that swaps values, or the
    signs of an even number of them, does not, and is not seen). One read of all weights.

    Args:
        modules: whose parameters and buffers are read.
    """
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return [(_version(t), int(torch.hash_tensor(t.detach()).item())) for t in tensors]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference_mode count none


def _entries(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _same(present: Any, known: Any) -> bool:
    """Identical, or numbers and texts of one value: scaling a LoRA and back writes new ones."""
    return present is known or (
        type(present) is type(known) and isinstance(present, _PLAIN) and present == known
    )
