"""Group norm of a map, then a linear map of its pixels.

Backward needs x and the statistics alone: the normalised map is computed again, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops import group_norm_tokens as norm
from tiue_kernels.ops._library import declare, statistics_dtype


def _run_forward(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, stats = norm.forward(x, num_groups, norm_weight, norm_bias, eps)
    return F.linear(tokens, weight, bias), stats


def _fake(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, height, width = x.shape
    stats = x.new_empty(2, rows, num_groups, dtype=statistics_dtype(x.dtype))
    return x.new_empty(rows, height * width, weight.shape[0]), stats


def _run_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    stats: torch.Tensor,
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    need_norm, need_weight, need_bias = output_mask
    grad_weight = grad_bias = x.new_empty(0)
    if need_weight:
        tokens, _ = norm.forward(x, num_groups, norm_weight, norm_bias, eps)
        grad_weight = grad_out.flatten(0, 1).t() @ tokens.flatten(0, 1)
    if need_bias:
        grad_bias = grad_out.sum((0, 1))
    grads = tuple(x.new_empty(0) for _ in range(3))
    if need_norm:
        grad = grad_out @ weight
        grads = norm.backward(grad, x, num_groups, norm_weight, norm_bias, stats)
    return *grads, grad_weight, grad_bias


forward, backward = declare(
    "group_norm_linear",
    "(Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight,"
    " Tensor? bias) -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor weight, Tensor stats, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_weight,"
    " Tensor grad_bias)",
    fake=_fake,
    wanted=[("x", "norm_weight", "norm_bias"), ("weight",), ("bias",)],
    run=(_run_forward, _run_backward),
    made_of=("group_norm_tokens",),
    decomposition=_run_forward,
)
