"""The operator library `tiue`: schemas and fakes; `dispatch` chooses what runs at each call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tiue_kernels import dispatch
from tiue_kernels.layout import memory_format

LIBRARY = torch.library.Library("tiue", "DEF")

# Operators that are made of others, and how: no backend has a kernel for them.
COMPOSED: dict[Any, Callable[..., Any]] = {}


def define(name: str, schema: str, fake: Callable[..., Any], run: Any = None) -> Any:
    """Defines `tiue::<name>`.

    Args:
        name: `<op>_fwd` or `<op>_bwd`.
        schema: arguments and results, as in "(Tensor x) -> Tensor".
        fake: shapes, dtypes and memory formats of the results, without data.
        run: the implementation; by default the launcher of that name on the backend chosen.

    Returns:
        The operator.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, partial(_outside_of_autocast, run or partial(dispatch.call, name)), _ANY)
    torch.library.register_fake(f"tiue::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.tiue, name).default
    if run is not None:
        COMPOSED[operator] = run
    return operator


# Every device, below autograd.
_ANY = "CompositeExplicitAutograd"


def _outside_of_autocast(run: Callable[..., Any], *args: Any) -> Any:
    """Runs a launcher with autocast off: the functional layer has settled every dtype."""
    device = next(arg for arg in _flat(args) if isinstance(arg, torch.Tensor)).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return run(*args)
    with torch.autocast(device, enabled=False):
        return run(*args)


def _flat(args: tuple[Any, ...]) -> list[Any]:
    return [entry for arg in args for entry in (arg if isinstance(arg, list) else [arg])]


def rows_like(rows: torch.Tensor, *shape: int) -> torch.Tensor:
    """An empty map of another shape, in the dtype and the memory format of `rows`."""
    return torch.empty(
        shape, dtype=rows.dtype, device=rows.device, memory_format=memory_format(rows)
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
