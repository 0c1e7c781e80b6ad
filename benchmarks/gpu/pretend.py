"""A GPU that is not there: fake tensors on "cuda", and Triton launches that are recorded, not made.

What a pass would launch on a GPU follows from its code and the shapes alone. Inside `PretendGpu`
the package takes the way that it takes on an NVIDIA GPU: operators run their launchers, launchers
plan and launch, and each launch and each of torch's operators is noted with the bytes of its
tensors. Nothing is computed, no driver is touched.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiue_kernels.cuda
from testing.problem import size
from tiue_kernels import dispatch
from tiue_kernels.ops._library import OPERATORS

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
MULTIPROCESSORS = 132

aten = torch.ops.aten


class CudaError(RuntimeError):
    """What torch would raise on a GPU and not on a CPU."""


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: Torch's operator, or the Triton kernel's name.
        kind: One of `KINDS`, or the operator of this package that a kernel belongs to.
        read: Bytes of its inputs, each once.
        written: Bytes of its outputs.
    """

    name: str
    kind: str
    read: int
    written: int


# What torch's operators launch on a GPU: the kind, and how many kernels where it is not one.
KINDS: dict[str, tuple[Any, ...]] = {
    "product": (aten.mm, aten.addmm, aten.bmm, aten.baddbmm),
    "attention": (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_efficient_attention,
    ),
    "norm": (aten.native_group_norm, aten.native_layer_norm),
    "copy": (
        *(aten.clone, aten.copy_, aten._to_copy, aten.cat, aten.stack),
        *(aten.repeat, aten.constant_pad_nd),
    ),
    "upsampling": (aten.upsample_nearest2d,),
    "reduction": (aten.sum, aten.mean, aten.var),
}
_KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators}
ELEMENTWISE = "elementwise"
# Allocates, or looks at what is there; no kernel.
_FREE = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.lift_fresh, aten._reshape_alias),
}


class PretendGpu(TorchDispatchMode):
    """Records what would be launched inside; tensors made inside are fake.

    Use as a context, with `torch.no_grad()` inside: forward passes at inference.

    Attributes:
        launches: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._operator: str | None = None
        self._stack: list[ExitStack] = []

    def __enter__(self) -> PretendGpu:
        with ExitStack() as stack:
            if not self._stack:
                stack.enter_context(_pretended(self._record_triton))
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            super().__enter__()
            stack.push(super().__exit__)
            self._stack.append(stack.pop_all())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.pop().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tiue":
            return self._expand(func, args, kwargs)
        if func.namespace != "aten":  # asks for a device
            return func(*args, **kwargs)
        if func._overloadpacket not in _KIND_OF and func._can_decompose():
            with self:  # below autograd composite operators arrive whole
                return func.decompose(*args, **kwargs)
        if func._overloadpacket is aten.convolution:
            return self._convolution(*args)
        if func._overloadpacket is aten.native_group_norm and not args[0].is_contiguous():
            raise CudaError("native_group_norm takes contiguous maps alone")
        out = func(*args, **kwargs)
        self._record_torch(func, args, kwargs, out)
        return out

    def _convolution(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any
    ) -> torch.Tensor:
        """cuDNN's kernel in one memory format for all; torch adds the bias to what it wrote."""
        layouts = {suggest_memory_format(x), suggest_memory_format(weight)}
        layout = torch.channels_last if torch.channels_last in layouts else torch.contiguous_format
        for tensor in (x, weight):
            if not tensor.is_contiguous(memory_format=layout):
                self._add("contiguous", "copy", _touched(tensor), size(tensor))
        out = aten.convolution.default(x, weight, bias, *args)
        out = torch.empty_like(out, memory_format=layout)
        self._add("convolution", "convolution", size(x) + size(weight), size(out))
        if bias is not None:
            self._add("add_bias", "convolution bias", size(out) + size(bias), size(out))
        return out

    def _expand(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the dispatcher would call for a CUDA tensor, recorded in its turn."""
        outer = self._operator
        self._operator = func._opname.rpartition("_")[0]
        try:
            with self:
                return _implementation(func)(*args, **kwargs)
        finally:
            self._operator = outer

    def _record_torch(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        operator, name = func._overloadpacket, func._opname
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _on_gpu(leaf)]
        outputs = [leaf for leaf in tree_leaves(out) if _on_gpu(leaf)]
        if operator in _FREE or not outputs or _is_view(func, inputs, outputs):
            return
        read, written = sum(map(_touched, _distinct(inputs))), sum(map(_touched, outputs))
        kind = _KIND_OF.get(operator, ELEMENTWISE)
        if operator is aten.native_group_norm:
            # Moments; scale and shift of each channel; one pass that applies them.
            parameters, stats = read - _touched(args[0]), written - _touched(outputs[0])
            table = 2 * 4 * args[0].shape[0] * args[0].shape[1]
            self._add("group_norm_moments", kind, _touched(args[0]), stats)
            self._add("group_norm_parameters", kind, stats + parameters, table)
            self._add("group_norm_apply", kind, _touched(args[0]) + table, _touched(outputs[0]))
        elif operator is aten.constant_pad_nd:
            self._add("fill", kind, 0, written)
            self._add(name, kind, read, read)
        elif operator in (aten.copy_, aten.fill_, aten.zero_):
            self._add(name, "copy", read - _touched(args[0]), written)
        else:
            self._add(name, kind, read, written)

    def _record_triton(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        reads, writes = pointers_touched(kernel, named)
        sizes = {
            name: _touched(value)
            for name, value in named.items()
            if isinstance(value, torch.Tensor)
        }
        read, written = (
            sum(count for name, count in sizes.items() if name in names)
            for names in (reads, writes)
        )
        self._add(kernel.fn.__name__, self._operator or "own kernel", read, written)

    def _add(self, name: str, kind: str, read: int, written: int) -> None:
        self.launches.append(Launch(name, kind, read, written))


@contextmanager
def _pretended(record: Callable[..., None]) -> Iterator[None]:
    """Torch and Triton as on a machine with an H100 and without the compiled library."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(kwargs)
        if math.prod(grid):
            record(kernel, args, kwargs)

    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=MULTIPROCESSORS,
    )
    with ExitStack() as stack:
        for target, name, value in (
            (torch.version, "cuda", "13.0"),
            (torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "get_device_name", lambda *_: properties.name),
            (torch.cuda, "device", lambda *_: nullcontext()),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (tiue_kernels.cuda, "_why_not", "left out of the count"),
            (F, "scaled_dot_product_attention", _scaled_dot_product_attention),
            # Torch's own ask a CUDA build for the device, even for a fake tensor.
            (FakeTensor, "contiguous", _contiguous),
            (FakeTensor, "__getitem__", _get_item),
            (FakeTensor, "__setitem__", lambda x, index, value: _copy(_get_item(x, index), value)),
            (FakeTensor, "copy_", _copy),
            (JITFunction, "run", run),
            (InterpretedFunction, "run", run),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        dispatch.reset()
        stack.callback(dispatch.reset)
        yield


def _copy(x: torch.Tensor, value: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return aten.copy_.default(x, value, non_blocking)


def _contiguous(
    x: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    dense = x.is_contiguous(memory_format=memory_format)
    return x if dense else x.clone(memory_format=memory_format)


def _get_item(x: torch.Tensor, index: Any) -> torch.Tensor:
    """x[index] of numbers, slices, None and Ellipsis, as the views that they are."""
    entries = index if isinstance(index, tuple) else (index,)
    named = sum(entry is not None and entry is not Ellipsis for entry in entries)
    axis = 0
    for entry in entries:
        if entry is None:
            x = x.unsqueeze(axis)
        elif isinstance(entry, int):
            x = aten.select.int(x, axis, entry)
            axis -= 1
        elif isinstance(entry, slice):
            x = aten.slice.Tensor(x, axis, entry.start, entry.stop, entry.step or 1)
        elif entry is Ellipsis:
            axis = x.ndim - named - 1
        else:
            raise NotImplementedError(f"indexing with a {type(entry).__name__} is not counted")
        axis += 1
        named -= entry is not None and entry is not Ellipsis
    return x


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The choice that torch makes on an H100: flash for half types without a mask."""
    assert not enable_gqa
    assert not dropout_p
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, False, 0.0, is_causal, scale=scale
    )[0]


def _implementation(operator: Any) -> Callable[..., Any]:
    """What the library runs for one of its operators, whatever the device."""
    name, _, direction = operator._opname.rpartition("_")
    return OPERATORS[name].launchers[direction]


def _on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Without those that are passed twice."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_view(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether an operator only looks at its input in another way."""
    if func._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded axis is read once."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n if stride else min(n, 1) for n, stride in extents)


@dataclass
class _Touched:
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)


def pointers_touched(kernel: Any, arguments: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Which pointers of a Triton kernel it reads and which it writes, by its source.

    Args:
        kernel: What `triton.jit` gave.
        arguments: By name; branches on constants among them are decided.

    Returns:
        Names of parameters that end in "ptr".
    """
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    touched = _touched_by(kernel, tuple(sorted(constants.items())))
    return touched.reads, touched.writes


@functools.cache
def _touched_by(kernel: Any, constants: tuple[tuple[str, Any], ...]) -> _Touched:
    own = {name: {name} for name in kernel.arg_names if name.endswith("ptr")}
    touched = _Touched()
    _walk(_body(kernel.fn), kernel.fn.__globals__, dict(constants), own, touched)
    return touched


@functools.cache
def _body(function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _walk(
    node: ast.AST,
    names: dict[str, Any],
    constants: dict[str, Any],
    pointers: dict[str, set[str]],
    touched: _Touched,
) -> None:
    """Follows pointers through assignments and calls; `pointers` maps names to parameters."""
    if isinstance(node, ast.If):
        _walk(node.test, names, constants, pointers, touched)
        decided = _decide(node.test, constants)
        before = dict(pointers)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            if decided is not None and bool(decided) != wanted:
                continue
            after = dict(before)
            for child in branch:
                _walk(child, names, constants, after, touched)
            for name, found in after.items():
                pointers[name] = pointers.get(name, set()) | found
        return
    for child in ast.iter_child_nodes(node):
        _walk(child, names, constants, pointers, touched)
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found = _pointers_of(node.value, pointers)
        for target in targets:
            if isinstance(target, ast.Name) and (found or target.id in pointers):
                kept = pointers.get(target.id, set()) if isinstance(node, ast.AugAssign) else set()
                pointers[target.id] = kept | found
    elif isinstance(node, ast.Call):
        _call(node, names, constants, pointers, touched)


def _call(
    node: ast.Call,
    names: dict[str, Any],
    constants: dict[str, Any],
    pointers: dict[str, set[str]],
    touched: _Touched,
) -> None:
    called = ast.unparse(node.func)
    if called.startswith("tl.") and node.args:
        found = _pointers_of(node.args[0], pointers)
        if called == "tl.load" or called.startswith("tl.atomic"):
            touched.reads |= found
        if called == "tl.store" or called.startswith("tl.atomic"):
            touched.writes |= found
        return
    helper = names.get(called)
    if not hasattr(helper, "arg_names"):
        return
    passed = dict(zip(helper.arg_names, node.args, strict=False))
    passed |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    inner = {name: found for name, arg in passed.items() if (found := _pointers_of(arg, pointers))}
    known = {
        name: value
        for name, arg in passed.items()
        if (value := _decide(arg, constants)) is not None
    }
    _walk(_body(helper.fn), helper.fn.__globals__, known, inner, touched)


def _pointers_of(node: ast.AST, pointers: dict[str, set[str]]) -> set[str]:
    """Pointers that an expression is an offset from; what a call gives is no pointer."""
    if isinstance(node, ast.Call):
        return set()
    if isinstance(node, ast.Name):
        return pointers.get(node.id, set())
    if isinstance(node, ast.Attribute):
        return set()
    return set().union(*(_pointers_of(child, pointers) for child in ast.iter_child_nodes(node)))


def _decide(node: ast.AST, constants: dict[str, Any]) -> Any:
    """The value of an expression of constants; None where it is of anything else."""
    try:
        return eval(  # of this package's own source
            compile(ast.Expression(node), "<kernel>", "eval"), {"__builtins__": {}}, constants
        )
    except Exception:
        return None
