"""What an operator is: one declaration, which torch's library, autograd, export and dispatch read.

A backward operator's arguments are the forward's inputs and outputs by name, `grad_<output>`
(`grads_<output>` of a list), and one bool, or list of bools, that says which gradients are wanted;
its results are called `grad_<input>`. So autograd and the fake of backward follow from the schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tiue_kernels import dispatch
from tiue_kernels.dispatch import Capability
from tiue_kernels.layout import memory_format
from tiue_kernels.recording import recording

Run = Callable[..., Any]

LIBRARY = torch.library.Library("tiue", "DEF")
# Every device, below autograd.
_ANY = "CompositeExplicitAutograd"


@dataclass(frozen=True)
class Operator:
    """An operator's declaration, as others read it.

    Attributes:
        forward: `torch.ops.tiue.<name>_fwd`.
        backward: `torch.ops.tiue.<name>_bwd`.
        schemas: direction to "(arguments) -> (results)".
        launchers: direction to what runs below autograd and torch's library.
        decomposition: forward in torch's own operators, for programs that leave this package.
    """

    forward: Any
    backward: Any
    schemas: Mapping[str, str]
    launchers: Mapping[str, Run]
    decomposition: Run


OPERATORS: dict[str, Operator] = {}


def declare(
    name: str,
    forward: str,
    backward: str,
    *,
    fake: Run,
    decomposition: Run,
    kernels: Mapping[str, Capability] | None = None,
    run: tuple[Run, Run] | None = None,
    made_of: tuple[str, ...] = (),
    reference: Run | None = None,
    wanted: Sequence[tuple[str, ...]] = (),
    fake_backward: Run | None = None,
) -> tuple[Run, Run]:
    """Declares `tiue::<name>_fwd` and `tiue::<name>_bwd`.

    Args:
        name: the operator's, as in `tiue_kernels.functional`.
        forward: schema of forward, every result named.
        backward: schema of backward, every result named.
        fake: forward's results without data: shapes, dtypes and memory formats.
        decomposition: forward in torch's operators; none writes in place, and nothing depends on
            the sizes of a map.
        kernels: backend to what its launchers take, in the order of preference; launchers are
            `<backend>.<name>.<name>_fwd` and `_bwd`.
        run: forward and backward as compositions, of an operator without kernels.
        made_of: the operators that those are made of, torch's own apart.
        reference: what a composition is where torch's own results are asked for; by default the
            composition, over operators that then run as torch's own themselves.
        wanted: for each bool of backward the inputs of which any needs its gradient.
        fake_backward: by default, empty gradients for the inputs, shape (0,) where not wanted.

    Returns:
        The operators as functions: without autograd and torch's library where neither has to
        know.
    """
    schemas = {"fwd": forward, "bwd": backward}
    parsed = {d: torch._C.parse_schema(f"tiue::{name}_{d}{schemas[d]}") for d in schemas}
    if kernels is not None:
        dispatch.TABLE[name] = dict(kernels)
        dispatch.ARGUMENTS[name] = {
            d: tuple(arg.name for arg in parsed[d].arguments) for d in schemas
        }
    else:
        dispatch.MADE_OF[name] = made_of
    plan = _Plan(parsed["fwd"], parsed["bwd"], wanted)
    runs = dict(zip(schemas, run or (), strict=False))
    if reference is not None:
        runs["fwd"] = partial(_composition, name, runs["fwd"], reference)
    fakes = {"fwd": fake, "bwd": fake_backward or plan.fake}
    entries: list[tuple[Any, Run]] = []
    launchers: dict[str, Run] = {}
    for direction, pretend in fakes.items():
        full = f"{name}_{direction}"
        launchers[direction] = runs.get(direction) or partial(dispatch.call, name, direction)
        launch = partial(_outside_of_autocast, launchers[direction])
        LIBRARY.define(full + schemas[direction])
        LIBRARY.impl(full, launch, _ANY)
        torch.library.register_fake(f"tiue::{full}", pretend, lib=LIBRARY)
        entries.append((getattr(torch.ops.tiue, full).default, launch))
    (forward_op, _), (backward_op, _) = entries
    torch.library.register_autograd(
        f"tiue::{name}_fwd",
        partial(_once, name, partial(plan.backward, backward_op)),
        setup_context=plan.setup_context,
        lib=LIBRARY,
    )
    OPERATORS[name] = Operator(forward_op, backward_op, schemas, launchers, decomposition)
    return partial(_enter, *entries[0]), partial(_enter, *entries[1])


def _enter(operator: Any, launch: Run, *args: Any) -> Any:
    """Runs an operator, through torch's library where autograd or a tracer must see it."""
    if torch.compiler.is_compiling():
        return operator(*args)
    records, traced = torch.is_grad_enabled(), _is_traced()
    for arg in args:
        for tensor in arg if type(arg) is list else (arg,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if records and tensor.requires_grad:
                with recording():
                    return operator(*args)
            traced = traced or type(tensor) not in _DENSE or tensor.is_meta
    return operator(*args) if traced else launch(*args)


def _is_traced() -> bool:
    """Whether a mode, a transform or a profiler has to see operators."""
    return (
        torch.autograd.profiler._is_profiler_enabled
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


_DENSE = (torch.Tensor, torch.nn.Parameter)


def _once(name: str, backward: Run, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Runs backward; with `create_graph`, gradients that say so when they are differentiated."""
    if not torch.is_grad_enabled():
        return backward(ctx, *grads)
    with torch.no_grad():
        gradients = backward(ctx, *grads)
    tensors = [gradient for gradient in _flat(gradients) if gradient is not None]
    said = f"tiue::{name} has no second derivative: take torch's own operators where one is needed"
    mark_all = torch._C._functions.DelayedError(said.encode(), len(tensors))
    made = mark_all(*(tensor.detach().requires_grad_() for tensor in tensors))
    marked = iter(made if isinstance(made, tuple) else (made,))

    def mark(gradient: Any) -> Any:
        if isinstance(gradient, list):
            return [mark(entry) for entry in gradient]
        return None if gradient is None else next(marked)

    return tuple(mark(gradient) for gradient in gradients)


def _composition(name: str, run: Run, reference: Run, *args: Any) -> Any:
    return reference(*args) if dispatch.is_reference(name) else run(*args)


def _outside_of_autocast(run: Run, *args: Any) -> Any:
    """Runs a launcher with autocast off: the functional layer has settled every dtype."""
    device = _device_of(args)
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return run(*args)
    with torch.autocast(device, enabled=False):
        return run(*args)


def _device_of(args: Sequence[Any]) -> str:
    """The kind of device that the first tensor lies on."""
    for arg in args:
        for tensor in arg if type(arg) is list else (arg,):
            if isinstance(tensor, torch.Tensor):
                return tensor.device.type
    raise TypeError("an operator takes a tensor at least")


def _flat(args: Sequence[Any]) -> list[Any]:
    return [entry for arg in args for entry in (arg if isinstance(arg, list) else [arg])]


class _Plan:
    """How the arguments of backward come from those of forward, and its results go back.

    Args:
        forward: the parsed schema.
        backward: likewise.
        wanted: as `declare`.
    """

    def __init__(self, forward: Any, backward: Any, wanted: Sequence[tuple[str, ...]]) -> None:
        self.inputs = [arg.name for arg in forward.arguments]
        self.lists = [arg.name for arg in forward.arguments if str(arg.type) == "List[Tensor]"]
        outputs = [result.name for result in forward.returns]
        self.arguments = [arg.name for arg in backward.arguments]
        self.results = [result.name.removeprefix("grad_") for result in backward.returns]
        self.wanted = [tuple(map(self.inputs.index, names)) for names in wanted]
        self.group = {name: n for n, names in enumerate(wanted) for name in names}
        # Where each argument of backward comes from: a kind and a position.
        self.sources: list[tuple[str, int]] = []
        is_list = False
        for arg in backward.arguments:
            gradient = arg.name.removeprefix("grad_").removeprefix("grads_")
            if arg.name in self.inputs:
                self.sources.append(("input", self.inputs.index(arg.name)))
            elif arg.name in outputs:
                self.sources.append(("output", outputs.index(arg.name)))
            elif gradient in outputs:
                self.sources.append(("gradient", outputs.index(gradient)))
                is_list |= arg.name.startswith("grads_")
            else:
                self.sources.append(("bool" if str(arg.type) == "bool" else "mask", 0))
        # One gradient alone is there whenever backward runs; others become zeros of their size.
        self.materialize = is_list or [kind for kind, _ in self.sources].count("gradient") > 1

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(self.materialize)
        kept: list[Any] = []
        tensors: list[Any] = []
        for kind, index in self.sources:
            value = {"input": inputs, "output": outputs}.get(kind, (None,) * (index + 1))[index]
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
                kept.append(len(value))  # the number of tensors of a list
                tensors.extend(value)
            elif isinstance(value, torch.Tensor):
                kept.append(_ONE)
                tensors.append(value)
            else:
                kept.append((value,))
        ctx.kept = kept
        ctx.save_for_backward(*tensors)

    def backward(self, operator: Any, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args: list[Any] = []
        needs = list(ctx.needs_input_grad)
        for (kind, index), kept in zip(self.sources, ctx.kept, strict=True):
            if kind == "gradient":
                args.append(grads[index])
            elif kept is _ONE:
                args.append(next(saved))
            elif isinstance(kept, int):
                args.append([next(saved) for _ in range(kept)])
                # torch says of a list as a whole only that it is one.
                needs[index] = any(tensor.requires_grad for tensor in args[-1])
            else:
                args.append(kept[0])
        mask = [any(needs[index] for index in group) for group in self.wanted]
        for place, (kind, _) in enumerate(self.sources):
            if kind in ("bool", "mask"):
                args[place] = mask if kind == "mask" else mask[0]
        results = operator(*args)
        results = results if isinstance(results, tuple) else (results,)
        by_name = dict(zip(self.results, results, strict=True))
        gradients: list[Any] = []
        for name, needed in zip(self.inputs, needs, strict=True):
            gradient = by_name.get(name) if needed else None
            if gradient is None and name in self.lists:
                kept = ctx.kept[self.arguments.index(name)]
                gradient = [None] * (kept if type(kept) is int else 0)
            gradients.append(gradient)
        return tuple(gradients)

    def fake(self, *args: Any) -> Any:
        named = dict(zip(self.arguments, args, strict=True))
        tensors = [tensor for tensor in _flat(args) if isinstance(tensor, torch.Tensor)]
        maps = [
            tensor
            for name, tensor in named.items()
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and "grad" not in name
        ]
        mask = next(
            (a for a, (kind, _) in zip(args, self.sources, strict=True) if kind in _WANTED), None
        )
        mask = [mask] if isinstance(mask, bool) else mask
        results: list[Any] = []
        for name in self.results:
            value = named.get(name)
            is_wanted = mask is None or name not in self.group or mask[self.group[name]]
            if isinstance(value, list):
                results.append([entry.new_empty(entry.shape) for entry in value if is_wanted])
            elif name == "bias" and value is None:
                results.append(named["weight"].new_empty(named["weight"].shape[0] * is_wanted))
            elif value is None or not is_wanted:
                results.append(tensors[0].new_empty(0))
            elif value.ndim == 4:
                rows_format = value if name == "weight" else maps[0]
                results.append(rows_like(rows_format, *value.shape, dtype=value.dtype))
            else:
                results.append(value.new_empty(value.shape))
        return tuple(results) if len(results) > 1 else results[0]


_ONE = object()
_WANTED = ("bool", "mask")


def rows_like(rows: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty map of another shape, in the memory format and, by default, the dtype of `rows`."""
    return torch.empty(
        shape, dtype=dtype or rows.dtype, device=rows.device, memory_format=memory_format(rows)
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
