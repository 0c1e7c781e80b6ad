"""`tiue::cross_timestep_attention_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, statistics_dtype


def _fake_fwd(query, key, value, num_heads, scale, attention_bias):
    rows, tokens, _ = query.shape
    logsumexp = query.new_empty(rows, num_heads, tokens, dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), logsumexp


def _fake_bwd(grad_out, query, key, value, num_heads, scale, attention_bias, out, logsumexp):
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    bias = query.new_empty(0) if attention_bias is None else attention_bias
    return *grads, bias.new_empty(bias.shape)


forward = define(
    "cross_timestep_attention_fwd",
    "(Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor? attention_bias)"
    " -> (Tensor, Tensor)",
    _fake_fwd,
)
backward = define(
    "cross_timestep_attention_bwd",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, int num_heads, float scale,"
    " Tensor? attention_bias, Tensor out, Tensor logsumexp) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.num_heads, ctx.scale, attention_bias = inputs
    ctx.save_for_backward(query, key, value, attention_bias, *output)


def _backward(ctx, grad_out, _logsumexp):
    query, key, value, attention_bias, *output = ctx.saved_tensors
    *grads, grad_bias = backward(
        grad_out, query, key, value, ctx.num_heads, ctx.scale, attention_bias, *output
    )
    return *grads, None, None, None if attention_bias is None else grad_bias


torch.library.register_autograd(
    "tiue::cross_timestep_attention_fwd", _backward, setup_context=_setup_context
)
