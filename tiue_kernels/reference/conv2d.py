"""A convolution of stride 1 with weight[:, start : start + C]."""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import like


def conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    start: int,
) -> torch.Tensor:
    return F.conv2d(x, weight[:, start : start + x.shape[1]], bias, padding=padding)


def conv2d_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: list[int],
    start: int,
    output_mask: list[bool],
    grad_part: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of weight is the whole one's, or that of its part, written to `grad_part`."""
    channels = x.shape[1]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(grad_out, x, weight[:, start : start + channels], [len(weight)], [1, 1], padding),
        *([1, 1], False, [0, 0], 1, output_mask),
    )
    none = x.new_empty(0)
    if not output_mask[1]:
        grad_weight = none
    elif grad_part is not None:
        grad_weight = grad_part.copy_(grad_weight)
    elif channels < weight.shape[1]:
        part, grad_weight = grad_weight, torch.zeros_like(weight)
        grad_weight[:, start : start + channels] = part
    return (
        like(grad_x, x) if output_mask[0] else none,
        like(grad_weight, weight) if output_mask[1] and grad_part is None else grad_weight,
        grad_bias if output_mask[2] else none,
    )
