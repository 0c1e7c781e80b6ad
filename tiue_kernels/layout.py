"""The memory formats that the operators keep: plain contiguous and channels_last."""

import torch


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
