"""Norm, SiLU and convolution of concat(hidden, skip), split at the skip's border.

Backward needs the inputs and the statistics alone: the normalised maps are computed again, in one
elementwise kernel, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels import dispatch
from tiue_kernels.layout import convolved_like
from tiue_kernels.ops import conv2d
from tiue_kernels.ops import shared_skip_group_norm_silu as norm
from tiue_kernels.ops._library import declare, statistics_dtype

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run_forward(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> Outputs:
    front, back, *stats = norm.forward(hidden, skip, num_groups, norm_weight, norm_bias, eps)
    if not back.shape[1]:
        # No group lies wholly in the skip: nothing is shared, and the hidden part takes the bias.
        out = conv2d.forward(front, weight, bias, padding, 0)
        return out, out.new_empty(0), *stats
    out_hidden = conv2d.forward(front, weight, None, padding, 0)
    return out_hidden, conv2d.forward(back, weight, bias, padding, front.shape[1]), *stats


def _reference(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> Outputs:
    """The whole convolution in the rows, zeros in what is shared: two sums round otherwise."""
    front, back, *stats = norm.forward(hidden, skip, num_groups, norm_weight, norm_bias, eps)
    if back.shape[1]:
        front = torch.cat([front, back.repeat(len(front) // max(len(back), 1), 1, 1, 1)], dim=1)
    out = F.conv2d(front, weight, bias, padding=padding)
    shared = torch.zeros_like(out[: len(back)]) if back.shape[1] else out.new_zeros(0)
    return out, shared, *stats


def _fake(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> Outputs:
    channels = hidden.shape[1] + skip.shape[1]
    groups = norm.border_group(hidden.shape[1], channels, num_groups)
    size = conv2d.convolved_size(hidden.shape[2:], weight, padding)
    dtype = statistics_dtype(hidden.dtype)
    out_skip = hidden.new_empty(0)
    if groups < num_groups:
        out_skip = convolved_like(hidden, weight, skip.shape[0], *size)
    return (
        convolved_like(hidden, weight, hidden.shape[0], *size),
        out_skip,
        hidden.new_empty(2, hidden.shape[0], groups, dtype=dtype),
        hidden.new_empty(2, skip.shape[0], num_groups - groups, dtype=dtype),
    )


def _run_backward(
    grad_hidden_out: torch.Tensor,
    grad_skip_out: torch.Tensor,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    hidden_stats: torch.Tensor,
    skip_stats: torch.Tensor,
    padding: list[int],
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    inputs = (hidden, skip, num_groups, norm_weight, norm_bias)
    front, back, *_ = norm.forward(*inputs, eps)
    border = front.shape[1]
    need_input, need_weight, need_bias = output_mask
    whole = not back.shape[1]
    # Written in two parts where they belong: to join two would be 118 MB of new memory more.
    grad_weight = torch.empty_like(weight) if need_weight else None
    parts = (None, None) if grad_weight is None else grad_weight.tensor_split([border], dim=1)
    mask = [need_input, need_weight, need_bias and whole]
    grad_front, _, grad_bias = dispatch.call(
        "conv2d", "bwd", grad_hidden_out, front, weight, padding, 0, mask, parts[0]
    )
    grad_back = back
    if not whole:
        grad_back, _, grad_bias = dispatch.call(
            "conv2d", "bwd", grad_skip_out, back, weight, padding, border, output_mask, parts[1]
        )
    grads = tuple(hidden.new_empty(0) for _ in range(4))
    if need_input:
        grads = norm.backward(grad_front, grad_back, *inputs, hidden_stats, skip_stats)
    return *grads, weight.new_empty(0) if grad_weight is None else grad_weight, grad_bias


forward, backward = declare(
    "shared_skip_group_norm_silu_conv2d",
    "(Tensor hidden, Tensor skip, int num_groups, Tensor norm_weight, Tensor norm_bias,"
    " float eps, Tensor weight, Tensor? bias, int[2] padding)"
    " -> (Tensor hidden_out, Tensor skip_out, Tensor hidden_stats, Tensor skip_stats)",
    "(Tensor grad_hidden_out, Tensor grad_skip_out, Tensor hidden, Tensor skip, int num_groups,"
    " Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor hidden_stats,"
    " Tensor skip_stats, int[2] padding, bool[3] output_mask)"
    " -> (Tensor grad_hidden, Tensor grad_skip, Tensor grad_norm_weight, Tensor grad_norm_bias,"
    " Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    wanted=[("hidden", "skip", "norm_weight", "norm_bias"), ("weight",), ("bias",)],
    run=(_run_forward, _run_backward),
    made_of=("shared_skip_group_norm_silu", "conv2d"),
    reference=_reference,
    decomposition=_run_forward,
)
