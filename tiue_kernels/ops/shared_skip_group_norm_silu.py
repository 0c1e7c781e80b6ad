"""`tiue::shared_skip_group_norm_silu_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, rows_like, statistics_dtype


def border_group(hidden_channels: int, channels: int, num_groups: int) -> int:
    """How many groups read the hidden part: the first group wholly in the skip has this number."""
    return -(-hidden_channels * num_groups // channels)


def _fake_fwd(hidden, skip, num_groups, weight, bias, eps):
    channels = hidden.shape[1] + skip.shape[1]
    groups = border_group(hidden.shape[1], channels, num_groups)
    border = groups * (channels // num_groups)
    dtype = statistics_dtype(hidden.dtype)
    return (
        rows_like(hidden, hidden.shape[0], border, *hidden.shape[2:]),
        rows_like(hidden, skip.shape[0], channels - border, *skip.shape[2:]),
        hidden.new_empty(2, hidden.shape[0], groups, dtype=dtype),
        hidden.new_empty(2, skip.shape[0], num_groups - groups, dtype=dtype),
    )


def _fake_bwd(
    grad_hidden_out,
    grad_skip_out,
    hidden,
    skip,
    num_groups,
    weight,
    bias,
    hidden_stats,
    skip_stats,
):
    return (
        rows_like(hidden, *hidden.shape),
        rows_like(hidden, *skip.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


forward = define(
    "shared_skip_group_norm_silu_fwd",
    "(Tensor hidden, Tensor skip, int num_groups, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
backward = define(
    "shared_skip_group_norm_silu_bwd",
    "(Tensor grad_hidden_out, Tensor grad_skip_out, Tensor hidden, Tensor skip, int num_groups,"
    " Tensor weight, Tensor bias, Tensor hidden_stats, Tensor skip_stats)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    hidden, skip, ctx.num_groups, weight, bias, _ = inputs
    ctx.save_for_backward(hidden, skip, weight, bias, *output[2:])


def _backward(ctx, grad_hidden_out, grad_skip_out, _hidden_stats, _skip_stats):
    hidden, skip, weight, bias, *stats = ctx.saved_tensors
    grads = backward(
        grad_hidden_out, grad_skip_out, hidden, skip, ctx.num_groups, weight, bias, *stats
    )
    grad_hidden, grad_skip, grad_weight, grad_bias = grads
    return grad_hidden, grad_skip, None, grad_weight, grad_bias, None


torch.library.register_autograd(
    "tiue::shared_skip_group_norm_silu_fwd", _backward, setup_context=_setup_context
)
