"""`tiue::upsample_conv2d_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, rows_like


def _fake_fwd(x, weight, bias):
    rows, _, height, width = x.shape
    return rows_like(x, rows, weight.shape[0], 2 * height, 2 * width)


def _fake_bwd(grad_out, x, weight, output_mask):
    return (
        rows_like(x, *x.shape) if output_mask[0] else x.new_empty(0),
        weight.new_empty(weight.shape if output_mask[1] else 0),
        weight.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


forward = define(
    "upsample_conv2d_fwd", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake_fwd
)
backward = define(
    "upsample_conv2d_bwd",
    "(Tensor grad_out, Tensor x, Tensor weight, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_out):
    needed = list(ctx.needs_input_grad)
    grads = backward(grad_out, *ctx.saved_tensors, needed)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))


torch.library.register_autograd(
    "tiue::upsample_conv2d_fwd", _backward, setup_context=_setup_context
)
