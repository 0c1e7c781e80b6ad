"""Stride-1 convolutions with a part of a weight's input channels, as a CPU runs them fastest.

Nothing here is a cache: a weight is read, and where need be copied, at every call, so no result
can be stale. Times below: two CPU cores, float32, 1280 channels in and out, 3 x 3.
"""

import threading

import torch
import torch.nn.functional as F

from tiue_kernels import winograd
from tiue_kernels.layout import like, memory_format

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
    keep: bool = True,
) -> torch.Tensor:
    """conv2d(x, weight[:, start : start + C], bias), stride 1.

    Args:
        x: [rows, C, H, W].
        weight: [C_out, C_in, kernel height, kernel width], C_in >= start + C.
        bias: [C_out].
        padding: zeros added on each side.
        start: the input channel of the weight that the first channel of x meets.
        keep: what is made of the weight may be kept, in a bounded memory: it is not in training.

    Returns:
        [rows, C_out, H', W'].
    """
    rows, channels, height, width = x.shape
    whole = start == 0 and weight.shape[1] == channels
    part = weight if whole else weight[:, start : start + channels]
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not _have_data(x, weight):
        return F.conv2d(x, part, bias, padding=padding)
    out = winograd.conv2d(x, weight, bias, padding, start, keep)
    if out is not None:
        return out
    if 0 < rows * height * width <= MOST_PIXELS and _is_matrix(x, weight):
        return _as_matrix_product(x, part, bias, padding)
    if not whole and not torch.is_grad_enabled():
        part = _in_reused_memory(part, weight.is_contiguous())
    return F.conv2d(x, part, bias, padding=padding)


def conv2d_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: int | tuple[int, ...],
    start: int = 0,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    grad_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `conv2d(x, weight, bias, padding, start)`.

    Args:
        grad_out: [rows, C_out, H', W'].
        x: [rows, C, H, W].
        weight: [C_out, C_in, kernel height, kernel width], C_in >= start + C.
        padding: zeros added on each side.
        start: the input channel of the weight that the first channel of x meets.
        output_mask: which of the three are wanted.
        grad_weight: where the second is written, such as the slice of a gradient of the whole
            weight; by default it is new.

    Returns:
        Gradients of x, of weight[:, start : start + C] and of the bias, in the memory formats of
        x and weight; one that is not wanted has shape (0,).
    """
    rows, channels, height, width = x.shape
    part = weight[:, start : start + channels]
    if _have_data(grad_out, x, weight) and winograd.serves_backward(x, weight, padding):
        return winograd.conv2d_backward(grad_out, x, weight, start, output_mask, grad_weight)
    if (
        0 < rows * height * width <= MOST_PIXELS
        and x.device.type == "cpu"
        and _is_matrix(x, weight)
    ):
        return _matrix_product_backward(grad_out, x, part, padding, output_mask, grad_weight)
    padding = (padding, padding) if isinstance(padding, int) else padding
    grad_x, grad_part, grad_bias = torch.ops.aten.convolution_backward(
        *(grad_out, x, part, [weight.shape[0]], [1, 1], list(padding), [1, 1]),
        *(False, [0, 0], 1, list(output_mask)),
    )
    none = x.new_empty(0)
    if output_mask[1]:
        grad_part = like(grad_part, weight) if grad_weight is None else grad_weight.copy_(grad_part)
    return (
        like(grad_x, x) if output_mask[0] else none,
        grad_part if output_mask[1] else none,
        grad_bias if output_mask[2] else none,
    )


def is_trained(weight: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """Whether autograd records this call, and so the weight may soon change.

    Below autograd, where launchers run, grad mode is off at any call; what a tensor requires still
    tells. Inputs of an inference require nothing, though its weights may.
    """
    recorded = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return weight.requires_grad and recorded


def output_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """channels_last where the map or the weight is, as torch's own convolutions give."""
    formats = (memory_format(x), memory_format(weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def output_like(x: torch.Tensor, weight: torch.Tensor, rows: int, *size: int) -> torch.Tensor:
    """An empty [rows, C_out, *size] in the dtype and memory format of a convolution's result."""
    return torch.empty(
        (rows, weight.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=output_format(x, weight),
    )


def _have_data(*tensors: torch.Tensor) -> bool:
    """Whether tensors are plain ones: a fake one must reach no buffer and no compiled library."""
    return all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)


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
    out = out.view(-1, rows, height, width).transpose(0, 1)
    return out.contiguous(memory_format=output_format(x, weight))


def _matrix_product_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: int | tuple[int, ...],
    output_mask: tuple[bool, bool, bool],
    grad_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward pass of `_as_matrix_product`, over the same windows."""
    pads = (padding, padding) if isinstance(padding, int) else tuple(padding)
    kernel = tuple(weight.shape[2:])
    columns = grad_out.transpose(0, 1).flatten(1)  # (C_out, rows*pixels)
    grad_x = grad_bias = x.new_empty(0)
    if output_mask[0]:
        windows = weight.flatten(1).t() @ columns  # (C*k*k, rows*pixels)
        windows = windows.unflatten(1, (x.shape[0], -1)).transpose(0, 1)
        grad_x = like(F.fold(windows, tuple(x.shape[2:]), kernel, padding=pads), x)
    if not output_mask[1]:
        grad_weight = x.new_empty(0)
    else:
        if grad_weight is None:
            grad_weight = x.new_empty(weight.shape)
        windows = F.unfold(x, kernel, padding=pads).transpose(0, 1).flatten(1)
        torch.mm(columns, windows.t(), out=grad_weight.view(len(weight), -1))
    if output_mask[2]:
        grad_bias = columns.sum(1)
    return grad_x, grad_weight, grad_bias


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
