"""What a layer multiplies its input by: a weight, and beside it the low-rank parts of LoRAs.

W x + sum_i s_i B_i A_i x is linear in x, so wherever a convolution or a product is split at a
skip's channels or shared by the timesteps, its LoRAs may be too. Without gradients they are added
to the weight, at every call: nothing is kept that could go stale, and a recorded CUDA graph sees
what is written to A and B. The low-rank product runs beside where A and B are trained, since the
gradient of a whole weight costs as much as the convolution itself, and where the maps are so small
that it is less work than a pass over the weight. CPU times of 3 x 3 convolutions, rank 16, float32:
1280 channels and 256 pixels 63 ms without a LoRA, 84 added, 71 beside; and 1024 pixels 146, 167 and
166; 320 channels and 16384 pixels 180, 189 and 254.

PEFT's layers are known by name, as diffusers' are: this package imports neither.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from tiue_kernels.nn.layers import is_idle, is_plain, is_untouched

Outputs = TypeVar("Outputs", torch.Tensor, tuple[torch.Tensor, torch.Tensor])

# 1280 x 1280 x 3 x 3 in float32, rank 16: 11 ms to add to the weight in blocks of this many rows,
# which stay in a core's cache, 13 ms at once, 40 ms into fresh memory (two cores).
_BLOCK_ROWS = 64

_buffers = threading.local()


@dataclass(frozen=True)
class Weights:
    """The weight and bias of a plain layer, and the LoRAs that are active on it.

    Attributes:
        layer: `nn.Conv2d` or `nn.Linear`.
        down: [R, C_in, ...], the A of all LoRAs, of the layer's own kernel size; None for none.
        up: [C_out, R], their B times their scales.
    """

    layer: Any
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        return self.layer.bias

    def runs_beside(self, positions: int) -> bool:
        """Whether the low-rank product is done beside the weight's, and not added to it.

        Args:
            positions: rows times pixels or tokens that the layer is applied to.
        """
        if self.down is None or self.up is None:
            return False
        if torch.is_grad_enabled() and (self.down.requires_grad or self.up.requires_grad):
            return True
        return self.down.dtype == self.layer.weight.dtype and positions < len(self.up)

    def apply(
        self,
        run: Callable[[torch.Tensor, torch.Tensor | None], Outputs],
        positions: int,
    ) -> Outputs:
        """run(weight, bias), with the LoRAs in it.

        Args:
            run: linear in the weight; gives maps [rows, C_out, H, W] or tokens [..., C_out], or two
                of them that are summed afterwards. It gets other numbers of output channels too.
            positions: rows times pixels or tokens that it is applied to.

        Returns:
            What `run` returns.
        """
        if not self.runs_beside(positions):
            return run(self.merged(), self.bias)
        assert self.down is not None
        full, low = run(self.layer.weight, self.bias), run(self.down, None)
        if isinstance(full, torch.Tensor):
            return full + self.raised(low)
        return (full[0] + self.raised(low[0]), full[1] + self.raised(low[1]))

    def raised(self, low: torch.Tensor) -> torch.Tensor:
        """Up from R channels to C_out: maps [rows, R, H, W] or tokens [..., R]."""
        assert self.up is not None
        return F.conv2d(low, self.up[:, :, None, None]) if low.ndim == 4 else F.linear(low, self.up)

    def merged(self, slot: int = 0) -> torch.Tensor:
        """The weight with its LoRAs added, in the weight's shape, layout and dtype.

        Args:
            slot: without gradients on a CPU the result lies in memory of this thread, which the
                next call of the same slot writes anew.
        """
        weight = self.layer.weight
        if self.down is None or self.up is None:
            return weight
        # A convolution in channels_last is a matrix of other columns.
        order = None
        down = self.down
        if weight.ndim == 4 and not weight.is_contiguous():
            order = (0, 2, 3, 1)
            weight, down = weight.permute(order), down.permute(order)
        shape = weight.shape
        matrix, down = weight.flatten(1), down.flatten(1)
        if matrix.dtype != down.dtype:
            wide = torch.promote_types(matrix.dtype, down.dtype)
            operands = (matrix.to(wide), self.up.to(wide), down.to(wide))
            out = torch.addmm(*operands).to(matrix.dtype)
        elif matrix.device.type == "cpu" and not torch.is_grad_enabled() and _are_real(matrix):
            out = _add_product(matrix, self.up, down, slot)
        else:
            out = torch.addmm(matrix, self.up, down)
        out = out.view(shape)
        return out if order is None else out.permute(0, 3, 1, 2)


def weights_of(layer: Any, *classes: type[nn.Module]) -> Weights | None:
    """The weights of a plain layer, or of a plain layer with LoRAs of PEFT; None for any other.

    None too where more than a weight is at work: DoRA and other variants, a bias of a LoRA, a
    dropout in training, hooks, adapters that are to be taken out of the weight again.

    Args:
        layer: any.
        *classes: of the layer itself.
    """
    if is_plain(layer, *classes):
        return Weights(layer)
    if not (_is_lora(layer) and is_untouched(layer)):
        return None
    base = layer.base_layer
    if not is_plain(base, *classes) or getattr(layer, "fan_in_fan_out", False):
        return None
    if layer.disable_adapters:
        return None if layer.merged else Weights(base)
    if layer.merged:
        return Weights(base)
    downs, ups = [], []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        plain = is_plain(a, *classes) and is_plain(b, *classes) and b.bias is None
        idle = is_idle(dropout) or is_plain(dropout, nn.Identity)
        if name in layer.lora_variant or not (plain and idle):
            return None
        if a.weight.dtype != base.weight.dtype and _trains_in_its_own_dtype(a.weight):
            return None
        downs.append(a.weight)
        ups.append(b.weight.flatten(1) * layer.scaling[name])
    if not downs:
        return Weights(base)
    if len(downs) == 1:
        return Weights(base, downs[0], ups[0])
    return Weights(base, torch.cat(downs), torch.cat(ups, dim=1))


def weights_of_conv(conv: Any) -> Weights | None:
    """As `weights_of`, for a convolution that the operators know: zero padding, stride 1."""
    weights = weights_of(conv, nn.Conv2d)
    if weights is None:
        return None
    layer = weights.layer
    known = (
        layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.groups == 1
        and set(layer.stride) == set(layer.dilation) == {1}
    )
    return weights if known else None


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """layer(x); of a linear layer with LoRAs one product, where that is less work."""
    weights = weights_of(layer, nn.Linear)
    if weights is None or weights.down is None or weights.runs_beside(math.prod(x.shape[:-1])):
        return layer(x)
    return F.linear(x, weights.merged(), weights.bias)


def _trains_in_its_own_dtype(a: torch.Tensor) -> bool:
    """Whether PEFT would bring the input to the dtype of A, and gradients flow there."""
    autocast = torch.is_autocast_enabled(a.device.type)
    return a.requires_grad and torch.is_grad_enabled() and not autocast


def _is_lora(layer: Any) -> bool:
    kind = type(layer)
    return kind.__name__ in ("Linear", "Conv2d") and kind.__module__ == "peft.tuners.lora.layer"


def _are_real(*tensors: torch.Tensor) -> bool:
    """Whether tensors hold numbers here: none of a compiler's or an exporter's."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors
    )


def _add_product(
    matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slot: int
) -> torch.Tensor:
    """matrix + up @ down, in memory that this thread has already."""
    by_key = vars(_buffers)
    key = f"{slot} {matrix.dtype}"
    if key not in by_key or by_key[key].numel() < matrix.numel():
        with torch.inference_mode(False):
            by_key[key] = torch.empty(matrix.numel(), dtype=matrix.dtype)
    out = by_key[key][: matrix.numel()].view(matrix.shape)
    for start in range(0, len(matrix), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        torch.addmm(matrix[rows], up[rows], down, out=out[rows])
    return out
