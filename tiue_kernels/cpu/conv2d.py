"""Stride-1 convolutions with a part of a weight's input channels, as a CPU runs them fastest.

As Winograd's where the compiled library is there and gains, as a matrix product where maps are
small and the weight is large, else as torch's. Times below: two CPU cores, float32, 1280 channels
in and out, 3 x 3.
"""

import threading

import torch
import torch.nn.functional as F

from tiue_kernels.cpu import winograd
from tiue_kernels.layout import convolved_format, like
from tiue_kernels.reference import conv2d as reference

# 4 rows of 4 x 4: 20 ms as a matrix product, 56 ms as a convolution, which sorts its weight first.
# 4 rows of 8 x 8: 63 and 80 ms. 4 rows of 16 x 16: the same, and slower below 1280 channels.
MOST_PIXELS = 256
# Of a weight: torch's convolutions are faster while it fits the cache. On one thread of a CPU with
# 32 MiB of that, 1 to 4 rows of 4 x 4 to 16 x 16, 3 x 3: a product takes 1.2 to 1.9 x the time with
# 0.8 MiB (the embedded model's), 0.97 to 1.34 x with 28 MiB, 0.28 to 0.95 x with 42 MiB.
LEAST_BYTES = 32 << 20

_buffers = threading.local()


def conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    start: int,
) -> torch.Tensor:
    out = winograd.conv2d(x, weight, bias, padding, start)
    if out is not None:
        return out
    rows, channels, height, width = x.shape
    whole = start == 0 and weight.shape[1] == channels
    part = weight if whole else weight[:, start : start + channels]
    is_small = 0 < rows * height * width <= MOST_PIXELS
    is_large = part.numel() * part.element_size() >= LEAST_BYTES
    if is_small and is_large and _is_matrix(x, weight):
        return _as_matrix_product(x, part, bias, padding)
    if not whole:
        part = _in_reused_memory(part, weight.is_contiguous())
    return F.conv2d(x, part, bias, padding=padding)


def conv2d_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: list[int],
    start: int,
    output_mask: list[bool],
    grad_part: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference's; `grad_part` is where the gradient of a part of the weight is written."""
    rows, channels, height, width = x.shape
    is_product = 0 < rows * height * width <= MOST_PIXELS and _is_matrix(x, weight)
    if not (winograd.serves_backward(x, weight, padding) or is_product):
        return reference.conv2d_bwd(grad_out, x, weight, padding, start, output_mask, grad_part)
    grad_weight = grad_part = grad_part if output_mask[1] else None
    if output_mask[1] and grad_part is None:
        whole = channels == weight.shape[1]
        grad_weight = torch.empty_like(weight) if whole else torch.zeros_like(weight)
        grad_part = grad_weight[:, start : start + channels]
    if winograd.serves_backward(x, weight, padding):
        grad_x, _, grad_bias = winograd.conv2d_backward(
            grad_out, x, weight, start, output_mask, grad_part
        )
    else:
        part = weight[:, start : start + channels]
        grad_x, grad_bias = _matrix_product_backward(
            grad_out, x, part, padding, output_mask, grad_part
        )
    return grad_x, x.new_empty(0) if grad_weight is None else grad_weight, grad_bias


def _is_matrix(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a slice of the weight is a matrix where it lies, and a product keeps precision."""
    return (
        weight.is_contiguous()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
    )


def _as_matrix_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> torch.Tensor:
    """The windows of all rows as the columns of one matrix; the weight is not copied."""
    rows, _, height, width = x.shape
    pad_h, pad_w = padding
    height += 2 * pad_h - weight.shape[2] + 1
    width += 2 * pad_w - weight.shape[3] + 1
    windows = F.unfold(x, weight.shape[2:], padding=(pad_h, pad_w))  # (rows, C*k*k, pixels)
    windows = windows.transpose(0, 1).flatten(1)  # (C*k*k, rows*pixels)
    matrix = weight.flatten(1)
    out = matrix @ windows if bias is None else torch.addmm(bias[:, None], matrix, windows)
    out = out.view(-1, rows, height, width).transpose(0, 1)
    return out.contiguous(memory_format=convolved_format(x, weight))


def _matrix_product_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: list[int],
    output_mask: list[bool],
    grad_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the bias of `_as_matrix_product`, over the same windows."""
    kernel, pads = tuple(weight.shape[2:]), tuple(padding)
    columns = grad_out.transpose(0, 1).flatten(1)  # (C_out, rows*pixels)
    grad_x = grad_bias = x.new_empty(0)
    if output_mask[0]:
        windows = weight.flatten(1).t() @ columns  # (C*k*k, rows*pixels)
        windows = windows.unflatten(1, (x.shape[0], -1)).transpose(0, 1)
        grad_x = like(F.fold(windows, tuple(x.shape[2:]), kernel, padding=pads), x)
    if grad_weight is not None:
        windows = F.unfold(x, kernel, padding=pads).transpose(0, 1).flatten(1)
        torch.mm(columns, windows.t(), out=grad_weight.view(len(weight), -1))
    if output_mask[2]:
        grad_bias = columns.sum(1)
    return grad_x, grad_bias


def _in_reused_memory(part: torch.Tensor, is_contiguous: bool) -> torch.Tensor:
    """Copy a slice of a weight into a buffer of this thread, which the next call overwrites.

    A convolution would copy it into fresh memory: 23 ms for 59 MB, against 5 ms into pages that
    the process already has.
    """
    flat = _buffer(part.numel(), part.dtype)
    if is_contiguous:
        return flat.view(part.shape).copy_(part)
    c_out, c_in, height, width = part.shape  # channels last
    return flat.view(c_out, height, width, c_in).permute(0, 3, 1, 2).copy_(part)


def _buffer(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of this thread, grown to the largest size asked for."""
    by_dtype = vars(_buffers)
    key = str(dtype)
    if key not in by_dtype or by_dtype[key].numel() < numel:
        with torch.inference_mode(False):
            by_dtype[key] = torch.empty(numel, dtype=dtype)
    return by_dtype[key][:numel]
