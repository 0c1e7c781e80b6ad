"""A call taken apart: its tensors, which change from call to call, and the rest, which is a key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tiue.schedule import OnePassSchedule
from tiue_kernels import dispatch

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class _Place:
    """Stands where a tensor was."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call.

    Attributes:
        tensors: every tensor among them, however deep in lists and dicts.
        constants: the leaves of the arguments, `_Place` where a tensor was.
        spec: how the leaves are nested.
    """

    tensors: list[torch.Tensor]
    constants: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Take the arguments of a call apart."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        constants = [_Place if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return cls(tensors, constants, spec)

    def copied(self, device: torch.device) -> Call:
        """The call with tensors of its own, those of its schedule on a device."""
        return Call(
            [tensor.detach().clone() for tensor in self.tensors],
            [
                leaf.copied(device) if isinstance(leaf, OnePassSchedule) else leaf
                for leaf in self.constants
            ],
            self.spec,
        )

    def run(self, function: Callable[..., Any], tensors: list[torch.Tensor] | None = None) -> Any:
        """Call a function with these arguments.

        Args:
            function: what the call was made to.
            tensors: to take in the place of the call's own, as many.

        Returns:
            What the function returns.
        """
        rest = iter(self.tensors if tensors is None else tensors)
        leaves = [next(rest) if leaf is _Place else leaf for leaf in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return function(*args, **kwargs)

    def key(
        self, sizes: Callable[[torch.Tensor], Hashable] = lambda tensor: tuple(tensor.shape)
    ) -> Hashable | None:
        """What two calls have in common where one, recorded, stands for the other.

        Shapes, dtypes and devices of the tensors, every other argument by its value, and the
        settings of the process that choose what runs.

        Args:
            sizes: what counts of a tensor's shape.

        Returns:
            The key; None where an argument has no value to compare by.
        """
        constants: list[Hashable] = []
        for leaf in self.constants:
            if isinstance(leaf, OnePassSchedule):
                constants.append(leaf.key)
            elif leaf is _Place or isinstance(leaf, _PLAIN):
                constants.append((type(leaf), leaf))
            else:
                return None
        shapes = tuple((sizes(t), t.dtype, t.device) for t in self.tensors)
        settings = (
            tuple(
                (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in sorted({tensor.device.type for tensor in self.tensors})
            ),
            dispatch.settings(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        )
        return shapes, tuple(constants), str(self.spec), settings
