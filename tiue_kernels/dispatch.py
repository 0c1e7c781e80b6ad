"""Which implementation of an operator runs: CUDA C++, Triton, the CPU library or reference.

Tensors take the first backend of their operator's row that installation and device allow, those on
a CPU the first of `ON_CPU`. `use_backend` or the environment variable
TIUE_BACKEND forces one, or an order of several; a call that none of them can serve raises with
every reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

HALF_AND_SINGLE = frozenset({torch.float16, torch.bfloat16, torch.float32})
ANY_FLOAT = HALF_AND_SINGLE | {torch.float64}
LAYOUTS = frozenset({"contiguous", "channels_last"})
PREFERENCE = ("cuda", "triton", "cpu", "reference")
# Kernels for GPUs run on a CPU too, interpreted or on the host: for tests, where forced.
ON_CPU = ("cpu", "reference")
VARIABLE = "TIUE_BACKEND"


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; the message lists every reason."""


# (direction, arguments by their names in the schema, compute capability of the device, (0, 0) for a
# CPU) to the reason why not, or None.
Limit = Callable[[str, Mapping[str, Any], tuple[int, int]], "str | None"]


@dataclass(frozen=True)
class Capability:
    """What one backend's implementation of one operator takes.

    Attributes:
        dtypes: of the data tensors; parameters of a norm may be of another floating type.
        layouts: memory formats that are read in place. Others are copied first.
        compute_capability: the least that a GPU needs, (0, 0) where the backend needs no GPU.
        limit: what else a call must keep.
        yields: where another backend is faster, so that it is left out unless forced.
        missing: why what it needs is not installed, or None.
    """

    dtypes: frozenset[torch.dtype] = HALF_AND_SINGLE
    layouts: frozenset[str] = LAYOUTS
    compute_capability: tuple[int, int] = (8, 0)
    limit: Limit | None = None
    yields: Limit | None = None
    missing: Callable[[], str | None] | None = None


KERNEL = Capability()
ANYWHERE = Capability(dtypes=ANY_FLOAT, compute_capability=(0, 0))

# operator -> backend -> what it takes; a backend that is absent has no implementation. Each
# operator's row stands in its declaration, in `tiue_kernels.ops`.
TABLE: dict[str, dict[str, Capability]] = {}
# operator -> direction -> names of the launchers' arguments
ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {}
# public operator without kernels of its own -> those that it is made of, torch's own apart
MADE_OF: dict[str, tuple[str, ...]] = {}


def block_memory(compute_capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have (CUDA Programming Guide, table of limits)."""
    if compute_capability in ((8, 0), (8, 7)):
        return 163 << 10
    return (227 if compute_capability[0] in (9, 10, 11) else 99) << 10


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one `with` block forces; equal to itself alone."""

    backends: tuple[str, ...]
    of_operators: Mapping[str, str]


_forced: list[_Entry] = []


@contextmanager
def use_backend(*backends: str, **of_operators: str) -> Iterator[None]:
    """Forces a backend for every operator called inside, backward passes inside included.

    Of several, each call takes the first that can serve it: `use_backend("cuda", "reference")`
    leaves to plain PyTorch what has no CUDA C++ kernel. `use_backend(conv2d="reference")` forces
    one operator alone. Holds for the whole process, since autograd runs backward in threads of its
    own; of blocks that overlap in several threads the one entered last counts, until it is left.

    Args:
        *backends: "cuda", "triton", "cpu" or "reference", in the order in which to try them.
        **of_operators: an operator's name to its backend.

    Raises:
        ValueError: there is no such backend or operator, or none is named.
        BackendError: from an operator called inside which none of the backends can serve.
    """
    if backends or not of_operators:
        _known(backends)
    for operator, backend in of_operators.items():
        _known((backend,))
        if operator not in TABLE:
            raise ValueError(f"no operator {operator!r}: choose one of {', '.join(TABLE)}")
    entry = _Entry(backends, of_operators)
    _forced.append(entry)
    try:
        yield
    finally:
        _forced.remove(entry)  # its own, which another thread's may have followed


def forced_backends(operator: str | None = None) -> tuple[str, ...]:
    """What `use_backend` or, outside of it, TIUE_BACKEND forces, in order; empty: nothing.

    Args:
        operator: of which; by default what holds for those that are not named.
    """
    forced = _forced[-1:]  # in one step: another thread may take the last one out
    if not forced:
        if not _environment:
            _environment.append(_forced_by_environment())
        return _environment[0]
    if operator is not None and operator in forced[0].of_operators:
        return (forced[0].of_operators[operator],)
    return forced[0].backends


def settings() -> tuple[Any, ...]:
    """What is forced now, as a value to compare: a recorded call holds while it stays equal."""
    forced = _forced[-1:]
    return forced_backends(), tuple(sorted(forced[0].of_operators.items())) if forced else ()


_environment: list[tuple[str, ...]] = []  # read once; torch.compile traces no cache of functools


def _forced_by_environment() -> tuple[str, ...]:
    names = os.environ.get(VARIABLE)
    return _known(tuple(name.strip() for name in names.split(","))) if names else ()


def is_reference(operator: str) -> bool:
    """Whether torch's own results are asked for, and so no algebra of ours."""
    return forced_backends(operator) == ("reference",)


def _known(backends: tuple[str, ...]) -> tuple[str, ...]:
    if not backends:
        raise ValueError(f"name a backend at least: {', '.join(PREFERENCE)}")
    for backend in backends:
        if backend not in PREFERENCE:
            raise ValueError(f"no backend {backend!r}: choose one of {', '.join(PREFERENCE)}")
    return backends


def call(operator: str, direction: str, *args: Any) -> Any:
    """Runs the launcher of an operator on the backend that serves these arguments.

    Args:
        operator: a key of `TABLE`.
        direction: "fwd" or "bwd".
        *args: of the launcher.
    """
    return _launcher(select(operator, direction, args), operator, direction)(*args)


def select(operator: str, direction: str, args: tuple[Any, ...]) -> str:
    """The backend that serves a call.

    Args:
        operator: a key of `TABLE`.
        direction: "fwd" or "bwd".
        args: of the launcher; the first tensor decides.

    Raises:
        BackendError: none of the forced backends can.
    """
    forced = forced_backends(operator)
    key = _key(args)
    for backend, limits in _able(operator, key, forced):
        reason = _broken(limits, operator, direction, args, key)
        if reason is None:
            return backend
        _tell_once(operator, backend, (reason,))
    attempt = f"on the forced backend {' or '.join(forced)}" if forced else "on any backend"
    reasons_of_all = _describe(operator, args, direction)
    raise BackendError(f"{operator} cannot run {attempt}:\n{reasons_of_all}")


@functools.cache
def _able(
    operator: str, key: _Key, forced: tuple[str, ...]
) -> tuple[tuple[str, tuple[Limit, ...]], ...]:
    """Backends that serve calls of this key, in the order to try, each with its limits."""
    able = []
    order = _order(operator, key, forced)
    for backend in order:
        reasons = _refusals(operator, backend, key)
        if not reasons:
            able.append((backend, _limits(operator, backend, forced)))
        elif len(order) > 1:
            _tell_once(operator, backend, reasons)
    return tuple(able)


def _limits(operator: str, backend: str, forced: tuple[str, ...]) -> tuple[Limit, ...]:
    row = TABLE[operator][backend]
    both = (row.limit, None if forced else row.yields)
    return tuple(limit for limit in both if limit is not None)


def _broken(
    limits: tuple[Limit, ...], operator: str, direction: str, args: tuple[Any, ...], key: _Key
) -> str | None:
    """The first limit that a call does not keep, as a reason."""
    if not limits:
        return None
    named = dict(zip(ARGUMENTS[operator][direction], args, strict=False))
    reasons = (limit(direction, named, key.compute_capability) for limit in limits)
    return next((reason for reason in reasons if reason is not None), None)


def explain(operator: str, *tensors: torch.Tensor) -> str:
    """Says which backend serves an operator on these tensors, and why the others do not.

    Args:
        operator: its name, as in `tiue_kernels.functional`.
        *tensors: as the call would be given them; the first decides.

    Returns:
        One line a backend.

    Raises:
        ValueError: there is no such operator.
    """
    if operator in TABLE:
        return _describe(operator, tensors)
    if operator not in MADE_OF:
        known = ", ".join(sorted((*TABLE, *MADE_OF)))
        raise ValueError(f"no operator {operator!r}: choose one of {known}")
    parts = MADE_OF[operator]
    if not parts:
        return "  made of torch's own operators"
    return "\n".join(f"  made of {part}:\n{_describe(part, tensors)}" for part in parts)


def operators() -> tuple[str, ...]:
    """Every operator that `explain` knows, by name."""
    return tuple(sorted((*TABLE, *MADE_OF)))


def _describe(operator: str, args: tuple[Any, ...], direction: str | None = None) -> str:
    key = _key(args)
    forced = forced_backends(operator)
    order = _order(operator, key, forced)
    lines, chosen = [], False
    for backend in dict.fromkeys((*order, *PREFERENCE)):
        reasons = list(_refusals(operator, backend, key))
        if direction is not None and not reasons:
            limits = _limits(operator, backend, forced)
            reason = _broken(limits, operator, direction, args, key)
            reasons = [reason] if reason else []
        if not reasons and backend not in order:
            reasons = [f"tensors on a CPU take {' or '.join(ON_CPU)}"]
            if forced:
                reasons = [f"{' or '.join(forced)} is forced"]
        if not reasons:
            reasons = ["may run" if chosen else "runs"]
            chosen = True
        lines.append(f"  {backend}: {'; '.join(reasons)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Key:
    device: str
    dtype: torch.dtype
    layout: str
    compute_capability: tuple[int, int]
    interpreted: bool


def _key(args: tuple[Any, ...]) -> _Key:
    for tensor in args:
        if isinstance(tensor, torch.Tensor):
            break
    device = tensor.device
    layout = "contiguous"
    if (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        layout = "channels_last"
    return _key_of(device, tensor.dtype, layout)


@functools.cache
def _key_of(device: torch.device, dtype: torch.dtype, layout: str) -> _Key:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _Key(device.type, dtype, layout, capability, interpreted)


def _order(operator: str, key: _Key, forced: tuple[str, ...]) -> tuple[str, ...]:
    """Backends in the order in which to try them: those forced, or those of the row."""
    if forced and set(TABLE[operator]) <= set(ON_CPU):
        return tuple(dict.fromkeys((*forced, "reference")))  # on a GPU it is torch's own always
    if forced:
        return forced
    able = ON_CPU if key.device != "cuda" else PREFERENCE
    return tuple(backend for backend in TABLE[operator] if backend in able)


@functools.cache
def _refusals(operator: str, backend: str, key: _Key) -> tuple[str, ...]:
    """Every reason why a backend does not serve calls of this key; none: it does."""
    capability = TABLE[operator].get(backend)
    if capability is None:
        return ("not implemented",)
    reasons = []
    if key.dtype not in capability.dtypes:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in capability.dtypes)
        reasons.append(f"{key.dtype} is not one of {', '.join(names)}")
    if key.layout not in capability.layouts:
        reasons.append(f"{key.layout} maps are not supported")
    if backend != "reference":
        reasons.extend(_missing(backend, operator, key))
    reason = capability.missing() if capability.missing is not None and not reasons else None
    if reason is not None:
        reasons.append(reason)
    least = capability.compute_capability
    if key.device == "cuda" and key.compute_capability < least:
        found = ".".join(map(str, key.compute_capability))
        reasons.append(f"needs compute capability {least[0]}.{least[1]}, the device has {found}")
    return tuple(reasons)


def _missing(backend: str, operator: str, key: _Key) -> list[str]:
    """What of the installation or the device a compiled backend misses."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return ["triton is not installed: pip install triton"]
        if key.device == "cpu" and not key.interpreted:
            return ["on a CPU it needs TRITON_INTERPRET=1, set before Python starts"]
        if key.device not in ("cpu", "cuda"):
            return [f"no kernels for {key.device} tensors"]
        return []
    if backend == "cpu":
        return [] if key.device == "cpu" else ["its kernels are for tensors on a CPU"]
    from tiue_kernels import cuda

    reason = cuda.why_not(operator, key.device)
    return [reason] if reason else []


@functools.cache
def _launcher(backend: str, operator: str, direction: str) -> Callable[..., Any]:
    name = f"{operator}_{direction}"
    if backend == "cuda":  # its launchers are C++
        return getattr(torch.ops.tiue_cuda, name).default
    return getattr(importlib.import_module(f"tiue_kernels.{backend}.{operator}"), name)


@functools.cache
def _tell_once(operator: str, backend: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s does not run on %s: %s. Said once.", operator, backend, "; ".join(reasons))


def reset() -> None:
    """Forgets every choice; for use after a library was loaded or the environment changed."""
    for remembered in (_able, _refusals, _key_of):
        remembered.cache_clear()
    _environment.clear()
