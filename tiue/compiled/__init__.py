"""The one pass as one compiled call: CUDA graphs, torch.compile, OpenVINO, exported programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tiue.compiled.calls import Call
from tiue.compiled.export import export
from tiue.compiled.graphs import GraphedCall, Recorder
from tiue.compiled.openvino import OpenVINOCall, check_precision

__all__ = ["Call", "GraphedCall", "OpenVINOCall", "check_precision", "compile_call", "export"]


def compile_call(
    function: Callable[..., torch.Tensor],
    modules: Sequence[nn.Module],
    backend: str | None = None,
    max_graphs: int = 8,
    dynamic: bool | None = None,
    recorder: Recorder | None = None,
    precision: str = "float32",
    **options: Any,
) -> Callable[..., torch.Tensor]:
    """Make the fastest call of a function that runs modules, whose results stay the same.

    On a GPU every call is recorded as a CUDA graph (`GraphedCall`). On a CPU nothing is recorded:
    without a backend the function runs as it is.

    Args:
        function: one tensor out, no autograd; it depends on its arguments and the modules alone.
        modules: whose weights it reads.
        backend: None for the function as it is, "openvino", or a backend of torch.compile
            ("inductor" where there is a C++ compiler).
        max_graphs: graphs kept, one a key: batch, size, dtype, schedule, which conditions are
            there, length of the text.
        dynamic: whether one compilation serves every batch and size; torch.compile finds out by
            itself, OpenVINO compiles for one size.
        recorder: what records the graphs; calls that run one after another share its memory.
        precision: "float32", or "int8" with OpenVINO, which is lossy: see `OpenVINOCall`.
        **options: for torch.compile (`mode`, `options`), or `OpenVINOCall` (`max_models`).

    Returns:
        What to call in the place of the function.

    Raises:
        InputError: no such precision, or not with this backend.
        DependencyError: OpenVINO, or NNCF for "int8", is not installed.
    """
    check_precision(precision, backend)
    if backend == "openvino":
        return OpenVINOCall(
            function, modules, dynamic=bool(dynamic), precision=precision, **options
        )
    if backend is not None:
        function = torch.compile(
            function, fullgraph=True, backend=backend, dynamic=dynamic, **options
        )
    return GraphedCall(function, modules, max_graphs, recorder)
