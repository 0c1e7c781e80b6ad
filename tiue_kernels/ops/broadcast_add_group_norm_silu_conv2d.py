"""`tiue::broadcast_add_group_norm_silu_conv2d_fwd` and `_bwd`: sum, norm, SiLU and convolution.

Backward needs the inputs and the statistics alone: the normalised map is computed again, in one
elementwise kernel, and not kept.
"""

import torch

from tiue_kernels import convolution
from tiue_kernels.ops import broadcast_add_group_norm_silu as norm
from tiue_kernels.ops._library import define, rows_like, statistics_dtype


def _run_fwd(
    hidden,
    shared,
    time_embedding,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale_shift,
    weight,
    bias,
    padding,
):
    active, stats = norm.forward(
        hidden, shared, time_embedding, num_groups, norm_weight, norm_bias, eps, scale_shift
    )
    keep = not convolution.is_trained(weight, hidden, shared, time_embedding)
    return convolution.conv2d(active, weight, bias, padding, keep=keep), stats


def _fake_fwd(
    hidden,
    shared,
    time_embedding,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale_shift,
    weight,
    bias,
    padding,
):
    rows = time_embedding.shape[0]
    size = [
        extent + 2 * pad - kernel + 1
        for extent, pad, kernel in zip(shared.shape[2:], padding, weight.shape[2:], strict=True)
    ]
    return (
        convolution.output_like(shared if hidden is None else hidden, weight, rows, *size),
        shared.new_empty(2, rows, num_groups, dtype=statistics_dtype(shared.dtype)),
    )


def _run_bwd(
    grad_out,
    hidden,
    shared,
    time_embedding,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale_shift,
    weight,
    stats,
    padding,
    output_mask,
):
    active, _ = norm.forward(
        hidden, shared, time_embedding, num_groups, norm_weight, norm_bias, eps, scale_shift
    )
    grad_active, grad_weight, grad_bias = convolution.conv2d_backward(
        grad_out, active, weight, padding, 0, tuple(output_mask)
    )
    if output_mask[0]:
        inputs = norm.backward(
            grad_active,
            hidden,
            shared,
            time_embedding,
            num_groups,
            norm_weight,
            norm_bias,
            scale_shift,
            stats,
        )
    else:
        inputs = tuple(shared.new_empty(0) for _ in range(5))
    return *inputs, grad_weight, grad_bias


def _fake_bwd(
    grad_out,
    hidden,
    shared,
    time_embedding,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale_shift,
    weight,
    stats,
    padding,
    output_mask,
):
    inputs = tuple(shared.new_empty(0) for _ in range(5))
    if output_mask[0]:
        rows = shared if hidden is None else hidden
        inputs = (
            shared.new_empty(0) if hidden is None else rows_like(hidden, *hidden.shape),
            rows_like(rows, *shared.shape),
            time_embedding.new_empty(time_embedding.shape),
            norm_weight.new_empty(norm_weight.shape),
            norm_bias.new_empty(norm_bias.shape),
        )
    return (
        *inputs,
        rows_like(weight, *weight.shape) if output_mask[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


forward = define(
    "broadcast_add_group_norm_silu_conv2d_fwd",
    "(Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups, Tensor norm_weight,"
    " Tensor norm_bias, float eps, bool scale_shift, Tensor weight, Tensor? bias, int[2] padding)"
    " -> (Tensor, Tensor)",
    _fake_fwd,
    _run_fwd,
)
backward = define(
    "broadcast_add_group_norm_silu_conv2d_bwd",
    "(Tensor grad_out, Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups,"
    " Tensor norm_weight, Tensor norm_bias, float eps, bool scale_shift, Tensor weight,"
    " Tensor stats, int[2] padding, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _run_bwd,
)


def _setup_context(ctx, inputs, output):
    hidden, shared, time_embedding, ctx.num_groups, norm_weight, norm_bias = inputs[:6]
    ctx.eps, ctx.scale_shift, weight, _, ctx.padding = inputs[6:]
    ctx.save_for_backward(hidden, shared, time_embedding, norm_weight, norm_bias, weight, output[1])


def _backward(ctx, grad_out, _stats):
    hidden, shared, time_embedding, norm_weight, norm_bias, weight, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    norm_needed = (*needed[:3], needed[4], needed[5])
    *inputs, grad_weight, grad_bias = backward(
        grad_out,
        hidden,
        shared,
        time_embedding,
        ctx.num_groups,
        norm_weight,
        norm_bias,
        ctx.eps,
        ctx.scale_shift,
        weight,
        stats,
        ctx.padding,
        [any(norm_needed), needed[8], needed[9]],
    )
    grads = [grad if want else None for grad, want in zip(inputs, norm_needed, strict=True)]
    return (
        *grads[:3],
        None,
        *grads[3:],
        None,
        None,
        grad_weight if needed[8] else None,
        grad_bias if needed[9] else None,
        None,
    )


torch.library.register_autograd(
    "tiue::broadcast_add_group_norm_silu_conv2d_fwd", _backward, setup_context=_setup_context
)
