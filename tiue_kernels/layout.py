"""The memory formats that the operators keep: plain contiguous and channels_last."""

import torch
from torch._prims_common import suggest_memory_format


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last for maps that are dense in it and not also plainly contiguous."""
    if x.ndim != 4 or x.is_contiguous():
        return torch.contiguous_format
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if dense else torch.contiguous_format


def like(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x dense in the memory format of rows; itself where it is already."""
    return x.contiguous(memory_format=memory_format(rows))


def for_group_norm(x: torch.Tensor) -> torch.Tensor:
    """x as torch's group norm takes it: on a CPU dense in its format, else plainly contiguous.

    Forward refuses channels_last maps on CUDA, backward gives wrong sums for them, unnoticed.
    """
    return like(x, x) if x.device.type == "cpu" else x.contiguous()


def convolved_like(x: torch.Tensor, weight: torch.Tensor, rows: int, *size: int) -> torch.Tensor:
    """An empty [rows, C_out, *size] in the dtype and memory format of a convolution's result."""
    return torch.empty(
        (rows, weight.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=convolved_format(x, weight),
    )


def convolved_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """channels_last where the map or the weight is, as torch's own convolutions give.

    Of a weight the strides decide, also where it is 1 x 1 and both formats are one in memory.
    """
    formats = (memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format
