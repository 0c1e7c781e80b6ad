"""A call as a program of torch's own operators, which needs no code of this package to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from tiue.compiled.calls import Call
from tiue_kernels import decompositions


class Program(nn.Module):
    """A call as a module: its tensors are the inputs, the rest is fixed.

    Args:
        function: what is called.
        modules: those that it runs.
        call: the arguments.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], modules: Sequence[nn.Module], call: Call
    ) -> None:
        super().__init__()
        self._run = lambda *tensors: call.run(function, list(tensors))
        self.parts = nn.ModuleList(modules)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The function of other tensors."""
        return self._run(*tensors)


@torch.no_grad()
def export(
    function: Callable[..., torch.Tensor],
    modules: Sequence[nn.Module],
    call: Call,
    dynamic: bool = False,
) -> ExportedProgram:
    """Trace a call and write its `tiue` operators as torch's own.

    Args:
        function: one tensor out, which depends on the arguments and the modules alone.
        modules: those that it runs.
        call: the arguments; tensors become inputs, in their order, everything else is fixed.
        dynamic: whether the program takes other batches, heights and widths. Sizes of 1 in the
            call would be taken for fixed.

    Returns:
        The program.
    """
    shapes: Any = None
    if dynamic:
        axes = [free_axes(tensor) for tensor in call.tensors]
        shapes = {"tensors": tuple(dict.fromkeys(own, Dim.AUTO) for own in axes)}
    args = tuple(call.tensors)
    program = torch.export.export(Program(function, modules, call), args, dynamic_shapes=shapes)
    return program.run_decompositions(decompositions.table())


def free_axes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes of an input that a dynamic program takes in any size: batch, and sides of a map."""
    return (0, 2, 3) if tensor.ndim == 4 else (0,)
