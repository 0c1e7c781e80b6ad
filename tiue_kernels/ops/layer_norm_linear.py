"""`tiue::layer_norm_linear_fwd` and `_bwd`: one layer norm, several projections of its result.

Backward needs x and the statistics alone: the normalised tokens are computed again, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops._library import define, statistics_dtype


def normalise(x, norm_weight, norm_bias, eps):
    """LayerNorm(x) over the last axis with its mean and rstd, parameters in any dtype."""
    norm_weight, norm_bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    return torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)


def empty_statistics(x):
    """For fakes: the mean or the rstd of LayerNorm; torch's for a CPU have the dtype of x."""
    dtype = x.dtype if x.device.type == "cpu" else statistics_dtype(x.dtype)
    return x.new_empty(*x.shape[:-1], 1, dtype=dtype)


def normalise_backward(grad_out, x, mean, rstd, norm_weight, norm_bias):
    """Gradients of LayerNorm at x, weight and bias, each in its dtype."""
    weight, bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_out.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    return grad_x, grad_weight.to(norm_weight.dtype), grad_bias.to(norm_bias.dtype)


def _run_fwd(x, norm_weight, norm_bias, eps, weights):
    tokens, mean, rstd = normalise(x, norm_weight, norm_bias, eps)
    tokens = tokens.to(weights[0].dtype)
    return [F.linear(tokens, weight) for weight in weights], mean, rstd


def _fake_fwd(x, norm_weight, norm_bias, eps, weights):
    stats = empty_statistics(x)
    outputs = [weight.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return outputs, stats, torch.empty_like(stats)


def _run_bwd(grads_out, x, norm_weight, norm_bias, eps, weights, mean, rstd, output_mask):
    need_norm, need_weights = output_mask
    grads_weight = []
    if need_weights:
        tokens = normalise(x, norm_weight, norm_bias, eps)[0].to(weights[0].dtype).flatten(0, -2)
        grads_weight = [grad.flatten(0, -2).t() @ tokens for grad in grads_out]
    norm_grads = tuple(x.new_empty(0) for _ in range(3))
    if need_norm:
        grad = grads_out[0] @ weights[0]
        for grad_out, weight in zip(grads_out[1:], weights[1:], strict=True):
            grad = torch.addmm(grad.flatten(0, -2), grad_out.flatten(0, -2), weight).view_as(grad)
        norm_grads = normalise_backward(grad, x, mean, rstd, norm_weight, norm_bias)
    return *norm_grads, grads_weight


def _fake_bwd(grads_out, x, norm_weight, norm_bias, eps, weights, mean, rstd, output_mask):
    need_norm, need_weights = output_mask
    norm_grads = tuple(x.new_empty(0) for _ in range(3))
    if need_norm:
        norm_grads = tuple(t.new_empty(t.shape) for t in (x, norm_weight, norm_bias))
    return (
        *norm_grads,
        [weight.new_empty(weight.shape) for weight in weights] if need_weights else [],
    )


forward = define(
    "layer_norm_linear_fwd",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor[] weights)"
    " -> (Tensor[], Tensor, Tensor)",
    _fake_fwd,
    _run_fwd,
)
backward = define(
    "layer_norm_linear_bwd",
    "(Tensor[] grads_out, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor[] weights, Tensor mean, Tensor rstd, bool[2] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    _fake_bwd,
    _run_bwd,
)


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, ctx.eps, weights = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, *output[1:], *weights)


def _backward(ctx, grads_out, _mean, _rstd):
    x, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    need_weights = any(weight.requires_grad for weight in weights)
    *grads, grads_weight = backward(
        *(grads_out, x, norm_weight, norm_bias, ctx.eps, weights, mean, rstd),
        [any(needed), need_weights],
    )
    grads = [grad if want else None for grad, want in zip(grads, needed, strict=True)]
    return *grads, None, grads_weight if need_weights else [None] * len(weights)


torch.library.register_autograd(
    "tiue::layer_norm_linear_fwd", _backward, setup_context=_setup_context
)
