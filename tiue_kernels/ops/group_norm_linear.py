"""Group norm of a map, then a linear map of its pixels.

Backward needs x and the statistics alone: the normalised map is computed again, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import for_group_norm, like
from tiue_kernels.ops._library import declare


def _normalise(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GroupNorm(x), mean and rstd."""
    rows, channels, height, width = x.shape
    norm = (norm_weight.to(x.dtype).contiguous(), norm_bias.to(x.dtype).contiguous())
    size = (rows, channels, height * width)
    return torch.native_group_norm(for_group_norm(x), *norm, *size, num_groups, eps)


def _run_forward(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, mean, rstd = _normalise(x, num_groups, norm_weight, norm_bias, eps)
    return F.linear(out.flatten(2).transpose(1, 2), weight, bias), mean, rstd


def _fake(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, _, height, width = x.shape
    stats = x.new_empty(rows, num_groups)  # of x's dtype, as torch gives them on every device
    return x.new_empty(rows, height * width, weight.shape[0]), stats, torch.empty_like(stats)


def _run_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    need_norm, need_weight, need_bias = output_mask
    rows, channels, height, width = x.shape
    grad_weight = grad_bias = x.new_empty(0)
    if need_weight:
        tokens = _normalise(x, num_groups, norm_weight, norm_bias, eps)[0].flatten(2)
        grad_weight = grad_out.flatten(0, 1).t() @ tokens.transpose(1, 2).flatten(0, 1)
    if need_bias:
        grad_bias = grad_out.sum((0, 1))
    grads = tuple(x.new_empty(0) for _ in range(3))
    if need_norm:
        grad = (grad_out @ weight).transpose(1, 2).unflatten(2, (height, width))
        taken = for_group_norm(x)
        grad_x, *norm_grads = torch.ops.aten.native_group_norm_backward(
            *(like(grad, taken), taken, mean, rstd, norm_weight.to(x.dtype).contiguous()),
            *(rows, channels, height * width, num_groups, [True, True, True]),
        )
        norm = zip(norm_grads, (norm_weight, norm_bias), strict=True)
        grads = (like(grad_x, x), *(grad.to(own.dtype) for grad, own in norm))
    return *grads, grad_weight, grad_bias


forward, backward = declare(
    "group_norm_linear",
    "(Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight,"
    " Tensor? bias) -> (Tensor out, Tensor mean, Tensor rstd)",
    "(Tensor grad_out, Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_weight,"
    " Tensor grad_bias)",
    fake=_fake,
    wanted=[("x", "norm_weight", "norm_bias"), ("weight",), ("bias",)],
    run=(_run_forward, _run_backward),
    decomposition=_run_forward,
)
