"""3 x 3 convolutions on a CPU as Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308).

A tile of 4 x 4 outputs takes 36 multiplications a pair of channels instead of 144; so do its
gradients, by the transposes of the same transforms. Sums are of the same numbers in another order
and with factors up to 8, so float32 results differ from torch's by some 5e-5 where outputs are of
unit size. Needs the compiled library (`tiue_kernels.cpu`). No transformed weight is kept: it would
be four times the weight, and to read it takes as long as to read the weight and transform it where
it is multiplied (csrc/cpu/winograd.cpp). Times below: two CPU cores where no CPU time is named.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tiue_kernels import cpu
from tiue_kernels.cpu.library import POINTS, tiles_along, tiles_of

# Tiles from which a convolution gains: 1280 channels of 2 rows of 8 x 8, 8 tiles, take 35 ms of CPU
# time and 48 as a matrix product; of one row 35 and 27.
LEAST_TILES = 8
# And from which its gradients do: both of 1280 channels take 186 ms directly and as long here at 4
# rows of 8 x 8, 16 tiles; 662 and 283 ms at 4 rows of 16 x 16, 64 tiles.
LEAST_TILES_BACKWARD = 64
# Of transformed inputs at a time. They are read from the L3 cache, once for 32 outputs: 320
# channels of 4 rows of 64 x 64 take 117 ms of CPU time with 12 MiB, 133 with 24 and 143 with 48.
MOST_BYTES = 12 << 20
# Of a gradient's, or weights, at a time. Above 32 MiB malloc hands out fresh pages at every call:
# 640 channels of 2 rows of 64 x 64 took 42 ms in one piece of 47 MB.
BACKWARD_BYTES = 24 << 20
# The transforms cost as much as they save under these.
LEAST_CHANNELS = 64


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    start: int = 0,
) -> torch.Tensor | None:
    """conv2d(x, weight[:, start : start + C], bias) with padding 1, or None where it gains nothing.

    Args:
        x: [rows, C, H, W].
        weight: [C_out, C_in, 3, 3], C_in >= start + C.
        bias: [C_out].
        padding: anything but 1 is not served.
        start: the input channel of the weight that the first channel of x meets.

    Returns:
        [rows, C_out, H, W].
    """
    if not serves(x, weight, bias, padding):
        return None
    rows, channels, height, width = x.shape
    strips, columns = rows * tiles_along(height), tiles_along(width)
    if strips * columns < LEAST_TILES:
        return None
    weight = weight.detach()
    out = x.new_empty(rows, weight.shape[0], height, width)
    some = max(1, MOST_BYTES // (POINTS * channels * columns * x.element_size()))
    for first in range(0, strips, some):
        n = min(some, strips - first)
        panels = cpu.library().winograd_panels(x, first, n)
        cpu.library().winograd_forward(weight, start, panels, bias, first, n, out)
    return out


def conv2d_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    start: int,
    output_mask: list[bool],
    grad_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `conv2d(x, weight, bias, 1, start)`, where `serves_backward` says so.

    Args:
        grad_out: [rows, C_out, H, W].
        x: [rows, C, H, W].
        weight: [C_out, C_in, 3, 3], C_in >= start + C.
        start: the input channel of the weight that the first channel of x meets.
        output_mask: which of the three are wanted.
        grad_weight: where the second is written, [C_out, C, 3, 3]; by default it is new.

    Returns:
        Gradients of x, of weight[:, start : start + C] and of the bias; one that is not wanted has
        shape (0,).
    """
    grad_out = grad_out.contiguous()
    channels = x.shape[1]
    numel = POINTS * max(channels, len(weight)) * tiles_of(*x.shape[2:])  # of a row, transformed
    grads = [
        (row, cpu.library().winograd_output_backward(some)) for row, some in _rows(grad_out, numel)
    ]
    grad_x = grad_bias = x.new_empty(0)
    if output_mask[0]:
        grad_x = torch.empty_like(x)
        for first, part in _parts(channels, len(weight), like=x):
            transformed = part.view(POINTS, len(weight), -1)
            cpu.library().winograd_weight(weight.detach(), start + first, 0, transformed)
            for row, grad in grads:
                products = torch.bmm(transformed.mT, grad)
                cpu.library().winograd_input_backward(products, grad_x, row, first)
    if not output_mask[1]:
        grad_weight = x.new_empty(0)
    else:
        if grad_weight is None:
            grad_weight = x.new_empty(len(weight), channels, 3, 3)
        inputs = [cpu.library().winograd_input(some) for _, some in _rows(x, numel)]
        for first, part in _parts(len(weight), channels, like=x):
            outputs = slice(first, first + part.shape[1])
            for (row, grad), values in zip(grads, inputs, strict=True):
                part.baddbmm_(grad[:, outputs], values.mT, beta=int(row > 0))
            cpu.library().winograd_weight_backward(part, grad_weight, first)
    if output_mask[2]:
        grad_bias = grad_out.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias


def _rows(x: torch.Tensor, numel: int) -> Iterator[tuple[int, torch.Tensor]]:
    """As many rows at a time as have BACKWARD_BYTES when each is transformed to `numel`."""
    step = max(1, BACKWARD_BYTES // (numel * x.element_size()))
    yield from ((row, x[row : row + step]) for row in range(0, len(x), step))


def _parts(channels: int, others: int, like: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The first of some channels, and an empty [36, n, others] for them, a part at a time.

    In one buffer: what is made of a weight stays in the CPU's cache, and new pages would cost more
    than the transform (1280 x 1280: 21 against 108 ms).
    """
    step = max(32, BACKWARD_BYTES // (POINTS * others * like.element_size()))
    buffer = like.new_empty(POINTS * others * min(step, channels))
    for first in range(0, channels, step):
        n = min(step, channels - first)
        yield first, buffer[: POINTS * n * others].view(POINTS, n, others)


def serves_backward(x: torch.Tensor, weight: torch.Tensor, padding: list[int]) -> bool:
    """Whether `conv2d_backward` takes the gradients of `conv2d`, and gains."""
    tiles = len(x) * tiles_of(*x.shape[2:])
    return tiles >= LEAST_TILES_BACKWARD and serves(x, weight, None, padding)


def serves(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> bool:
    """Whether a convolution of stride 1 is of the kind, whatever its size."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    is_of_the_kind = (
        x.is_cpu
        and weight.shape[2:] == (3, 3)
        and list(padding) == [1, 1]
        and all(t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
        and min(weight.shape[0], x.shape[1]) >= LEAST_CHANNELS
    )
    if is_of_the_kind and not cpu.loaded():
        cpu.say_what_is_missed()
    return is_of_the_kind and cpu.loaded()
