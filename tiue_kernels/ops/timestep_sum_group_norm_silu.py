"""`tiue::timestep_sum_group_norm_silu_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, rows_like, statistics_dtype


def _fake_fwd(hidden, coefficients, num_groups, weight, bias, eps):
    rows = hidden.shape[0]
    return (
        rows_like(hidden, rows // coefficients.shape[0], *hidden.shape[1:]),
        hidden.new_empty(2, rows, num_groups, dtype=statistics_dtype(hidden.dtype)),
    )


def _fake_bwd(grad_out, hidden, coefficients, num_groups, weight, bias, stats):
    return (
        rows_like(hidden, *hidden.shape),
        coefficients.new_empty(coefficients.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


forward = define(
    "timestep_sum_group_norm_silu_fwd",
    "(Tensor hidden, Tensor coefficients, int num_groups, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor)",
    _fake_fwd,
)
backward = define(
    "timestep_sum_group_norm_silu_bwd",
    "(Tensor grad_out, Tensor hidden, Tensor coefficients, int num_groups, Tensor weight,"
    " Tensor bias, Tensor stats) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    hidden, coefficients, ctx.num_groups, weight, bias, _ = inputs
    ctx.save_for_backward(hidden, coefficients, weight, bias, output[1])


def _backward(ctx, grad_out, _stats):
    hidden, coefficients, weight, bias, stats = ctx.saved_tensors
    grads = backward(grad_out, hidden, coefficients, ctx.num_groups, weight, bias, stats)
    grad_hidden, grad_coefficients, grad_weight, grad_bias = grads
    return grad_hidden, grad_coefficients, None, grad_weight, grad_bias, None


torch.library.register_autograd(
    "tiue::timestep_sum_group_norm_silu_fwd", _backward, setup_context=_setup_context
)
