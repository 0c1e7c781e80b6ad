"""The forward operators in torch's own, for programs that leave this package.

    program = torch.export.export(module, args).run_decompositions(decompositions.table())

Such a program needs torch alone where it is loaded, and other runtimes (OpenVINO) can convert it.
Each operator's form stands in its declaration, in `tiue_kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiue_kernels import ops
from tiue_kernels.ops._library import OPERATORS

__all__ = ["ops", "table"]


def table() -> dict[Any, Callable[..., Any]]:
    """Every forward operator `tiue::<op>_fwd` to a function of torch's operators.

    The logsumexp of attention and the statistics of norms are given too, though an exported
    program drops what nothing reads.
    """
    return {operator.forward: operator.decomposition for operator in OPERATORS.values()}
