"""`tiue::broadcast_add_group_norm_silu_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, rows_like, statistics_dtype


def _fake_fwd(hidden, shared, time_embedding, num_groups, weight, bias, eps, scale_shift):
    rows = time_embedding.shape[0]
    return (
        rows_like(shared if hidden is None else hidden, rows, *shared.shape[1:]),
        shared.new_empty(2, rows, num_groups, dtype=statistics_dtype(shared.dtype)),
    )


def _fake_bwd(
    grad_out, hidden, shared, time_embedding, num_groups, weight, bias, scale_shift, stats
):
    return (
        shared.new_empty(0) if hidden is None else rows_like(hidden, *hidden.shape),
        rows_like(shared if hidden is None else hidden, *shared.shape),
        time_embedding.new_empty(time_embedding.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


forward = define(
    "broadcast_add_group_norm_silu_fwd",
    "(Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups, Tensor weight,"
    " Tensor bias, float eps, bool scale_shift) -> (Tensor, Tensor)",
    _fake_fwd,
)
backward = define(
    "broadcast_add_group_norm_silu_bwd",
    "(Tensor grad_out, Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups,"
    " Tensor weight, Tensor bias, bool scale_shift, Tensor stats)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    hidden, shared, time_embedding, ctx.num_groups, weight, bias, _, ctx.scale_shift = inputs
    ctx.save_for_backward(hidden, shared, time_embedding, weight, bias, output[1])


def _backward(ctx, grad_out, _stats):
    hidden, shared, time_embedding, weight, bias, stats = ctx.saved_tensors
    grad_hidden, *grads = backward(
        grad_out,
        hidden,
        shared,
        time_embedding,
        ctx.num_groups,
        weight,
        bias,
        ctx.scale_shift,
        stats,
    )
    grad_shared, grad_time_embedding, grad_weight, grad_bias = grads
    if hidden is None:
        grad_hidden = None
    return grad_hidden, grad_shared, grad_time_embedding, None, grad_weight, grad_bias, None, None


torch.library.register_autograd(
    "tiue::broadcast_add_group_norm_silu_fwd", _backward, setup_context=_setup_context
)
