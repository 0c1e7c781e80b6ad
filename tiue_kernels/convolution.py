"""Stride-1 convolutions with a part of a weight's input channels, as a CPU runs them fastest.

Nothing here is a cache: a weight is read, and where need be copied, at every call, so no result
can be stale. Times below: two CPU cores, float32, 1280 channels in and out, 3 x 3.
"""

import threading

import torch
import torch.nn.functional as F

# 4 rows of 4 x 4: 20 ms as a matrix product, 56 ms as a convolution, which sorts its weight first.
# 4 rows of 8 x 8: 63 and 80 ms. 4 rows of 16 x 16: the same, and slower below 1280 channels.
MOST_PIXELS = 256

_buffers = threading.local()


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: int | tuple[int, ...],
    start: int = 0,
) -> torch.Tensor:
    """conv2d(x, weight[:, start : start + C], bias), stride 1.

    Args:
        x: [rows, C, H, W].
        weight: [C_out, C_in, kernel height, kernel width], C_in >= start + C.
        bias: [C_out].
        padding: zeros added on each side.
        start: the input channel of the weight that the first channel of x meets.

    Returns:
        [rows, C_out, H', W'].
    """
    rows, channels, height, width = x.shape
    whole = start == 0 and weight.shape[1] == channels
    part = weight if whole else weight[:, start : start + channels]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.conv2d(x, part, bias, padding=padding)
    if 0 < rows * height * width <= MOST_PIXELS and _is_matrix(x, weight):
        return _as_matrix_product(x, part, bias, padding)
    if not whole and not torch.is_grad_enabled():
        part = _in_reused_memory(part, weight.is_contiguous())
    return F.conv2d(x, part, bias, padding=padding)


def _is_matrix(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a slice of the weight is a matrix where it lies, and a product keeps precision."""
    return (
        weight.is_contiguous()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def _as_matrix_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: int | tuple[int, ...],
) -> torch.Tensor:
    """The windows of all rows as the columns of one matrix; the weight is not copied."""
    rows, _, height, width = x.shape
    pad_h, pad_w = (padding, padding) if isinstance(padding, int) else padding
    height += 2 * pad_h - weight.shape[2] + 1
    width += 2 * pad_w - weight.shape[3] + 1
    windows = F.unfold(x, weight.shape[2:], padding=(pad_h, pad_w))  # (rows, C*k*k, pixels)
    windows = windows.transpose(0, 1).flatten(1)  # (C*k*k, rows*pixels)
    matrix = weight.flatten(1)
    out = matrix @ windows if bias is None else torch.addmm(bias[:, None], matrix, windows)
    return out.view(-1, rows, height, width).transpose(0, 1).contiguous()


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
