"""A convolution of stride 1 with a part of a weight's input channels."""

import torch
import torch.nn.functional as F

from tiue_kernels.dispatch import ANYWHERE
from tiue_kernels.layout import convolved_like
from tiue_kernels.ops._library import declare


def convolved_size(
    size: torch.Size, weight: torch.Tensor, padding: tuple[int, ...] | list[int]
) -> list[int]:
    """Height and width of the result."""
    return [
        extent + 2 * pad - kernel + 1
        for extent, pad, kernel in zip(size, padding, weight.shape[2:], strict=True)
    ]


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    start: int,
) -> torch.Tensor:
    return convolved_like(x, weight, x.shape[0], *convolved_size(x.shape[2:], weight, padding))


def _decomposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    start: int,
) -> torch.Tensor:
    return F.conv2d(x, weight[:, start : start + x.shape[1]], bias, padding=padding)


forward, backward = declare(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[2] padding, int start) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor weight, int[2] padding, int start, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    wanted=[("x",), ("weight",), ("bias",)],
    # cuDNN's convolutions are torch's.
    kernels={"cpu": ANYWHERE, "reference": ANYWHERE},
    decomposition=_decomposed,
)
