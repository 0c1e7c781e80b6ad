"""Calls of csrc/cpu by ctypes: a plain C interface on addresses, in one form a kind of CPU.

The library needs nothing of torch, so that it compiles where there is none and serves every
version; its loops run on torch's threads, by the stable C function that torch has for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiue_kernels import build
from tiue_kernels.libraries import LibraryError

VARIABLE = "TIUE_CPU_ISA"
POINTS = 36  # products of a tile of Winograd's F(4 x 4, 3 x 3)
PANEL = 16  # tiles of a panel (csrc/cpu/product.h)

_P, _N = c_void_p, c_int64
# Arguments by function; what csrc/cpu says of each.
_ARGUMENTS = {
    "winograd_panels": [_P, *5 * [_N], _P],
    "winograd_forward": [_P, *3 * [_N], _P, _P, *4 * [_N], _P],
    "winograd_input": [_P, *4 * [_N], _P],
    "winograd_weight": [_P, *3 * [_N], _P],
    "winograd_output_backward": [_P, *4 * [_N], _P],
    "winograd_input_backward": [_P, *6 * [_N], _P],
    "winograd_weight_backward": [_P, *3 * [_N], _P],
    "attention_memory": [_N, _N],
    "attention": [*3 * [_P, _N, _N], *6 * [_N], c_double, *3 * [_P]],
}
_RESULTS = {"attention_memory": _N}


class Library:
    """The functions of a compiled library, on contiguous float32 tensors of a CPU.

    Args:
        path: of the library.
        form: which of `build.CPU_FORMS` runs; by default $TIUE_CPU_ISA, or the widest that this
            computer has.

    Attributes:
        form: the one that runs.
        has_products: whether its products of matrices are worth having beside torch's: not those
            of the portable form on x86-64, unless it was asked for by name.

    Raises:
        LibraryError: it is for another version of the package, or this computer or the library has
            no such form.
        OSError: it is no library for this kind of computer.
    """

    def __init__(self, path: Path, form: str | None = None) -> None:
        dll = ctypes.CDLL(str(path))
        try:
            dll.tiue_version.restype = dll.tiue_widest.restype = ctypes.c_char_p
            version, widest = dll.tiue_version().decode(), dll.tiue_widest().decode()
        except AttributeError as error:
            raise LibraryError("is of another version of the package") from error
        if version != build.version():
            raise LibraryError(
                f"is of version {version} of the package, and this is {build.version()}"
            )
        wanted = form or os.environ.get(VARIABLE) or None
        self.form = _choose(wanted, widest)
        self.has_products = self.form != "portable" or wanted is not None
        self._functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(dll, f"tiue_{self.form}_{name}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
            self._functions[name] = function
        dll.tiue_use_threads(_torchs_loop())

    def winograd_panels(self, x: Tensor, first: int, strips: int) -> Tensor:
        """Strips (rows of tiles) of x [R, C, H, W], all maps' in turn -> [36, C, panels of 16].

        160 channels at a time are [panels, channels, 16], for `winograd_forward`.
        """
        _, channels, height, width = x.shape
        panels = -(-strips * tiles_along(width) // PANEL)
        out = x.new_empty(POINTS, channels, panels * PANEL)
        self._run("winograd_panels", x, channels, height, width, first, strips, out)
        return out

    def winograd_forward(
        self,
        weight: Tensor,
        start: int,
        panels: Tensor,
        bias: Tensor | None,
        first: int,
        strips: int,
        out: Tensor,
    ) -> None:
        """`winograd_panels` by weight[:, start : start + C] plus bias -> the strips of out."""
        _, outputs, height, width = out.shape
        part, place = weight[:, start:], (height, width, first, strips)
        sizes = (weight.stride(0), outputs, panels.shape[1])
        self._run("winograd_forward", part, *sizes, panels, bias, *place, out)

    def winograd_input(self, x: Tensor) -> Tensor:
        """x [R, C, H, W] -> [36, C, tiles]."""
        rows, channels, height, width = x.shape
        out = x.new_empty(POINTS, channels, rows * tiles_of(height, width))
        self._run("winograd_input", x, rows, channels, height, width, out)
        return out

    def winograd_weight(self, weight: Tensor, start: int, first: int, out: Tensor) -> None:
        """weight[first : first + n, start : start + C] -> out [36, n, C]."""
        part = weight[first:, start:]
        self._run("winograd_weight", part, weight.stride(0), *out.shape[1:], out)

    def winograd_output_backward(self, grad_out: Tensor) -> Tensor:
        """grad_out [R, C, H, W] -> [36, C, tiles]."""
        rows, channels, height, width = grad_out.shape
        out = grad_out.new_empty(POINTS, channels, rows * tiles_of(height, width))
        self._run("winograd_output_backward", grad_out, rows, channels, height, width, out)
        return out

    def winograd_input_backward(
        self, grads: Tensor, grad_x: Tensor, first_row: int, first: int
    ) -> None:
        """grads [36, n, tiles of r rows] -> r rows and n channels of grad_x."""
        _, channels, height, width = grad_x.shape
        rows = grads.shape[2] // tiles_of(height, width)
        sizes = (rows, grads.shape[1], channels, height, width, first)
        self._run("winograd_input_backward", grads, *sizes, grad_x[first_row:])

    def winograd_weight_backward(self, grads: Tensor, grad_weight: Tensor, first: int) -> None:
        """grads [36, n, C] -> n outputs of grad_weight, which may be a slice of input channels."""
        part, stride = grad_weight[first:], grad_weight.stride(0)
        self._run("winograd_weight_backward", grads, *grads.shape[1:], stride, part)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """query [K*B, N, H*D], key and value [B or K*B, M, H*D], rows and tokens in any place.

        Returns:
            [K*B, N, H*D], and the logarithm of every query's sum of exponentials [K*B, H, N].
        """
        (rows, queries, channels), (shared, keys, _) = query.shape, key.shape
        size = channels // heads
        out = query.new_empty(rows, queries, channels)
        logsumexp = query.new_empty(rows, heads, queries)
        packed = query.new_empty(shared * heads, self._run("attention_memory", size, keys))
        places: list[Any] = []
        for tensor in (query, key, value):
            places += [tensor, *tensor.stride()[:2]]
        sizes = (rows, shared, queries, keys, heads, size)
        self._run("attention", *places, *sizes, scale, packed, out, logsumexp)
        return out, logsumexp

    def _run(self, name: str, *arguments: Any) -> Any:
        """Tensors are handed over as addresses, and stay alive in the caller meanwhile."""
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        return self._functions[name](*plain)


def tiles_of(height: int, width: int) -> int:
    """Tiles of 4 x 4 outputs of one row of a map."""
    return tiles_along(height) * tiles_along(width)


def tiles_along(size: int) -> int:
    """Tiles of 4 outputs along an axis."""
    return -(-size // 4)


def _choose(wanted: str | None, widest: str) -> str:
    if wanted is None:
        return widest
    forms = list(build.CPU_FORMS)
    if wanted not in forms:
        raise LibraryError(f"has no form {wanted!r}, which {VARIABLE} asks for: {', '.join(forms)}")
    if forms.index(wanted) > forms.index(widest):
        raise LibraryError(f"is asked for {wanted} by {VARIABLE}; this computer has {widest}")
    return wanted


def _torchs_loop() -> c_void_p:
    """The address of `torch_parallel_for`, of torch's stable C interface."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    beside = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        # By its name where torch lies elsewhere: it is loaded already.
        torchs = ctypes.CDLL(str(beside) if beside.exists() else beside.name)
        return ctypes.cast(torchs.torch_parallel_for, c_void_p)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"finds no torch_parallel_for in {beside.name}: {error}") from error
