"""`tiue::group_norm_linear_fwd` and `_bwd`: group norm of a map, then a linear map of its pixels.

Backward needs x and the statistics alone: the normalised map is computed again, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.layout import for_group_norm, like
from tiue_kernels.ops._library import define, rows_like


def _normalise(x, num_groups, norm_weight, norm_bias, eps):
    """GroupNorm(x), mean and rstd."""
    rows, channels, height, width = x.shape
    norm = (norm_weight.to(x.dtype).contiguous(), norm_bias.to(x.dtype).contiguous())
    size = (rows, channels, height * width)
    return torch.native_group_norm(for_group_norm(x), *norm, *size, num_groups, eps)


def _run_fwd(x, num_groups, norm_weight, norm_bias, eps, weight, bias):
    out, mean, rstd = _normalise(x, num_groups, norm_weight, norm_bias, eps)
    return F.linear(out.flatten(2).transpose(1, 2), weight, bias), mean, rstd


def _fake_fwd(x, num_groups, norm_weight, norm_bias, eps, weight, bias):
    rows, _, height, width = x.shape
    stats = x.new_empty(rows, num_groups)  # of x's dtype, as torch gives them on every device
    return x.new_empty(rows, height * width, weight.shape[0]), stats, torch.empty_like(stats)


def _run_bwd(grad_out, x, num_groups, norm_weight, norm_bias, eps, weight, mean, rstd, output_mask):
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


def _fake_bwd(
    grad_out, x, num_groups, norm_weight, norm_bias, eps, weight, mean, rstd, output_mask
):
    need_norm, need_weight, need_bias = output_mask
    grads = tuple(x.new_empty(0) for _ in range(3))
    if need_norm:
        norm = (norm_weight.new_empty(norm_weight.shape), norm_bias.new_empty(norm_bias.shape))
        grads = (rows_like(x, *x.shape), *norm)
    return (
        *grads,
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


forward = define(
    "group_norm_linear_fwd",
    "(Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight,"
    " Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    _run_fwd,
)
backward = define(
    "group_norm_linear_bwd",
    "(Tensor grad_out, Tensor x, int num_groups, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _run_bwd,
)


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, norm_weight, norm_bias, ctx.eps, weight, _ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, *output[1:])


def _backward(ctx, grad_out, _mean, _rstd):
    x, norm_weight, norm_bias, weight, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    norm_needed = (needs[0], needs[2], needs[3])
    *grads, grad_weight, grad_bias = backward(
        *(grad_out, x, ctx.num_groups, norm_weight, norm_bias, ctx.eps, weight, mean, rstd),
        [any(norm_needed), needs[5], needs[6]],
    )
    grads = [grad if want else None for grad, want in zip(grads, norm_needed, strict=True)]
    return (
        *(grads[0], None, *grads[1:], None),
        grad_weight if needs[5] else None,
        grad_bias if needs[6] else None,
    )


torch.library.register_autograd(
    "tiue::group_norm_linear_fwd", _backward, setup_context=_setup_context
)
