"""Which implementation of an operator runs: CUDA C++, Triton, the CPU library or reference.

Tensors take the first backend of `PREFERENCE` that the table, the installation and the device
allow, those on a CPU the first of `ON_CPU`. `use_backend` or the environment variable
TIUE_BACKEND forces one, or an order of several; a call that none of them can serve raises with
every reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Capability:
    """What one backend's implementation of one operator takes.

    Attributes:
        dtypes: of the data tensors; parameters of a norm may be of another floating type.
        layouts: memory formats that are read in place. Others are copied first.
        compute_capability: the least that a GPU needs, (0, 0) where the backend needs no GPU.
        limit: (arguments of the call, compute capability of the device, (0, 0) for a CPU) to the
            reason why not, or None; forward and backward arguments both.
    """

    dtypes: frozenset[torch.dtype] = HALF_AND_SINGLE
    layouts: frozenset[str] = LAYOUTS
    compute_capability: tuple[int, int] = (8, 0)
    limit: Callable[[tuple[Any, ...], tuple[int, int]], str | None] | None = None


def block_memory(compute_capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have (CUDA Programming Guide, table of limits)."""
    if compute_capability in ((8, 0), (8, 7)):
        return 163 << 10
    return (227 if compute_capability[0] in (9, 10, 11) else 99) << 10


def _head_sizes(
    most_in_99_kib: dict[int, int],
) -> Callable[[tuple[Any, ...], tuple[int, int]], str | None]:
    """The limit of attention.

    Args:
        most_in_99_kib: bytes of an element to the largest head whose backward pass a block with
            that little memory holds; every forward pass fits.
    """

    def limit(args: tuple[Any, ...], compute_capability: tuple[int, int]) -> str | None:
        is_backward = isinstance(args[3], torch.Tensor)
        query = args[1] if is_backward else args[0]
        num_heads = next(arg for arg in args if isinstance(arg, int))
        size = query.shape[2] // num_heads
        if size % 8 or size > 256:
            return f"head size {size} is no multiple of 8 up to 256"
        has_little = compute_capability > (0, 0) and block_memory(compute_capability) <= 99 << 10
        if is_backward and has_little and size > most_in_99_kib[query.element_size()]:
            return (
                f"the backward pass of head size {size} needs more than the 99 KiB of shared "
                "memory that a block has on this device"
            )
        return None

    return limit


def _forward_without_bias(args: tuple[Any, ...], compute_capability: tuple[int, int]) -> str | None:
    """The limit of attention on a CPU."""
    if isinstance(args[3], torch.Tensor):
        return "there is no backward pass"
    *_, attention_bias = args
    return None if attention_bias is None else "attention_bias is not supported"


_ANYWHERE = Capability(dtypes=ANY_FLOAT, compute_capability=(0, 0))
_KERNEL = Capability()

# operator -> backend -> what it takes; a backend that is absent has no implementation.
TABLE: dict[str, dict[str, Capability]] = {
    "shared_skip_group_norm_silu": {"cuda": _KERNEL, "triton": _KERNEL, "reference": _ANYWHERE},
    "broadcast_add_group_norm_silu": {"triton": _KERNEL, "reference": _ANYWHERE},
    "timestep_sum_group_norm_silu": {"triton": _KERNEL, "reference": _ANYWHERE},
    "cross_timestep_attention": {
        "cuda": Capability(limit=_head_sizes({2: 160, 4: 160})),
        # 100 KiB from head size 200 on.
        "triton": Capability(limit=_head_sizes({2: 192, 4: 256})),
        "cpu": Capability(
            dtypes=frozenset({torch.float32}),
            compute_capability=(0, 0),
            limit=_forward_without_bias,
        ),
        "reference": _ANYWHERE,
    },
    "geglu": {"triton": _KERNEL, "reference": _ANYWHERE},
    "one_pass_combine": {"triton": _KERNEL, "reference": _ANYWHERE},
    "noise_kl": {"triton": _KERNEL, "reference": _ANYWHERE},
    # cuDNN's convolutions, in the phase form of the reference.
    "upsample_conv2d": {"reference": _ANYWHERE},
}


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one `with` block forces; equal to itself alone."""

    backends: tuple[str, ...]


_forced: list[_Entry] = []


@contextmanager
def use_backend(*backends: str) -> Iterator[None]:
    """Forces a backend for every operator called inside, backward passes inside included.

    Of several, each call takes the first that can serve it: `use_backend("cuda", "reference")`
    leaves to plain PyTorch what has no CUDA C++ kernel. Holds for the whole process, since
    autograd runs backward in threads of its own; of blocks that overlap in several threads the
    one entered last counts, until it is left.

    Args:
        *backends: "cuda", "triton", "cpu" or "reference", in the order in which to try them.

    Raises:
        ValueError: there is no such backend, or none is named.
        BackendError: from an operator called inside which none of the backends can serve.
    """
    entry = _Entry(_known(backends))
    _forced.append(entry)
    try:
        yield
    finally:
        _forced.remove(entry)  # its own, which another thread's may have followed


def forced_backends() -> tuple[str, ...]:
    """What `use_backend` or, outside of it, TIUE_BACKEND forces, in order; empty: nothing."""
    forced = _forced[-1:]  # in one step: another thread may take the last one out
    if forced:
        return forced[0].backends
    names = os.environ.get(VARIABLE)
    return _known(tuple(name.strip() for name in names.split(","))) if names else ()


def _known(backends: tuple[str, ...]) -> tuple[str, ...]:
    if not backends:
        raise ValueError(f"name a backend at least: {', '.join(PREFERENCE)}")
    for backend in backends:
        if backend not in PREFERENCE:
            raise ValueError(f"no backend {backend!r}: choose one of {', '.join(PREFERENCE)}")
    return backends


def call(name: str, *args: Any) -> Any:
    """Runs `<op>_fwd` or `<op>_bwd` on the backend that serves these arguments."""
    operator = name.rpartition("_")[0]
    backend = select(operator, args)
    return _launcher(backend, operator, name)(*args)


def select(operator: str, args: tuple[Any, ...]) -> str:
    """The backend that serves a call.

    Args:
        operator: a key of `TABLE`.
        args: of the forward or the backward launcher; the first tensor decides.

    Raises:
        BackendError: none of the forced backends can.
    """
    forced = forced_backends()
    key = _key(args)
    order = forced or _candidates(operator, key)
    for backend in order:
        reasons = _refusals(operator, backend, key) or _limits(operator, backend, key, args)
        if not reasons:
            return backend
        if len(order) > 1:
            _tell_once(operator, backend, reasons)
    attempt = f"on the forced backend {' or '.join(forced)}" if forced else "on any backend"
    reasons_of_all = _describe(operator, args, is_call=True)
    raise BackendError(f"{operator} cannot run {attempt}:\n{reasons_of_all}")


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
    if operator not in TABLE:
        raise ValueError(f"no operator {operator!r}: choose one of {', '.join(TABLE)}")
    return _describe(operator, tensors)


def _describe(operator: str, args: tuple[Any, ...], is_call: bool = False) -> str:
    key = _key(args)
    forced = forced_backends()
    order = forced or _candidates(operator, key)
    lines, chosen = [], False
    for backend in dict.fromkeys((*order, *PREFERENCE)):
        reasons = list(_refusals(operator, backend, key))
        if not reasons and is_call:
            reasons = list(_limits(operator, backend, key, args))
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
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    capability = (0, 0)
    if tensor.is_cuda:
        capability = torch.cuda.get_device_capability(tensor.device)
    layout = "contiguous"
    if (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        layout = "channels_last"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _Key(tensor.device.type, tensor.dtype, layout, capability, interpreted)


def _candidates(operator: str, key: _Key) -> tuple[str, ...]:
    """Backends in the order in which an automatic choice tries them."""
    order = ON_CPU if key.device != "cuda" else PREFERENCE
    return tuple(backend for backend in order if backend in TABLE[operator])


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
    least = capability.compute_capability
    if key.device == "cuda" and key.compute_capability < least:
        found = ".".join(map(str, key.compute_capability))
        reasons.append(f"needs compute capability {least[0]}.{least[1]}, the device has {found}")
    return tuple(reasons)


def _limits(operator: str, backend: str, key: _Key, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Why a backend does not take these arguments, though it takes their dtype and layout."""
    limit = TABLE[operator][backend].limit
    reason = limit(args, key.compute_capability) if limit is not None else None
    return (reason,) if reason else ()


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
        from tiue_kernels import cpu

        if key.device != "cpu":
            return ["its kernels are for tensors on a CPU"]
        reason = cpu.why_no_products()
        return [reason] if reason else []
    from tiue_kernels import cuda

    reason = cuda.why_not(operator, key.device)
    return [reason] if reason else []


@functools.cache
def _launcher(backend: str, operator: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"tiue_kernels.{backend}.{operator}"), name)


@functools.cache
def _tell_once(operator: str, backend: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s does not run on %s: %s. Said once.", operator, backend, "; ".join(reasons))


def reset() -> None:
    """Forgets every choice; for use after a library was loaded or the environment changed."""
    _refusals.cache_clear()
