"""Calls run by OpenVINO, the fastest way through a UNet on most CPUs."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

from tiue.compiled.calls import Call
from tiue.compiled.export import export, free_axes
from tiue.compiled.fingerprint import Fingerprint, contents
from tiue.errors import DependencyError, InputError, TiUEError

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "int8")


def import_openvino() -> Any:
    """The openvino package.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise DependencyError(
            "OpenVINO is not installed: pip install 'tiue[openvino]' (or pip install openvino)"
        ) from error
    return openvino


def import_nncf() -> Any:
    """The nncf package, which compresses OpenVINO's weights.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise DependencyError(
            "NNCF is not installed, which precision='int8' needs: pip install 'tiue[int8]' (or"
            " pip install nncf)"
        ) from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def check_precision(precision: str, backend: str | None = "openvino") -> None:
    """Refuse a precision that there is not.

    Args:
        precision: of `PRECISIONS`.
        backend: what compiles; only OpenVINO has another precision than the model's own.

    Raises:
        InputError: there is none of the name, or not with this backend.
        DependencyError: what it needs is not installed.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r}: choose of {', '.join(PRECISIONS)}")
    if precision != "float32" and backend != "openvino":
        raise InputError(f"precision={precision!r} is for backend='openvino'; got {backend!r}")
    if backend == "openvino":
        import_openvino()
    if precision == "int8":
        import_nncf()


def compressed(model: Any) -> Any:
    """An OpenVINO model with its weights as 8-bit integers, a scale and a zero a channel: lossy.

    Sums stay in float32. With activations in 8 bits too (`nncf.quantize`, calibrated on a call of
    eight prompts) the embedded model's pictures were off by 32 of 255 on average, with weights
    alone by 0.9.

    Args:
        model: in float32; changed in place.

    Returns:
        The model.
    """
    nncf = import_nncf()
    return nncf.compress_weights(model)


def settings() -> dict[str, Any]:
    """How models are compiled: for one call at a time, on torch's threads, exactly."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Its compiler of fused subgraphs takes the process down on the embedded model's UNet
        # (2026.4.1).
        "SNIPPETS_MODE": "DISABLE",
    }


def convert(program: torch.export.ExportedProgram) -> Any:
    """An exported program as an OpenVINO model."""
    return import_openvino().convert_model(program)


class Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def own_signal_stack() -> Iterator[None]:
    """The thread keeps the stack that its signal handlers run on, which Python's do.

    Compiling a model leaves one of 11 KiB that may go with the model (OpenVINO 2026.4.1, an AMD
    EPYC with AVX-512): the next SIGINT or SIGTERM ended the process in a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library, before = ctypes.CDLL(None), Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


class OpenVINOCall:
    """A function of float32 tensors that OpenVINO compiles once a key (`Call.key`).

    OpenVINO holds a copy of the weights, in an order of its own. So all weights are read at every
    call, and every compiled call is dropped when they have changed in any way: a LoRA costs a
    compilation, and so does an optimiser's step. What cannot be converted is called as it is, and
    the log says so once.

    Args:
        function: one tensor out, which depends on the arguments and the modules alone.
        modules: whose weights it reads.
        max_models: compiled calls kept, each with a copy of the weights; the least recently used
            goes first.
        dynamic: whether one compiled call serves every batch and size; slower than one for each.
        precision: "float32", or "int8" for the weights, which is lossy.

    Raises:
        InputError: no such precision.
        DependencyError: OpenVINO, or NNCF for "int8", is not installed.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        modules: Sequence[nn.Module],
        max_models: int = 1,
        dynamic: bool = False,
        precision: str = "float32",
    ) -> None:
        check_precision(precision)
        self._precision = precision
        self._core = import_openvino().Core()
        self._function = function
        self._modules = modules
        self._max_models = max_models
        self._dynamic = dynamic
        # None: this call cannot be converted.
        self._models: OrderedDict[Hashable, Any] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._contents: list[tuple[int, int]] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return sum(model is not None for model in self._models.values())

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = Call.of(args, kwargs)
        wrong = {str(t.dtype) for t in call.tensors if t.is_floating_point()} - {"torch.float32"}
        if wrong or any(tensor.device.type != "cpu" for tensor in call.tensors):
            raise InputError(
                "backend='openvino' runs float32 models on the CPU: call .to('cpu', torch.float32)"
            )
        if any(not tensor.numel() for tensor in call.tensors):
            return self._function(*args, **kwargs)
        with self._lock:
            model = self._model(call)
            if model is not None:
                inputs = [t.detach().contiguous().numpy() for t in call.tensors]
                return torch.from_numpy(model(inputs)[0].copy())
        return self._function(*args, **kwargs)

    def _model(self, call: Call) -> Any:
        present = contents(self._modules)
        if self._fingerprint is None or self._contents != present or not self._fingerprint.holds():
            self._models.clear()
            self._contents = present
            self._fingerprint = Fingerprint(self._modules)
        key = call.key(self._sizes) if self._dynamic else call.key()
        if key is None:
            return None
        if key not in self._models:
            while len(self._models) >= self._max_models:
                self._models.popitem(last=False)
            self._models[key] = self._compile(call)
            # A LoRA that was scaled for the call and back need not come back to the last bit.
            self._fingerprint = Fingerprint(self._modules)
        self._models.move_to_end(key)
        return self._models[key]

    def _compile(self, call: Call) -> Any:
        call = call.copied(torch.device("cpu"))
        try:
            program = export(self._function, self._modules, call, self._dynamic)
            model = convert(program)
            if self._precision == "int8":
                model = compressed(model)
            with own_signal_stack():
                return self._core.compile_model(model, "CPU", settings())
        except TiUEError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:
            logger.warning(
                "A call runs without OpenVINO, which does not take it: %s",
                str(error).strip().split("\n")[0],
            )
            return None

    def _sizes(self, tensor: torch.Tensor) -> Hashable:
        """What two shapes have in common that one dynamic program serves.

        OpenVINO does not check what a program takes for granted: that a size is not 1, and that
        sides are divisible as often as the UNet halves them.
        """
        halvings = max(getattr(module, "num_upsamplers", 0) for module in self._modules)
        shape: list[Hashable] = list(tensor.shape)
        for axis in free_axes(tensor):
            size = tensor.shape[axis]
            twos = min(size & -size, 2**halvings) if axis else None
            shape[axis] = (size == 1, twos)
        return tuple(shape)
