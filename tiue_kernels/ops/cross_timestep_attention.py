"""`tiue::cross_timestep_attention_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, statistics_dtype


def _fake_fwd(query, key, value, num_heads, scale, attention_bias):
    rows, tokens, _ = query.shape
    logsumexp = query.new_empty(rows, num_heads, tokens, dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), logsumexp


def _fake_bwd(
    grad_out, query, key, value, num_heads, scale, attention_bias, out, logsumexp, needs_bias_grad
):
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    if attention_bias is None or not needs_bias_grad:
        return *grads, query.new_empty(0)
    return *grads, attention_bias.new_empty(attention_bias.shape)


forward = define(
    "cross_timestep_attention_fwd",
    "(Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor? attention_bias)"
    " -> (Tensor, Tensor)",
    _fake_fwd,
)
backward = define(
    "cross_timestep_attention_bwd",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, int num_heads, float scale,"
    " Tensor? attention_bias, Tensor out, Tensor logsumexp, bool needs_bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.num_heads, ctx.scale, attention_bias = inputs
    ctx.save_for_backward(query, key, value, attention_bias, *output)


def _backward(ctx, grad_out, _logsumexp):
    query, key, value, attention_bias, *output = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[5]
    *grads, grad_bias = backward(
        grad_out,
        query,
        key,
        value,
        ctx.num_heads,
        ctx.scale,
        attention_bias,
        *output,
        needs_bias_grad,
    )
    return *grads, None, None, grad_bias if needs_bias_grad else None


torch.library.register_autograd(
    "tiue::cross_timestep_attention_fwd", _backward, setup_context=_setup_context
)
