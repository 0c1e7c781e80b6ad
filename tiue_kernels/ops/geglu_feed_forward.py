"""`tiue::geglu_feed_forward_fwd` and `_bwd`: projection, GEGLU and output of a feed-forward.

Backward needs x and, unless that is computed again too, the projection; the product of the two
halves is computed again always.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops import geglu
from tiue_kernels.ops._library import define


def _run_fwd(x, projection_weight, projection_bias, weight, bias, recompute_projection):
    projection = F.linear(x, projection_weight, projection_bias)
    out = F.linear(geglu.forward(projection), weight, bias)
    return out, x.new_empty(0) if recompute_projection else projection


def _fake_fwd(x, projection_weight, projection_bias, weight, bias, recompute_projection):
    projection = x.new_empty(*x.shape[:-1], projection_weight.shape[0])
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(0) if recompute_projection else projection,
    )


def _run_bwd(
    grad_out, x, projection, projection_weight, projection_bias, weight, recompute, output_mask
):
    need_x, need_projection_weight, need_projection_bias, need_weight, need_bias = output_mask
    none = x.new_empty(0)
    if recompute:
        projection = F.linear(x, projection_weight, projection_bias)
    columns = grad_out.flatten(0, -2)  # (tokens, C_out)
    grad_weight = grad_bias = none
    if need_weight:
        grad_weight = columns.t() @ geglu.forward(projection).flatten(0, -2)
    if need_bias:
        grad_bias = columns.sum(0)
    if not any(output_mask[:3]):
        return none, none, none, grad_weight, grad_bias
    grad_projection = geglu.backward(grad_out @ weight, projection).flatten(0, -2)
    return (
        (grad_projection @ projection_weight).view(x.shape) if need_x else none,
        grad_projection.t() @ x.flatten(0, -2) if need_projection_weight else none,
        grad_projection.sum(0) if need_projection_bias else none,
        grad_weight,
        grad_bias,
    )


def _fake_bwd(
    grad_out, x, projection, projection_weight, projection_bias, weight, recompute, output_mask
):
    shapes = (
        x.shape,
        projection_weight.shape,
        projection_weight.shape[:1],
        weight.shape,
        weight.shape[:1],
    )
    return tuple(
        x.new_empty(shape if needed else 0)
        for shape, needed in zip(shapes, output_mask, strict=True)
    )


forward = define(
    "geglu_feed_forward_fwd",
    "(Tensor x, Tensor projection_weight, Tensor? projection_bias, Tensor weight, Tensor? bias,"
    " bool recompute_projection) -> (Tensor, Tensor)",
    _fake_fwd,
    _run_fwd,
)
backward = define(
    "geglu_feed_forward_bwd",
    "(Tensor grad_out, Tensor x, Tensor projection, Tensor projection_weight,"
    " Tensor? projection_bias, Tensor weight, bool recompute_projection, bool[5] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _run_bwd,
)


def _setup_context(ctx, inputs, output):
    x, projection_weight, projection_bias, weight, _, ctx.recompute = inputs
    ctx.set_materialize_grads(False)  # or the projection gets a gradient of zeros of its size
    ctx.save_for_backward(x, output[1], projection_weight, projection_bias, weight)


def _backward(ctx, grad_out, _projection):
    needed = list(ctx.needs_input_grad[:5])
    grads = backward(grad_out, *ctx.saved_tensors, ctx.recompute, needed)
    return *(g if want else None for g, want in zip(grads, needed, strict=True)), None


torch.library.register_autograd(
    "tiue::geglu_feed_forward_fwd", _backward, setup_context=_setup_context
)
