"""conv2d(nearest x2 upsampling) as four 2 x 2 convolutions on the small map, one a phase."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tiue_kernels import dispatch
from tiue_kernels.cpu import winograd
from tiue_kernels.layout import like
from tiue_kernels.ops import conv2d
from tiue_kernels.ops._library import declare, rows_like

# Summing the taps reads and writes the weight a few times over. On two CPU cores at 1280 channels
# that took 62 ms; the four convolutions saved 51 ms at 4 x 4 x 4 rows and 99 ms at 4 x 8 x 8.
LEAST_PIXELS = 256
# On a GPU, for each byte of an element: the product of the taps moves 32 elements more a pair of
# channels, and phases save 40 operations a pixel. Derived for 400 TFLOP/s and 2.7 TB/s, twice over.
LEAST_PIXELS_ON_GPU = 236


def _has_phases(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether phases gain on the doubled map.

    Winograd's form of that takes 2.25 multiplications an output, phases take 4.
    """
    pixels = x.shape[0] * x.shape[2:].numel()
    if x.is_cuda:
        return pixels >= LEAST_PIXELS_ON_GPU * x.element_size()
    if pixels < LEAST_PIXELS:
        return False
    call = (x, weight, None, [1, 1], 0)
    return not (winograd.serves(*call[:4]) and dispatch.select("conv2d", "fwd", call) == "cpu")


def _run_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not _has_phases(x, weight):
        return like(conv2d.forward(_doubled(x), weight, bias, [1, 1], 0), x)
    if x.is_cuda:
        return phases_at_once(x, weight, bias)
    rows, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    out = rows_like(x, rows, weight.shape[0], 2 * height, 2 * width)
    for i, j, kernel in _phase_kernels(weight):
        window = padded[:, :, i : i + height + 1, j : j + width + 1]
        out[:, :, i::2, j::2] = F.conv2d(window, kernel, bias)
    return out


def phases_at_once(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The four phases as one convolution, for a GPU: three kernels in the place of 26.

    The taps are summed by one product, into a kernel [4 C_out, C_in, 2, 2] in channels_last whose
    outputs are ordered by channel, then by phase. With a border of zeros the window of phase i at
    the small map's row y is the convolution's row y + i.
    """
    rows, _, height, width = x.shape
    channels_out, channels = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).reshape(channels_out, 9, channels)
    sums = _tap_sums(weight).expand(channels_out, 16, 9)
    kernel = sums.bmm(taps)  # (C_out, phases * taps, C_in)
    kernel = kernel.view(4 * channels_out, 2, 2, channels).permute(0, 3, 1, 2)
    phases = F.conv2d(like(x, x), kernel, padding=1)  # (rows, 4 C_out, H + 1, W + 1)
    row, channel, down, right = phases.stride()
    windows = phases.as_strided(
        (rows, channels_out, height, 2, width, 2),
        (row, 4 * channel, down, 2 * channel + down, right, channel + right),
        phases.storage_offset(),
    )
    out = rows_like(x, rows, channels_out, 2 * height, 2 * width)
    spread = out.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    if bias is None:
        spread.copy_(windows)
    else:
        torch.add(windows, bias[:, None, None, None, None], out=spread)
    return out


@functools.cache
def _tap_sums_on(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[16, 9]: which of the 3 x 3 taps each of the 2 x 2 taps of the four phases sums."""
    # An even phase reads the taps as 0 | 1 2, an odd one as 0 1 | 2.
    axis = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    sums = torch.einsum("iay,jbx->ijabyx", axis, axis).reshape(16, 9)
    return sums.to(device, dtype)


def _tap_sums(weight: torch.Tensor) -> torch.Tensor:
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return _tap_sums_on(weight.device, weight.dtype)
    # Not kept of a weight without data: this matrix would have none either.
    return _tap_sums_on.__wrapped__(weight.device, weight.dtype)


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(_doubled(x), weight, bias, padding=1)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, _, height, width = x.shape
    return rows_like(x, rows, weight.shape[0], 2 * height, 2 * width)


def _run_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, output_mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    height, width = x.shape[2:]
    wants_x, wants_weight, wants_bias = output_mask
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if wants_bias:
        grad_bias = grad_out.sum((0, 2, 3), dtype=wide).to(x.dtype)
    if not x.numel():
        grad_x = torch.zeros_like(x) if wants_x else grad_x
        grad_weight = weight.new_zeros(weight.shape) if wants_weight else grad_weight
        return grad_x, grad_weight, grad_bias

    if not _has_phases(x, weight):
        mask = [wants_x, wants_weight, False]
        grad_x, grad_weight, _ = conv2d.backward(grad_out, _doubled(x), weight, [1, 1], 0, mask)
        if wants_x:
            pixels = grad_x.unflatten(3, (width, 2)).unflatten(2, (height, 2))
            grad_x = like(pixels.sum((3, 5), dtype=wide).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias

    padded = F.pad(x, (1, 1, 1, 1))
    grad_padded = torch.zeros_like(padded, dtype=wide) if wants_x else None
    taps = weight.new_zeros(*weight.shape, dtype=wide) if wants_weight else None
    for i, j, kernel in _phase_kernels(weight):
        grad_window, grad_kernel, _ = torch.ops.aten.convolution_backward(
            like(grad_out[:, :, i::2, j::2], x),
            padded[:, :, i : i + height + 1, j : j + width + 1],
            *(kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            [wants_x, wants_weight, False],
        )
        if grad_padded is not None:
            grad_padded[:, :, i : i + height + 1, j : j + width + 1] += grad_window
        if taps is not None:
            _spread(grad_kernel, i, j, taps)
    if grad_padded is not None:
        grad_x = like(grad_padded[:, :, 1:-1, 1:-1].to(x.dtype), x)
    if taps is not None:
        grad_weight = like(taps.to(weight.dtype), weight)
    return grad_x, grad_weight, grad_bias


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _phase_kernels(weight: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """i, j and the 2 x 2 kernel of the outputs (2 y + i, 2 x + j).

    One at a time: the four of 1280 channels take 105 MB.
    """
    for i in (0, 1):
        rows = _phase(weight, i, -2)
        for j in (0, 1):
            yield i, j, _phase(rows, j, -1)


def _phase(kernel: torch.Tensor, parity: int, axis: int) -> torch.Tensor:
    """Three taps on the doubled axis as two on the small one, for even or for odd outputs.

    An even output 2 i reads the doubled positions 2 i - 1, 2 i, 2 i + 1, which are i - 1, i, i of
    the small map; an odd one reads i, i, i + 1.
    """
    first, middle, last = kernel.unbind(axis)
    taps = (first + middle, last) if parity else (first, middle + last)
    return torch.stack(taps, axis)


def _spread(grad_kernel: torch.Tensor, i: int, j: int, taps: torch.Tensor) -> None:
    """Adds the gradient of a phase's 2 x 2 kernel to the 3 x 3 taps that its own were summed of."""
    for y in range(3):
        for x in range(3):
            # An even phase reads the taps as 0 | 1 2, an odd one as 0 1 | 2.
            taps[:, :, y, x] += grad_kernel[:, :, (y + 1 - i) // 2, (x + 1 - j) // 2]


forward, backward = declare(
    "upsample_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor weight, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    wanted=[("x",), ("weight",), ("bias",)],
    run=(_run_forward, _run_backward),
    made_of=("conv2d",),
    reference=_reference,
    decomposition=_reference,
)
