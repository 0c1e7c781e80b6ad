"""`tiue::shared_skip_group_norm_silu_conv2d_fwd` and `_bwd`: norm, SiLU and split convolution.

Backward needs the inputs and the statistics alone: the normalised maps are computed again, in one
elementwise kernel, and not kept.
"""

import torch

from tiue_kernels import convolution
from tiue_kernels.ops import shared_skip_group_norm_silu as norm
from tiue_kernels.ops._library import define, rows_like, statistics_dtype


def _run_fwd(hidden, skip, num_groups, norm_weight, norm_bias, eps, weight, bias, padding):
    front, back, *stats = norm.forward(hidden, skip, num_groups, norm_weight, norm_bias, eps)
    border = front.shape[1]
    keep = not convolution.is_trained(weight, hidden, skip)
    if not back.shape[1]:
        # No group lies wholly in the skip: nothing is shared, and the hidden part takes the bias.
        out = convolution.conv2d(front, weight, bias, padding, keep=keep)
        return out, out.new_empty(0), *stats
    out_hidden = convolution.conv2d(front, weight, None, padding, keep=keep)
    out_skip = convolution.conv2d(back, weight, bias, padding, border, keep)
    return out_hidden, out_skip, *stats


def _fake_fwd(hidden, skip, num_groups, norm_weight, norm_bias, eps, weight, bias, padding):
    channels = hidden.shape[1] + skip.shape[1]
    groups = norm.border_group(hidden.shape[1], channels, num_groups)
    size = [
        extent + 2 * pad - kernel + 1
        for extent, pad, kernel in zip(hidden.shape[2:], padding, weight.shape[2:], strict=True)
    ]
    dtype = statistics_dtype(hidden.dtype)
    out_skip = hidden.new_empty(0)
    if groups < num_groups:
        out_skip = convolution.output_like(hidden, weight, skip.shape[0], *size)
    return (
        convolution.output_like(hidden, weight, hidden.shape[0], *size),
        out_skip,
        hidden.new_empty(2, hidden.shape[0], groups, dtype=dtype),
        hidden.new_empty(2, skip.shape[0], num_groups - groups, dtype=dtype),
    )


def _run_bwd(
    grad_hidden_out,
    grad_skip_out,
    hidden,
    skip,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    weight,
    hidden_stats,
    skip_stats,
    padding,
    output_mask,
):
    front, back, *_ = norm.forward(hidden, skip, num_groups, norm_weight, norm_bias, eps)
    border = front.shape[1]
    need_input, need_weight, need_bias = output_mask
    whole = not back.shape[1]
    # Written in two parts where they belong: to join two would be 118 MB of new memory more.
    grad_weight = torch.empty_like(weight) if need_weight else None
    parts = (None, None) if grad_weight is None else grad_weight.tensor_split([border], dim=1)
    grad_front, _, grad_bias = convolution.conv2d_backward(
        *(grad_hidden_out, front, weight, padding, 0),
        *((need_input, need_weight, need_bias and whole), parts[0]),
    )
    grad_back = back
    if not whole:
        grad_back, _, grad_bias = convolution.conv2d_backward(
            *(grad_skip_out, back, weight, padding, border),
            *((need_input, need_weight, need_bias), parts[1]),
        )
    if need_input:
        inputs = norm.backward(
            grad_front,
            grad_back,
            hidden,
            skip,
            num_groups,
            norm_weight,
            norm_bias,
            hidden_stats,
            skip_stats,
        )
    else:
        inputs = tuple(hidden.new_empty(0) for _ in range(4))
    return *inputs, weight.new_empty(0) if grad_weight is None else grad_weight, grad_bias


def _fake_bwd(
    grad_hidden_out,
    grad_skip_out,
    hidden,
    skip,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    weight,
    hidden_stats,
    skip_stats,
    padding,
    output_mask,
):
    need_input, need_weight, need_bias = output_mask
    inputs = tuple(hidden.new_empty(0) for _ in range(4))
    if need_input:
        inputs = (
            rows_like(hidden, *hidden.shape),
            rows_like(hidden, *skip.shape),
            norm_weight.new_empty(norm_weight.shape),
            norm_bias.new_empty(norm_bias.shape),
        )
    return (
        *inputs,
        rows_like(weight, *weight.shape) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


forward = define(
    "shared_skip_group_norm_silu_conv2d_fwd",
    "(Tensor hidden, Tensor skip, int num_groups, Tensor norm_weight, Tensor norm_bias,"
    " float eps, Tensor weight, Tensor? bias, int[2] padding)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _run_fwd,
)
backward = define(
    "shared_skip_group_norm_silu_conv2d_bwd",
    "(Tensor grad_hidden_out, Tensor grad_skip_out, Tensor hidden, Tensor skip, int num_groups,"
    " Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor hidden_stats,"
    " Tensor skip_stats, int[2] padding, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _run_bwd,
)


def _setup_context(ctx, inputs, output):
    hidden, skip, ctx.num_groups, norm_weight, norm_bias, ctx.eps, weight, _, ctx.padding = inputs
    ctx.save_for_backward(hidden, skip, norm_weight, norm_bias, weight, *output[2:])


def _backward(ctx, grad_hidden_out, grad_skip_out, _hidden_stats, _skip_stats):
    hidden, skip, norm_weight, norm_bias, weight, *stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    norm_needed = (needed[0], needed[1], needed[3], needed[4])
    output_mask = [any(norm_needed), needed[6], needed[7]]
    *inputs, grad_weight, grad_bias = backward(
        grad_hidden_out,
        grad_skip_out,
        hidden,
        skip,
        ctx.num_groups,
        norm_weight,
        norm_bias,
        ctx.eps,
        weight,
        *stats,
        ctx.padding,
        output_mask,
    )
    grads = [grad if want else None for grad, want in zip(inputs, norm_needed, strict=True)]
    return (
        *grads[:2],
        None,
        *grads[2:],
        None,
        grad_weight if needed[6] else None,
        grad_bias if needed[7] else None,
        None,
    )


torch.library.register_autograd(
    "tiue::shared_skip_group_norm_silu_conv2d_fwd", _backward, setup_context=_setup_context
)
