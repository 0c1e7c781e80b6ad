"""What CUDA asks of a call and a CPU does not, enforced on fake CUDA tensors.

Fake tensors know their device, so tensors of two devices in one call, and a value that the host
waits for, are errors already. The rest stands below; each rule names where torch has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiue_kernels import cuda, dispatch
from tiue_kernels.ops._library import OPERATORS

aten = torch.ops.aten
Args = tuple[Any, ...]


class CudaError(RuntimeError):
    """What a call would fail with on a GPU, or compute wrongly."""


def _contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise CudaError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def _of_dtype(dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise CudaError(f"{name} must be {dtype}, it is {tensor.dtype}")


def _group_norm(x, weight, bias, *_) -> None:
    """ATen/native/group_norm.cpp checks x; the kernel reads parameters as dense and of x's type."""
    _contiguous(x=x, weight=weight, bias=bias)
    _of_dtype(x.dtype, weight=weight, bias=bias)


def _group_norm_backward(grad, x, mean, rstd, weight, *_) -> None:
    """Unchecked by torch: gradients of maps in another format are wrong sums."""
    _contiguous(grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    _of_dtype(x.dtype, grad=grad, mean=mean, rstd=rstd, weight=weight)


def _layer_norm(x, _, weight, bias, *__) -> None:
    """ATen/native/cuda/layer_norm_kernel.cu has no kernel for parameters of another type."""
    _of_dtype(x.dtype, weight=weight, bias=bias)


def _layer_norm_backward(grad, x, _, mean, rstd, weight, bias, *__) -> None:
    """Unlike a CPU, CUDA keeps the statistics of half types in float32."""
    _of_dtype(x.dtype, grad=grad, weight=weight, bias=bias)
    _of_dtype(torch.promote_types(x.dtype, torch.float32), mean=mean, rstd=rstd)


def _convolution(x, weight, bias, *_) -> None:
    _of_dtype(x.dtype, weight=weight, bias=bias)


def _flash_attention(query, key, value, *_) -> None:
    """ATen/native/transformers/cuda/flash_attn/flash_api.cpp; torch's own caller pads the heads."""
    size = query.shape[3]
    if size % 8 or size > 256:
        raise CudaError(f"a head must be a multiple of 8 up to 256, it is {size}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.stride(3) != 1:
            raise CudaError(f"{name} must be of a half type and dense in its last axis")


def _flash_attention_backward(_, query, key, value, *__) -> None:
    """There too; sdp_utils.cpp knows the cards that lack some heads."""
    _flash_attention(query, key, value)
    size, capability = query.shape[3], torch.cuda.get_device_capability()
    if 192 < size <= 224 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        raise CudaError(f"there is no gradient of heads of {size} on {capability}")


RULES = {
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.convolution.default: _convolution,
    aten.conv2d.default: _convolution,
    aten._scaled_dot_product_flash_attention.default: _flash_attention,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
}


class CudaRules(TorchDispatchMode):
    """Holds every call of torch's to `RULES`, and operators of this package to their fakes.

    An operator runs as it would on a GPU, its launcher chosen by the dispatch table; what it gives
    must have the shapes, dtypes, strides and device that its fake says.

    Attributes:
        checked: how often each rule was asked, by operator.
        operators: how often each of this package's operators ran.
        launches: how many Triton kernels were launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checked: dict[str, int] = {}
        self.operators: dict[str, int] = {}
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tiue":
            return self._own(func, args)
        if func in RULES:
            self.checked[str(func)] = self.checked.get(str(func), 0) + 1
            try:
                RULES[func](*args)
            except CudaError as error:
                raise CudaError(f"{func}: {error}") from None
        return func(*args, **(kwargs or {}))

    def _own(self, func: Any, args: Args) -> Any:
        name = func._schema.name.partition("::")[2]
        self.operators[name] = self.operators.get(name, 0) + 1
        said = tree_leaves(func(*args))
        with self:
            operator, _, direction = name.rpartition("_")
            given = OPERATORS[operator].launchers[direction](*args)
        for i, (fake, real) in enumerate(zip(said, tree_leaves(given), strict=True)):
            if facts(fake) != facts(real):
                laid = [x.stride() for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
                raise CudaError(
                    f"{name}: output {i} is {facts(real)}, its fake {facts(fake)}; the strides of "
                    f"its arguments are {laid}"
                )
        return given

    def launch(self, kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **options):
        """Stands for Triton's: a kernel reads and writes memory of the GPU alone."""
        self.launches += 1
        for name, value in (*zip(kernel.arg_names, args, strict=False), *options.items()):
            if isinstance(value, torch.Tensor) and not value.is_cuda:
                raise CudaError(f"{kernel.__name__}: {name} lies on {value.device}")


def facts(x: torch.Tensor) -> tuple[Any, ...]:
    """Shape, dtype, device and the strides that matter."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return tuple(x.shape), x.dtype, str(x.device), tuple(strides) if x.numel() else ()


@contextmanager
def absent_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[CudaRules]:
    """Tensors on "cuda" are fake inside, and every call is held to CUDA's rules."""
    rules = CudaRules()
    properties = SimpleNamespace(name="a GPU that is absent", multi_processor_count=132)

    def launch(self, *args: Any, **kwargs: Any) -> None:
        rules.launch(self, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.version, "cuda", "13.0"),  # of this torch: none, and it has no flash attention
            (cuda, "_why_not", "compiled kernels take no fake tensors"),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_name", lambda device=None: properties.name),
            (torch.cuda, "device", lambda device: ExitStack()),
            (triton.runtime.jit.JITFunction, "run", launch),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        dispatch.reset()  # what it remembers of devices
        stack.callback(dispatch.reset)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(rules)
        yield rules


def to_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Puts fake CUDA tensors in the place of a module's own."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                fake = like_on_gpu(tensor)
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, tensor.requires_grad)
                held[name] = fake
    return module


def like_on_gpu(x: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor of the same shape, strides and dtype."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
